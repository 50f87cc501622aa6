//! The four topics: created if missing, checked if they exist. A topic that would lose events or
//! partition buckets differently is refused, never altered.

use std::time::Duration;

use contract::ids::{BUCKETS, Bucket};
use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

use super::{KafkaConfig, LogContext, diagnosis};

const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// With at least this many brokers, topics get this many replicas, two of which must confirm. More
/// only if the brokers' `default.replication.factor` says so.
const REPLICATION_FACTOR: usize = 3;

/// Every consumer reads all frames, so they need no partition per bucket; and each partition is a
/// separate request to the broker, which handles a producer's requests one at a time. The 64 frames
/// of a second must not queue for as long as a decision may take.
pub(super) const FRAME_PARTITIONS: u16 = 8;

const FRAME_RETENTION_MS: &str = "21600000";

/// Fits a frame of a bucket with many busy endpoints, or the route of an endpoint with many
/// instances. The topic's limit and the producer's must be equal, or messages in between are lost.
pub(super) const LARGE_MESSAGE_BYTES: &str = "8388608";

/// Names of the topics, derived from the prefix.
#[derive(Clone, Debug)]
pub struct Topics {
    /// Records of endpoints, a partition for each bucket.
    pub events: String,
    /// Records that belong to no endpoint; one partition.
    pub global: String,
    /// Frames, several buckets to a partition; retained for some hours.
    pub frames: String,
    /// Routes, compacted to the newest of each endpoint.
    pub routes: String,
}

/// Why the topics are not ready.
#[derive(Debug)]
pub(super) enum TopicsError {
    /// Retrying may help.
    Retryable(String),
    Fatal(String),
}

struct TopicSpec<'a> {
    name: &'a str,
    partitions: usize,
    settings: &'static [(&'static str, &'static str)],
    /// Settings without which the topic must not be used. A size may be larger.
    required: &'static [(&'static str, &'static str)],
}

const KEEP_FOREVER: &[(&str, &str)] = &[
    ("retention.ms", "-1"),
    ("retention.bytes", "-1"),
    ("cleanup.policy", "delete"),
];

impl Topics {
    pub(super) fn new(prefix: &str) -> Self {
        let topic = |name| format!("{prefix}.{name}");
        Self {
            events: topic("events"),
            global: topic("global"),
            frames: topic("frames"),
            routes: topic("routes"),
        }
    }

    /// Topic and partition of a bucket's records.
    pub(super) fn records_partition(&self, bucket: Bucket) -> (&str, i32) {
        if bucket == Bucket::GLOBAL {
            return (&self.global, 0);
        }
        (&self.events, i32::from(bucket.0))
    }

    /// Topic and partition of a bucket's frames.
    pub(super) fn frames_partition(&self, bucket: Bucket) -> (&str, i32) {
        (&self.frames, i32::from(bucket.0 % FRAME_PARTITIONS))
    }

    fn specs(&self) -> [TopicSpec<'_>; 4] {
        let buckets = usize::from(BUCKETS);
        [
            TopicSpec {
                name: &self.events,
                partitions: buckets,
                settings: KEEP_FOREVER,
                required: KEEP_FOREVER,
            },
            TopicSpec {
                name: &self.global,
                partitions: 1,
                settings: KEEP_FOREVER,
                required: KEEP_FOREVER,
            },
            TopicSpec {
                name: &self.frames,
                partitions: usize::from(FRAME_PARTITIONS),
                settings: &[
                    ("retention.ms", FRAME_RETENTION_MS),
                    ("segment.ms", "3600000"),
                    ("cleanup.policy", "delete"),
                    ("max.message.bytes", LARGE_MESSAGE_BYTES),
                ],
                required: &[("max.message.bytes", LARGE_MESSAGE_BYTES)],
            },
            TopicSpec {
                name: &self.routes,
                partitions: buckets,
                settings: &[
                    ("cleanup.policy", "compact"),
                    ("segment.ms", "600000"),
                    ("max.message.bytes", LARGE_MESSAGE_BYTES),
                ],
                required: &[
                    ("cleanup.policy", "compact"),
                    ("max.message.bytes", LARGE_MESSAGE_BYTES),
                ],
            },
        ]
    }

    /// Creates and checks the topics; returns a warning for operators, if there is one. Safe to run
    /// concurrently from many processes, and repeatedly.
    pub(super) async fn ensure(
        &self,
        config: &KafkaConfig,
        admin: &AdminClient<LogContext>,
    ) -> Result<Option<String>, TopicsError> {
        let (brokers, existing) = list_topics(config, admin)?;
        let specs = self.specs();
        let missing: Vec<&TopicSpec> = specs
            .iter()
            .filter(|topic| !existing.iter().any(|found| found.name == topic.name))
            .collect();
        if !missing.is_empty() {
            let replicas = replication_factor(admin, &brokers).await?;
            create(admin, replicas, &missing).await?;
            // The broker asked next may not know of them yet.
            return Err(TopicsError::Retryable(
                "topics have just been created".to_owned(),
            ));
        }
        for topic in &specs {
            let found = existing.iter().find(|found| found.name == topic.name);
            let partitions = found.map_or(0, |found| found.partitions);
            if partitions != topic.partitions {
                return Err(TopicsError::Fatal(format!(
                    "Kafka topic {} has {partitions} partitions and needs {}: records would be in the \
                     wrong partition. Use another prefix in --bus, or delete the topic and republish \
                     it from the store",
                    topic.name, topic.partitions
                )));
            }
        }
        let single_ack = check_settings(admin, &specs).await?;
        let kept = [&self.events, &self.global];
        let kept = existing.iter().filter(|found| kept.contains(&&found.name));
        let replicas = kept.map(|found| found.replicas).min().unwrap_or_default();
        Ok(self.replication_warning(brokers.len(), replicas, single_ack))
    }

    /// Topics created while there were fewer brokers have fewer replicas. That works until a broker
    /// is lost.
    fn replication_warning(
        &self,
        brokers: usize,
        replicas: usize,
        single_ack: bool,
    ) -> Option<String> {
        let expected = brokers.min(REPLICATION_FACTOR);
        let Self { events, global, .. } = self;
        if replicas < expected {
            return Some(format!(
                "Kafka topics {events} and {global} have {replicas} of the {expected} replicas that \
                 {brokers} brokers allow, since there were fewer when they were created: losing a broker \
                 loses events. Add replicas with kafka-reassign-partitions.sh, then require two to confirm, with \
                 kafka-configs.sh --alter --entity-type topics --entity-name {events} --add-config \
                 min.insync.replicas=2, and the same for {global}"
            ));
        }
        if expected == REPLICATION_FACTOR && single_ack {
            return Some(format!(
                "Kafka topics {events} and {global} have {replicas} replicas, and one is enough to confirm \
                 an event: losing a broker may lose the latest events. Require two to confirm, with \
                 kafka-configs.sh --alter --entity-type topics --entity-name {events} --add-config \
                 min.insync.replicas=2, and the same for {global}"
            ));
        }
        None
    }
}

/// An existing topic.
struct ExistingTopic {
    name: String,
    partitions: usize,
    /// Of the partition with the fewest.
    replicas: usize,
}

type Brokers = Vec<i32>;

/// Lists the brokers and all topics.
fn list_topics(
    config: &KafkaConfig,
    admin: &AdminClient<LogContext>,
) -> Result<(Brokers, Vec<ExistingTopic>), TopicsError> {
    let metadata = admin
        .inner()
        .fetch_metadata(None, REQUEST_TIMEOUT)
        .map_err(|error| TopicsError::Retryable(diagnosis::describe(config, &error)))?;
    let topics = metadata.topics().iter();
    let topics = topics.map(|topic| {
        let replicas = topic.partitions().iter().map(|one| one.replicas().len());
        ExistingTopic {
            name: topic.name().to_owned(),
            partitions: topic.partitions().len(),
            replicas: replicas.min().unwrap_or_default(),
        }
    });
    let brokers = metadata.brokers().iter().map(|broker| broker.id());
    Ok((brokers.collect(), topics.collect()))
}

fn admin_options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(REQUEST_TIMEOUT))
        .operation_timeout(Some(REQUEST_TIMEOUT))
}

/// How many replicas new topics get. A broker that is down at the moment must not reduce it, so the
/// brokers' configuration counts too.
async fn replication_factor(
    admin: &AdminClient<LogContext>,
    brokers: &[i32],
) -> Result<usize, TopicsError> {
    let Some(broker) = brokers.first() else {
        return Err(TopicsError::Retryable("there is no broker".to_owned()));
    };
    let resource = ResourceSpecifier::Broker(*broker);
    let described = admin.describe_configs([&resource], &admin_options()).await;
    let described = described
        .map_err(|error| retryable("the configuration of brokers cannot be read", &error))?;
    let configured = described.first().and_then(|described| {
        let entry = described.as_ref().ok()?.get("default.replication.factor")?;
        entry.value.as_deref()?.parse().ok()
    });
    let replicas = brokers
        .len()
        .clamp(1, REPLICATION_FACTOR)
        .max(configured.unwrap_or(1));
    if brokers.len() < replicas {
        return Err(TopicsError::Retryable(format!(
            "topics need {replicas} replicas, and only {} brokers answer",
            brokers.len()
        )));
    }
    Ok(replicas)
}

async fn create(
    admin: &AdminClient<LogContext>,
    replicas: usize,
    missing: &[&TopicSpec<'_>],
) -> Result<(), TopicsError> {
    let min_insync = if replicas >= REPLICATION_FACTOR {
        "2"
    } else {
        "1"
    };
    let topics: Vec<NewTopic> = missing
        .iter()
        .map(|topic| {
            let replication = TopicReplication::Fixed(replicas as i32);
            let new = NewTopic::new(topic.name, topic.partitions as i32, replication);
            let new = new.set("min.insync.replicas", min_insync);
            let settings = topic.settings.iter();
            settings.fold(new, |new, (name, value)| new.set(name, value))
        })
        .collect();
    let results = admin.create_topics(&topics, &admin_options()).await;
    let results = results.map_err(|error| retryable("topics cannot be created", &error))?;
    for result in results {
        match result {
            Ok(name) => tracing::info!(topic = name, replicas, "created a Kafka topic"),
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                return Err(TopicsError::Retryable(format!(
                    "Kafka topic {name} cannot be created: {code}"
                )));
            }
        }
    }
    Ok(())
}

/// Checks the settings; returns whether one replica is enough to confirm an event.
async fn check_settings(
    admin: &AdminClient<LogContext>,
    specs: &[TopicSpec<'_>],
) -> Result<bool, TopicsError> {
    let mut single_ack = false;
    let resources: Vec<ResourceSpecifier> = specs
        .iter()
        .map(|topic| ResourceSpecifier::Topic(topic.name))
        .collect();
    let described = admin.describe_configs(&resources, &admin_options()).await;
    let described = described
        .map_err(|error| retryable("the configuration of topics cannot be read", &error))?;
    for (topic, resource) in specs.iter().zip(described) {
        let resource = resource.map_err(|code| {
            TopicsError::Retryable(format!(
                "the configuration of Kafka topic {} cannot be read: {code}",
                topic.name
            ))
        })?;
        check_topic(topic, &resource)?;
        let min_insync = resource.get("min.insync.replicas");
        let min_insync = min_insync.and_then(|entry| entry.value.as_deref());
        single_ack |= topic.required == KEEP_FOREVER && min_insync == Some("1");
    }
    Ok(single_ack)
}

fn check_topic(topic: &TopicSpec<'_>, resource: &ConfigResource) -> Result<(), TopicsError> {
    if resource.entries.is_empty() {
        // The answer of a broker that does not know of the topic yet.
        let why = format!("Kafka topic {} has no settings yet", topic.name);
        return Err(TopicsError::Retryable(why));
    }
    for (name, required) in topic.required {
        let found = resource.get(name).and_then(|entry| entry.value.as_deref());
        if !found.is_some_and(|found| satisfies(found, required)) {
            return Err(TopicsError::Fatal(format!(
                "Kafka topic {} has {name}={} and needs {required}, or it would lose data that must be \
                 kept. Set it with kafka-configs.sh --alter --entity-type topics --entity-name {} \
                 --add-config {name}={required}",
                topic.name,
                found.unwrap_or("nothing"),
                topic.name
            )));
        }
    }
    Ok(())
}

fn satisfies(found: &str, required: &str) -> bool {
    match (found.parse::<u64>(), required.parse::<u64>()) {
        (Ok(found), Ok(required)) => found >= required,
        _ => found == required,
    }
}

fn retryable(what: &str, error: &KafkaError) -> TopicsError {
    TopicsError::Retryable(format!("{what} ({error})"))
}

#[cfg(test)]
mod tests {
    use rdkafka::admin::{ConfigEntry, ConfigSource, OwnedResourceSpecifier};

    use super::*;

    fn settings(retention_ms: Option<&str>) -> ConfigResource {
        let entry = |value: &str| ConfigEntry {
            name: "retention.ms".to_owned(),
            value: Some(value.to_owned()),
            source: ConfigSource::DynamicTopic,
            is_read_only: false,
            is_default: false,
            is_sensitive: false,
        };
        ConfigResource {
            specifier: OwnedResourceSpecifier::Topic("p.global".to_owned()),
            entries: retention_ms.map(entry).into_iter().collect(),
        }
    }

    const SPEC: TopicSpec<'_> = TopicSpec {
        name: "p.global",
        partitions: 1,
        settings: &[],
        required: &[("retention.ms", "-1")],
    };

    #[test]
    fn a_topic_unknown_to_the_broker_is_checked_again() {
        let refused = check_topic(&SPEC, &settings(None));
        assert!(
            matches!(refused, Err(TopicsError::Retryable(_))),
            "{refused:?}"
        );
    }

    #[test]
    fn a_size_may_be_larger_than_required_but_not_smaller() {
        assert!(satisfies("9000000", "8388608") && satisfies("8388608", "8388608"));
        assert!(!satisfies("1048588", "8388608"));
    }

    #[test]
    fn a_topic_with_limited_retention_is_refused() {
        let refused = check_topic(&SPEC, &settings(Some("1000")));
        assert!(matches!(refused, Err(TopicsError::Fatal(_))), "{refused:?}");
        assert!(check_topic(&SPEC, &settings(Some("-1"))).is_ok());
    }
}
