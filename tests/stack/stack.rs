//! The real servers under the cluster, and what faults do to them.

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
use servers::{Ground, Kafka, Postgres};
use sqlx::Connection as _;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::sleep;

use crate::cluster::{Role, Servers};
use crate::faults::Rng;
use crate::proxy::Proxy;
use crate::support::PATIENCE;

const TIMEOUT: Duration = Duration::from_secs(10);
/// Records that come again in one fault.
const AGAIN: usize = 20;
/// The disk of each server is this large, so that it can be filled.
const DISK_MIB: u64 = 1024;

/// Counts the records that the brokers confirmed.
#[derive(Default)]
struct Confirmed(AtomicUsize);

impl ClientContext for Confirmed {}

impl ProducerContext for Confirmed {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        self.0
            .fetch_add(usize::from(result.is_ok()), Ordering::Relaxed);
    }
}

/// How one process reaches the servers.
pub struct Ways {
    pub store: Proxy,
    /// One for each broker.
    pub bus: Vec<Proxy>,
}

/// Two clusters at once would starve each other on a small machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

pub struct Stack {
    pub kafka: Kafka,
    pub postgres: Postgres,
    prefix: String,
    database: String,
    ways: BTreeMap<&'static str, Ways>,
    disk: Disk,
    broker_disks: Vec<Disk>,
    _turn: MutexGuard<'static, ()>,
}

impl Stack {
    /// `None` only if a server is to be done without (`PENSTOCK_SKIP`).
    pub async fn start(brokers: usize, members: &[(&'static str, Role)]) -> Option<Self> {
        let turn = ONE_AT_A_TIME.lock().await;
        let mut ways = BTreeMap::new();
        for (name, _) in members {
            let mut bus = Vec::new();
            for _ in 0..brokers {
                bus.push(Proxy::bind().await);
            }
            let store = Proxy::bind().await;
            ways.insert(*name, Ways { store, bus });
        }
        let disk = Disk::new();
        let broker_disks: Vec<Disk> = (0..brokers).map(|_| Disk::new()).collect();
        let (folder, grounds) = (disk.path.clone(), grounds(&ways, &broker_disks));
        let started = tokio::task::spawn_blocking(move || {
            let postgres = Postgres::start_in(&folder)?;
            let database = postgres.database();
            let kafka = Kafka::start_on(&grounds)?;
            Some((kafka, postgres, database))
        });
        let (kafka, postgres, database) = started.await.unwrap()?;
        for (index, ways) in ways.values().enumerate() {
            ways.store.lead_to(postgres.port());
            for (broker, proxy) in ways.bus.iter().enumerate() {
                proxy.lead_to(kafka.port_behind(broker, index));
            }
        }
        Some(Self {
            prefix: kafka.prefix(),
            kafka,
            postgres,
            database,
            ways,
            disk,
            broker_disks,
            _turn: turn,
        })
    }

    /// The way that one process takes: through its own proxies.
    pub fn servers_of(&self, name: &str) -> Servers {
        let ways = &self.ways[name];
        let direct = format!(":{}/", self.postgres.port());
        let store = self
            .database
            .replace(&direct, &format!(":{}/", ways.store.port));
        let brokers = ways.bus.iter();
        let brokers = brokers.map(|proxy| format!("127.0.0.1:{}", proxy.port));
        Servers {
            store,
            bus: format!(
                "kafka://{}/{}",
                brokers.collect::<Vec<_>>().join(","),
                self.prefix
            ),
        }
    }

    /// The servers themselves, past all proxies.
    pub fn direct(&self) -> Servers {
        Servers {
            store: self.database.clone(),
            bus: self.kafka.url(&self.prefix),
        }
    }

    pub fn ways_of(&self, name: &str) -> &Ways {
        &self.ways[name]
    }

    /// Returns when it is up again, and the moment at which it was started.
    pub async fn with_broker_down(&self, broker: usize, held: Duration) -> Instant {
        self.kafka.kill(broker);
        sleep(held).await;
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
            // Brokers have the ids 1, 2, 3. One that is being elected is not known.
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

    /// Publishes some old records again, in another order, byte for byte; as soon as the brokers let
    /// it, for they may be away. Returns how many were: one at least.
    pub async fn publish_again(&self, seed: u64) -> usize {
        let began = Instant::now();
        loop {
            let confirmed = tokio::task::block_in_place(|| self.try_to_publish_again(seed));
            if confirmed > 0 {
                return confirmed;
            }
            // A broker that was killed takes its time on a busy machine.
            assert!(
                began.elapsed() < PATIENCE * 3,
                "no record can be published again"
            );
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn try_to_publish_again(&self, seed: u64) -> usize {
        let topic = format!("{}.events", self.prefix);
        let mut rng = Rng(seed);
        let consumer: BaseConsumer = self.client().create().unwrap();
        let producer: BaseProducer<Confirmed> = self
            .client()
            .create_with_context(Confirmed::default())
            .unwrap();
        let mut assigned = TopicPartitionList::new();
        for partition in 0..i32::from(BUCKETS) {
            let Ok((low, high)) = consumer.fetch_watermarks(&topic, partition, TIMEOUT) else {
                // Not once for each partition: each would take as long.
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
        while old.len() < AGAIN {
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

    /// How many processes are members of a service's group. One that said goodbye is none any more,
    /// one that fell silent is until its session has timed out.
    pub fn members_of(&self, service: &str) -> usize {
        let group = format!("{}.{service}", self.prefix);
        tokio::task::block_in_place(|| {
            let consumer: BaseConsumer = self.client().create().unwrap();
            let list = consumer.fetch_group_list(Some(&group), TIMEOUT).unwrap();
            let groups = list.groups().iter();
            groups.map(|group| group.members().len()).sum()
        })
    }

    /// The generation of a lease in the store, and who holds it: nobody, if it was given back.
    pub async fn lease(&self, name: &str) -> (i64, Option<String>) {
        let mut connection = sqlx::PgConnection::connect(&self.database).await.unwrap();
        sqlx::query_as("SELECT generation, holder FROM fences WHERE name = $1")
            .bind(name)
            .fetch_one(&mut connection)
            .await
            .unwrap()
    }

    /// The log as Kafka has it and as the store has it are the same, event for event.
    pub async fn both_sides_are_equal(&self) {
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

    /// Whether the disks of servers can be filled.
    pub fn can_be_full(&self) -> bool {
        self.disk.small
    }

    /// As [`with_broker_down`](Self::with_broker_down).
    pub async fn with_full_disk(&self, held: Duration) -> Instant {
        self.disk.fill();
        sleep(held).await;
        self.disk.free();
        // Where nothing can be written PostgreSQL gives up.
        self.restart_postgres().await
    }

    /// As [`with_broker_down`](Self::with_broker_down).
    pub async fn with_full_broker_disk(&self, broker: usize, held: Duration) -> Instant {
        self.broker_disks[broker].fill();
        sleep(held).await;
        self.broker_disks[broker].free();
        // A broker whose only disk has failed it ends, as soon as it has noticed.
        let healed = Instant::now();
        tokio::task::block_in_place(|| self.kafka.restart(broker));
        healed
    }
}

/// By broker, its disk, and the ports under which it is known to each process.
fn grounds(ways: &BTreeMap<&'static str, Ways>, disks: &[Disk]) -> Vec<Ground> {
    let of = |(broker, disk): (usize, &Disk)| Ground {
        folder: disk.path.clone(),
        proxies: ways.values().map(|ways| ways.bus[broker].port).collect(),
    };
    disks.iter().enumerate().map(of).collect()
}

/// A small file system of its own, which can be full; a plain folder where that is to be done without.
struct Disk {
    path: PathBuf,
    small: bool,
    _folder: tempfile::TempDir,
}

impl Disk {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::create_dir(&path).unwrap();
        // The server may run as a user of its own.
        for reachable in [folder.path(), &path] {
            let all = std::fs::Permissions::from_mode(0o777);
            std::fs::set_permissions(reachable, all).unwrap();
        }
        let small = !servers::skipped("disk");
        if small {
            let size = format!("size={DISK_MIB}m,mode=0777");
            let mounted = as_root("mount")
                .args(["-t", "tmpfs", "-o", &size, "penstock-faults"])
                .arg(&path)
                .status();
            assert!(
                mounted.is_ok_and(|status| status.success()),
                "a small disk for a server cannot be mounted: that needs root, or sudo without a password; PENSTOCK_SKIP=disk leaves full disks out"
            );
        }
        Self {
            path,
            small,
            _folder: folder,
        }
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }

    /// Until not one more byte fits.
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

impl Drop for Disk {
    fn drop(&mut self) {
        if self.small {
            // Lazily: a server that is on its way out may still hold files.
            let _ = as_root("umount").arg("-l").arg(&self.path).status();
        }
    }
}

fn as_root(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("sudo");
    command.args(["-n", program]);
    command
}
