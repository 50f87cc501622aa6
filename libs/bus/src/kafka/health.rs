//! Watches over the connection: has the topics made and checked as soon as a broker answers, and
//! keeps the sentence that readiness shows.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::time::Timestamp;
use rdkafka::admin::AdminClient;
use rdkafka::config::FromClientConfigAndContext;
use tokio::sync::watch;

use super::topics::NotReady;
use super::{Gate, Quiet, Shared, lock, no_client, reader, reason};
use crate::BusError;

const ASK_EVERY: Duration = Duration::from_secs(1);
const RETRY_AFTER: Duration = Duration::from_millis(200);
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

/// The work of a thread; it opens the gate once the topics are right.
pub(super) fn watch(
    shared: Arc<Shared>,
    gate: watch::Sender<Gate>,
) -> Result<impl FnOnce() + Send + 'static, BusError> {
    let config = shared.config.client("health");
    let admin = AdminClient::from_config_and_context(&config, Quiet).map_err(no_client)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(no_client)?;
    Ok(move || {
        let mut trouble = Trouble {
            shared: &shared,
            since: None,
        };
        while !shared.stopping() {
            match runtime.block_on(shared.topics.ensure(&shared.config, &admin)) {
                Ok(remark) => {
                    if let Some(remark) = &remark {
                        tracing::warn!("{remark}");
                    }
                    *lock(&shared.remark) = remark;
                    break;
                }
                Err(NotReady::Ever(why)) => {
                    trouble.is(&why);
                    gate.send_replace(Gate::Refused(why));
                    return;
                }
                Err(NotReady::Yet(why)) => {
                    trouble.is(&format!("Kafka at {}: {why}", shared.config.brokers));
                    shared.pause(RETRY_AFTER);
                }
            }
        }
        // A broker that leads a new partition may not know it yet.
        while !shared.stopping() {
            let Err(error) = reader::all_answer(&shared) else {
                break;
            };
            trouble.is(&format!("Kafka at {}: {error}", shared.config.brokers));
            shared.pause(RETRY_AFTER);
        }
        trouble.is_over();
        gate.send_replace(Gate::Open);
        while !shared.stopping() {
            match ask(&shared, &admin) {
                Ok(()) => trouble.is_over(),
                Err(why) => trouble.is(&why),
            }
            shared.pause(ASK_EVERY);
        }
    })
}

/// Whether a broker answers, and every partition of the log can be written.
fn ask(shared: &Shared, admin: &AdminClient<Quiet>) -> Result<(), String> {
    let topic = &shared.topics.events;
    let metadata = admin
        .inner()
        .fetch_metadata(Some(topic), ANSWER_PATIENCE)
        .map_err(|error| {
            format!(
                "Kafka at {}: {}",
                shared.config.brokers,
                reason::why(&shared.config, &error)
            )
        })?;
    let topics = metadata.topics().iter();
    let partitions = topics.flat_map(|topic| topic.partitions());
    let headless = partitions
        .filter(|partition| partition.leader() < 0)
        .count();
    if headless > 0 {
        return Err(format!(
            "{headless} partitions of Kafka topic {topic} have no leader: too few of its brokers are up"
        ));
    }
    Ok(())
}

struct Trouble<'a> {
    shared: &'a Shared,
    since: Option<Timestamp>,
}

impl Trouble<'_> {
    fn is(&mut self, why: &str) {
        let since = *self.since.get_or_insert_with(|| {
            tracing::warn!("{why}");
            now()
        });
        *lock(&self.shared.trouble) = Some(format!("{why}, since {since}"));
    }

    fn is_over(&mut self) {
        if self.since.take().is_some() {
            tracing::info!("Kafka at {} answers", self.shared.config.brokers);
        }
        *lock(&self.shared.trouble) = None;
    }
}

/// For people to read; no result depends on it.
#[expect(
    clippy::disallowed_methods,
    reason = "people read it, and no result depends on it"
)]
fn now() -> Timestamp {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
    Timestamp::from_millis(elapsed.map_or(0, |elapsed| elapsed.as_millis() as i64))
}
