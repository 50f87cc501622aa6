//! Monitors the connection: has the topics created and checked as soon as a broker answers, and
//! maintains the sentence that readiness shows.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use contract::time::Timestamp;
use rdkafka::admin::AdminClient;
use rdkafka::config::FromClientConfigAndContext;
use tokio::sync::watch;

use super::topics::TopicsError;
use super::{LogContext, Shared, TopicsState, client_error, diagnosis, lock, reader};
use crate::BusError;

const CHECK_INTERVAL: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(200);
const METADATA_TIMEOUT: Duration = Duration::from_secs(3);

/// Returns the body of the monitor thread, which opens the gate once the topics are ready.
pub(super) fn watch(
    shared: Arc<Shared>,
    gate: watch::Sender<TopicsState>,
) -> Result<impl FnOnce() + Send + 'static, BusError> {
    let config = shared.config.client("health");
    let admin = AdminClient::from_config_and_context(&config, LogContext).map_err(client_error)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .map_err(client_error)?;
    Ok(move || {
        let mut reporter = ProblemReporter {
            shared: &shared,
            since: None,
        };
        while !shared.is_stopping() {
            match runtime.block_on(shared.topics.ensure(&shared.config, &admin)) {
                Ok(warning) => {
                    if let Some(warning) = &warning {
                        tracing::warn!(warning, "Kafka may lose events");
                    }
                    *lock(&shared.warning) = warning;
                    break;
                }
                Err(TopicsError::Fatal(why)) => {
                    reporter.set(&why);
                    gate.send_replace(TopicsState::Refused(why));
                    return;
                }
                Err(TopicsError::Retryable(why)) => {
                    reporter.set(&format!("Kafka at {}: {why}", shared.config.brokers));
                    shared.pause(RETRY_INTERVAL);
                }
            }
        }
        // The leader of a new partition may not know of it yet.
        while !shared.is_stopping() {
            let Err(error) = reader::check_partitions(&shared) else {
                break;
            };
            reporter.set(&format!("Kafka at {}: {error}", shared.config.brokers));
            shared.pause(RETRY_INTERVAL);
        }
        reporter.clear();
        gate.send_replace(TopicsState::Open);
        while !shared.is_stopping() {
            match check(&shared, &admin) {
                Ok(()) => reporter.clear(),
                Err(why) => reporter.set(&why),
            }
            shared.pause(CHECK_INTERVAL);
        }
    })
}

/// Checks that a broker answers and that every partition of the log has a leader.
fn check(shared: &Shared, admin: &AdminClient<LogContext>) -> Result<(), String> {
    let topic = &shared.topics.events;
    let metadata = admin
        .inner()
        .fetch_metadata(Some(topic), METADATA_TIMEOUT)
        .map_err(|error| {
            format!(
                "Kafka at {}: {}",
                shared.config.brokers,
                diagnosis::describe(&shared.config, &error)
            )
        })?;
    let topics = metadata.topics().iter();
    let partitions = topics.flat_map(|topic| topic.partitions());
    let leaderless = partitions
        .filter(|partition| partition.leader() < 0)
        .count();
    if leaderless > 0 {
        return Err(format!(
            "{leaderless} partitions of Kafka topic {topic} have no leader: too few of its brokers are up"
        ));
    }
    Ok(())
}

struct ProblemReporter<'a> {
    shared: &'a Shared,
    since: Option<Timestamp>,
}

impl ProblemReporter<'_> {
    fn set(&mut self, why: &str) {
        let since = *self.since.get_or_insert_with(|| {
            tracing::warn!(problem = why, "Kafka unavailable");
            now()
        });
        *lock(&self.shared.problem) = Some(format!("{why}, since {since}"));
    }

    fn clear(&mut self) {
        if self.since.take().is_some() {
            let brokers = &self.shared.config.brokers;
            tracing::info!(brokers, "Kafka available");
        }
        *lock(&self.shared.problem) = None;
    }
}

/// The wall clock, for display only.
#[expect(
    clippy::disallowed_methods,
    reason = "for display only; no result depends on it"
)]
fn now() -> Timestamp {
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH);
    Timestamp::from_millis(elapsed.map_or(0, |elapsed| elapsed.as_millis() as i64))
}
