//! The real servers below the cluster, and the faults that affect them.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use contract::ids::{BUCKETS, EndpointKey};
use rdkafka::client::ClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::Message;
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use rdkafka::{Offset, TopicPartitionList};
use servers::{BrokerPlacement, Kafka, Postgres};
use sqlx::Connection as _;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::sleep;

use crate::cluster::{Role, ServerUrls};
use crate::faults::Rng;
use crate::proxy::Proxy;
use crate::support::PATIENCE;

const TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum number of records republished by one fault.
const REPUBLISHED_MAX: usize = 20;
/// Size of each server's disk: small, so that it can be filled.
const DISK_MIB: u64 = 1024;

/// Counts the records that the brokers confirmed.
#[derive(Default)]
struct ConfirmedCount(AtomicUsize);

impl ClientContext for ConfirmedCount {}

impl ProducerContext for ConfirmedCount {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        self.0
            .fetch_add(usize::from(result.is_ok()), Ordering::Relaxed);
    }
}

/// The proxies between one process and the servers.
pub struct ProcessProxies {
    pub store: Proxy,
    /// One per broker.
    pub bus: Vec<Proxy>,
}

/// Clusters run one at a time: two would starve each other on a small machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

pub struct Stack {
    pub kafka: Kafka,
    pub postgres: Postgres,
    prefix: String,
    database: String,
    proxies: BTreeMap<&'static str, ProcessProxies>,
    disk: SmallDisk,
    broker_disks: Vec<SmallDisk>,
    _guard: MutexGuard<'static, ()>,
}

impl Stack {
    /// Starts the servers and proxies. `None` only if `PENSTOCK_SKIP` names a server.
    pub async fn start(brokers: usize, members: &[(&'static str, Role)]) -> Option<Self> {
        let guard = ONE_AT_A_TIME.lock().await;
        let mut proxies = BTreeMap::new();
        for (name, _) in members {
            let mut bus = Vec::new();
            for _ in 0..brokers {
                bus.push(Proxy::bind().await);
            }
            let store = Proxy::bind().await;
            proxies.insert(*name, ProcessProxies { store, bus });
        }
        let disk = SmallDisk::new();
        let broker_disks: Vec<SmallDisk> = (0..brokers).map(|_| SmallDisk::new()).collect();
        let (folder, placements) = (disk.path.clone(), placements(&proxies, &broker_disks));
        let started = tokio::task::spawn_blocking(move || {
            let postgres = Postgres::start_in(&folder)?;
            let database = postgres.database();
            let kafka = Kafka::start_on(&placements)?;
            Some((kafka, postgres, database))
        });
        let (kafka, postgres, database) = started.await.unwrap()?;
        for (index, proxies) in proxies.values().enumerate() {
            proxies.store.set_target(postgres.port());
            for (broker, proxy) in proxies.bus.iter().enumerate() {
                proxy.set_target(kafka.port_behind(broker, index));
            }
        }
        Some(Self {
            prefix: kafka.prefix(),
            kafka,
            postgres,
            database,
            proxies,
            disk,
            broker_disks,
            _guard: guard,
        })
    }

    /// The URLs for one process, through its own proxies.
    pub fn urls_of(&self, name: &str) -> ServerUrls {
        let proxies = &self.proxies[name];
        let direct = format!(":{}/", self.postgres.port());
        let store = self
            .database
            .replace(&direct, &format!(":{}/", proxies.store.port));
        let brokers = proxies.bus.iter();
        let brokers = brokers.map(|proxy| format!("127.0.0.1:{}", proxy.port));
        ServerUrls {
            store,
            bus: format!(
                "kafka://{}/{}",
                brokers.collect::<Vec<_>>().join(","),
                self.prefix
            ),
        }
    }

    /// The URLs of the servers, without proxies.
    pub fn direct(&self) -> ServerUrls {
        ServerUrls {
            store: self.database.clone(),
            bus: self.kafka.url(&self.prefix),
        }
    }

    pub fn proxies_of(&self, name: &str) -> &ProcessProxies {
        &self.proxies[name]
    }

    /// Kills a broker for this long. Returns when it is up again: the instant at which it was restarted.
    pub async fn with_broker_down(&self, broker: usize, duration: Duration) -> Instant {
        self.kafka.kill(broker);
        sleep(duration).await;
        let healed = Instant::now();
        tokio::task::block_in_place(|| self.kafka.restart(broker));
        healed
    }

    /// As [`with_broker_down`](Self::with_broker_down).
    pub async fn restart_postgres(&self) -> Instant {
        let healed = Instant::now();
        tokio::task::block_in_place(|| self.postgres.restart());
        healed
    }

    /// The broker that leads the partition of an endpoint.
    pub async fn leader_of(&self, endpoint: &str) -> usize {
        let bucket = EndpointKey::new(&endpoint.parse().unwrap()).bucket();
        let topic = format!("{}.events", self.prefix);
        tokio::task::block_in_place(|| {
            let consumer: BaseConsumer = self.client().create().unwrap();
            let metadata = consumer.fetch_metadata(Some(&topic), TIMEOUT).unwrap();
            let partitions = metadata.topics()[0].partitions();
            let partition = partitions.iter().find(|p| p.id() == i32::from(bucket.0));
            // Brokers have the ids 1, 2, 3. During an election the leader is unknown.
            let leader = partition.map_or(1, |partition| partition.leader()).max(1);
            usize::try_from(leader - 1).unwrap() % self.kafka.count()
        })
    }

    fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", self.kafka.addresses())
            .set("group.id", "nobody")
            .set("enable.auto.commit", "false")
            .set("auto.offset.reset", "earliest");
        config
    }

    /// Republishes some old records byte for byte, in another order; retries while brokers are down. Returns
    /// the number of records, at least one.
    pub async fn republish_old_records(&self, seed: u64) -> usize {
        let began = Instant::now();
        loop {
            let confirmed = tokio::task::block_in_place(|| self.try_to_republish(seed));
            if confirmed > 0 {
                return confirmed;
            }
            // A killed broker may take a while to recover on a busy machine.
            assert!(
                began.elapsed() < PATIENCE * 3,
                "no record could be republished"
            );
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn try_to_republish(&self, seed: u64) -> usize {
        let topic = format!("{}.events", self.prefix);
        let mut rng = Rng(seed);
        let consumer: BaseConsumer = self.client().create().unwrap();
        let producer: BaseProducer<ConfirmedCount> = self
            .client()
            .create_with_context(ConfirmedCount::default())
            .unwrap();
        let mut assigned = TopicPartitionList::new();
        for partition in 0..i32::from(BUCKETS) {
            let Ok((low, high)) = consumer.fetch_watermarks(&topic, partition, TIMEOUT) else {
                // Give up early: every partition would take the full timeout.
                return 0;
            };
            if high > low {
                let offset = low + (rng.next() % (high - low) as u64) as i64;
                let _ = assigned.add_partition_offset(&topic, partition, Offset::Offset(offset));
            }
        }
        if consumer.assign(&assigned).is_err() {
            return 0;
        }
        let mut old = Vec::new();
        while old.len() < REPUBLISHED_MAX {
            let Some(Ok(message)) = consumer.poll(Duration::from_secs(2)) else {
                break;
            };
            old.push(message.detach());
        }
        old.sort_by_key(|_| rng.next());
        for message in &old {
            let record = BaseRecord::to(&topic)
                .partition(message.partition())
                .key(message.key().unwrap_or_default())
                .payload(message.payload().unwrap_or_default());
            let record = match message.headers() {
                Some(headers) => record.headers(headers.clone()),
                None => record,
            };
            let _ = producer.send(record);
        }
        let _ = producer.flush(TIMEOUT);
        producer.context().0.load(Ordering::Relaxed)
    }

    /// Number of members in a service's consumer group. A member that left is gone at once, one that fell
    /// silent after its session timeout.
    pub fn members_of(&self, service: &str) -> usize {
        let group = format!("{}.{service}", self.prefix);
        tokio::task::block_in_place(|| {
            let consumer: BaseConsumer = self.client().create().unwrap();
            let list = consumer.fetch_group_list(Some(&group), TIMEOUT).unwrap();
            let groups = list.groups().iter();
            groups.map(|group| group.members().len()).sum()
        })
    }

    /// The generation and the holder of a lease in the store; no holder if it was released.
    pub async fn lease(&self, name: &str) -> (i64, Option<String>) {
        let mut connection = sqlx::PgConnection::connect(&self.database).await.unwrap();
        sqlx::query_as("SELECT generation, holder FROM fences WHERE name = $1")
            .bind(name)
            .fetch_one(&mut connection)
            .await
            .unwrap()
    }

    /// Asserts that Kafka and the store have the same log, event for event.
    pub async fn assert_kafka_equals_store(&self) {
        let direct = self.direct();
        let compared = tokio::process::Command::new(env!("CARGO_BIN_EXE_penstock"))
            .args(["store", "compare", &direct.store, &direct.bus])
            .output()
            .await
            .unwrap();
        assert!(
            compared.status.success(),
            "{}{}",
            String::from_utf8_lossy(&compared.stdout),
            String::from_utf8_lossy(&compared.stderr)
        );
    }

    /// Whether the servers' disks can be filled.
    pub fn can_fill_disks(&self) -> bool {
        self.disk.is_mounted
    }

    /// As [`with_broker_down`](Self::with_broker_down).
    pub async fn with_full_disk(&self, duration: Duration) -> Instant {
        self.disk.fill();
        sleep(duration).await;
        self.disk.free();
        // PostgreSQL shuts down when it cannot write.
        self.restart_postgres().await
    }

    /// As [`with_broker_down`](Self::with_broker_down).
    pub async fn with_full_broker_disk(&self, broker: usize, duration: Duration) -> Instant {
        self.broker_disks[broker].fill();
        sleep(duration).await;
        self.broker_disks[broker].free();
        // A broker exits once it notices that its only disk has failed.
        let healed = Instant::now();
        tokio::task::block_in_place(|| self.kafka.restart(broker));
        healed
    }
}

/// The placement of each broker: its disk, and the ports of its proxies.
fn placements(
    proxies: &BTreeMap<&'static str, ProcessProxies>,
    disks: &[SmallDisk],
) -> Vec<BrokerPlacement> {
    let of = |(broker, disk): (usize, &SmallDisk)| BrokerPlacement {
        folder: disk.path.clone(),
        proxies: proxies
            .values()
            .map(|proxies| proxies.bus[broker].port)
            .collect(),
    };
    disks.iter().enumerate().map(of).collect()
}

/// A small file system that can be filled; a plain folder if `PENSTOCK_SKIP` names `disk`.
struct SmallDisk {
    path: PathBuf,
    is_mounted: bool,
    _folder: tempfile::TempDir,
}

impl SmallDisk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::create_dir(&path).unwrap();
        // The server may run as another user.
        for reachable in [folder.path(), &path] {
            let all = std::fs::Permissions::from_mode(0o777);
            std::fs::set_permissions(reachable, all).unwrap();
        }
        let is_mounted = !servers::is_skipped("disk");
        if is_mounted {
            let size = format!("size={DISK_MIB}m,mode=0777");
            let mounted = root_command("mount")
                .args(["-t", "tmpfs", "-o", &size, "penstock-faults"])
                .arg(&path)
                .status();
            assert!(
                mounted.is_ok_and(|status| status.success()),
                "a small disk for a server cannot be mounted: that needs root, or sudo without a password; PENSTOCK_SKIP=disk skips full disks"
            );
        }
        Self {
            path,
            is_mounted,
            _folder: folder,
        }
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// Fills the disk completely.
    fn fill(&self) {
        use std::io::Write;
        let mut filler = std::fs::File::create(self.filler()).unwrap();
        let chunk = vec![0; 1024 * 1024];
        while filler.write_all(&chunk).is_ok() {}
        while filler.write_all(&[0]).is_ok() {}
    }

    fn free(&self) {
        let _ = std::fs::remove_file(self.filler());
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if self.is_mounted {
            // Lazy: a server that is shutting down may still hold files.
            let _ = root_command("umount").arg("-l").arg(&self.path).status();
        }
    }
}

fn root_command(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.args(["-n", program]);
    command
}
