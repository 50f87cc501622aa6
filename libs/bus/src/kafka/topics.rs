//! The four topics: made where they are missing, checked where they exist. A topic that would lose
//! events or spread buckets differently is refused, never altered.

use std::time::Duration;

use contract::ids::{BUCKETS, Bucket};
use rdkafka::admin::{
    AdminClient, AdminOptions, ConfigResource, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::error::KafkaError;
use rdkafka::types::RDKafkaErrorCode;

use super::{KafkaConfig, Quiet, reason};

const REQUEST_PATIENCE: Duration = Duration::from_secs(5);

/// With this many brokers there are as many copies, and two of them confirm. More only if the brokers'
/// own `default.replication.factor` says so.
const COPIES: usize = 3;

/// Everybody reads all frames, so they need no partition for each bucket; and each partition is a
/// request of its own to the broker, which takes those of a producer one after the other. The 64
/// frames of a second must not stand in line for as long as a decision may take.
pub(super) const FRAME_PARTITIONS: u16 = 8;

const FRAMES_KEPT_MS: &str = "21600000";

/// A frame of a bucket with many busy endpoints, or the route of an endpoint with many instances. What
/// a topic takes and what a producer sends are the same, or messages in between are lost.
pub(super) const LARGE_MESSAGE_BYTES: &str = "8388608";

/// Names of the topics, made of the prefix.
#[derive(Clone, Debug)]
pub struct Topics {
    /// Records of endpoints, a partition for each bucket.
    pub events: String,
    /// Records that belong to no endpoint; one partition.
    pub global: String,
    /// Frames, a partition for each bucket; kept for a while.
    pub frames: String,
    /// Routes, compacted: the newest of each endpoint stays.
    pub routes: String,
}

/// Why the topics are not as they should be.
#[derive(Debug)]
pub(super) enum NotReady {
    /// Trying again may help.
    Yet(String),
    Ever(String),
}

struct Wanted<'a> {
    name: &'a str,
    partitions: usize,
    settings: &'static [(&'static str, &'static str)],
    /// Settings without which it must not be used. A size may be larger.
    needed: &'static [(&'static str, &'static str)],
}

const KEPT_FOR_EVER: &[(&str, &str)] = &[
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
    pub(super) fn of_records(&self, bucket: Bucket) -> (&str, i32) {
        if bucket == Bucket::GLOBAL {
            return (&self.global, 0);
        }
        (&self.events, i32::from(bucket.0))
    }

    /// Topic and partition of a bucket's frames.
    pub(super) fn of_frames(&self, bucket: Bucket) -> (&str, i32) {
        (&self.frames, i32::from(bucket.0 % FRAME_PARTITIONS))
    }

    fn wanted(&self) -> [Wanted<'_>; 4] {
        let buckets = usize::from(BUCKETS);
        [
            Wanted {
                name: &self.events,
                partitions: buckets,
                settings: KEPT_FOR_EVER,
                needed: KEPT_FOR_EVER,
            },
            Wanted {
                name: &self.global,
                partitions: 1,
                settings: KEPT_FOR_EVER,
                needed: KEPT_FOR_EVER,
            },
            Wanted {
                name: &self.frames,
                partitions: usize::from(FRAME_PARTITIONS),
                settings: &[
                    ("retention.ms", FRAMES_KEPT_MS),
                    ("segment.ms", "3600000"),
                    ("cleanup.policy", "delete"),
                    ("max.message.bytes", LARGE_MESSAGE_BYTES),
                ],
                needed: &[("max.message.bytes", LARGE_MESSAGE_BYTES)],
            },
            Wanted {
                name: &self.routes,
                partitions: buckets,
                settings: &[
                    ("cleanup.policy", "compact"),
                    ("segment.ms", "600000"),
                    ("max.message.bytes", LARGE_MESSAGE_BYTES),
                ],
                needed: &[
                    ("cleanup.policy", "compact"),
                    ("max.message.bytes", LARGE_MESSAGE_BYTES),
                ],
            },
        ]
    }

    /// Safe to run from many processes at once, and again.
    pub(super) async fn ensure(
        &self,
        config: &KafkaConfig,
        admin: &AdminClient<Quiet>,
    ) -> Result<Option<String>, NotReady> {
        let (brokers, existing) = list(config, admin)?;
        let wanted = self.wanted();
        let missing: Vec<&Wanted> = wanted
            .iter()
            .filter(|topic| !existing.iter().any(|found| found.name == topic.name))
            .collect();
        if !missing.is_empty() {
            let copies = copies(admin, &brokers).await?;
            create(admin, copies, &missing).await?;
            // The broker that is asked next may not have heard of them.
            return Err(NotReady::Yet("topics have just been made".to_owned()));
        }
        for topic in &wanted {
            let found = existing.iter().find(|found| found.name == topic.name);
            let partitions = found.map_or(0, |found| found.partitions);
            if partitions != topic.partitions {
                return Err(NotReady::Ever(format!(
                    "Kafka topic {} has {partitions} partitions and needs {}: records would lie in \
                     the wrong place. Use another prefix in --bus, or remove the topic and rebuild \
                     it from the store",
                    topic.name, topic.partitions
                )));
            }
        }
        let confirmed_by_one = check_settings(admin, &wanted).await?;
        let kept = [&self.events, &self.global];
        let kept = existing.iter().filter(|found| kept.contains(&&found.name));
        let copies = kept.map(|found| found.copies).min().unwrap_or_default();
        Ok(self.too_few(brokers.len(), copies, confirmed_by_one))
    }

    /// Made while there were fewer brokers, topics keep fewer copies. It works, until one is lost.
    fn too_few(&self, brokers: usize, copies: usize, confirmed_by_one: bool) -> Option<String> {
        let wanted = brokers.min(COPIES);
        let Self { events, global, .. } = self;
        if copies < wanted {
            return Some(format!(
                "Kafka topics {events} and {global} have {copies} of the {wanted} copies that {brokers} \
                 brokers allow, since there were fewer when they were made: who loses a broker loses \
                 events. Add copies with kafka-reassign-partitions.sh, and then have two confirm, with \
                 kafka-configs.sh --alter --entity-type topics --entity-name {events} --add-config \
                 min.insync.replicas=2, and the same for {global}"
            ));
        }
        if wanted == COPIES && confirmed_by_one {
            return Some(format!(
                "Kafka topics {events} and {global} have {copies} copies, and one is enough to confirm an \
                 event: who loses a broker may lose the last ones. Have two confirm, with \
                 kafka-configs.sh --alter --entity-type topics --entity-name {events} --add-config \
                 min.insync.replicas=2, and the same for {global}"
            ));
        }
        None
    }
}

/// A topic that is there.
struct Found {
    name: String,
    partitions: usize,
    /// Of the partition that has the fewest.
    copies: usize,
}

type Brokers = Vec<i32>;

/// The brokers that are there, and every topic.
fn list(
    config: &KafkaConfig,
    admin: &AdminClient<Quiet>,
) -> Result<(Brokers, Vec<Found>), NotReady> {
    let metadata = admin
        .inner()
        .fetch_metadata(None, REQUEST_PATIENCE)
        .map_err(|error| NotReady::Yet(reason::why(config, &error)))?;
    let topics = metadata.topics().iter();
    let topics = topics.map(|topic| {
        let copies = topic.partitions().iter().map(|one| one.replicas().len());
        Found {
            name: topic.name().to_owned(),
            partitions: topic.partitions().len(),
            copies: copies.min().unwrap_or_default(),
        }
    });
    let brokers = metadata.brokers().iter().map(|broker| broker.id());
    Ok((brokers.collect(), topics.collect()))
}

fn options() -> AdminOptions {
    AdminOptions::new()
        .request_timeout(Some(REQUEST_PATIENCE))
        .operation_timeout(Some(REQUEST_PATIENCE))
}

/// How many copies new topics get. A broker that is away just now must not make it fewer, so what the
/// brokers are configured for counts too.
async fn copies(admin: &AdminClient<Quiet>, brokers: &[i32]) -> Result<usize, NotReady> {
    let Some(broker) = brokers.first() else {
        return Err(NotReady::Yet("no broker is there".to_owned()));
    };
    let resource = ResourceSpecifier::Broker(*broker);
    let described = admin.describe_configs([&resource], &options()).await;
    let described = described.map_err(|error| not_yet("brokers cannot be examined", &error))?;
    let configured = described.first().and_then(|described| {
        let entry = described.as_ref().ok()?.get("default.replication.factor")?;
        entry.value.as_deref()?.parse().ok()
    });
    let copies = brokers.len().clamp(1, COPIES).max(configured.unwrap_or(1));
    if brokers.len() < copies {
        return Err(NotReady::Yet(format!(
            "topics are to have {copies} copies and only {} of so many brokers answer",
            brokers.len()
        )));
    }
    Ok(copies)
}

async fn create(
    admin: &AdminClient<Quiet>,
    copies: usize,
    missing: &[&Wanted<'_>],
) -> Result<(), NotReady> {
    let confirmed_by = if copies >= COPIES { "2" } else { "1" };
    let topics: Vec<NewTopic> = missing
        .iter()
        .map(|topic| {
            let replication = TopicReplication::Fixed(copies as i32);
            let new = NewTopic::new(topic.name, topic.partitions as i32, replication);
            let new = new.set("min.insync.replicas", confirmed_by);
            let settings = topic.settings.iter();
            settings.fold(new, |new, (name, value)| new.set(name, value))
        })
        .collect();
    let results = admin.create_topics(&topics, &options()).await;
    let results = results.map_err(|error| not_yet("topics cannot be made", &error))?;
    for result in results {
        match result {
            Ok(name) => tracing::info!(topic = name, copies, "made a Kafka topic"),
            Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                return Err(NotReady::Yet(format!(
                    "Kafka topic {name} cannot be made: {code}"
                )));
            }
        }
    }
    Ok(())
}

/// Says whether one copy is enough to confirm an event.
async fn check_settings(
    admin: &AdminClient<Quiet>,
    wanted: &[Wanted<'_>],
) -> Result<bool, NotReady> {
    let mut confirmed_by_one = false;
    let resources: Vec<ResourceSpecifier> = wanted
        .iter()
        .map(|topic| ResourceSpecifier::Topic(topic.name))
        .collect();
    let described = admin.describe_configs(&resources, &options()).await;
    let described = described.map_err(|error| not_yet("topics cannot be examined", &error))?;
    for (topic, resource) in wanted.iter().zip(described) {
        let resource = resource.map_err(|code| {
            NotReady::Yet(format!(
                "Kafka topic {} cannot be examined: {code}",
                topic.name
            ))
        })?;
        check_topic(topic, &resource)?;
        let confirming = resource.get("min.insync.replicas");
        let confirming = confirming.and_then(|entry| entry.value.as_deref());
        confirmed_by_one |= topic.needed == KEPT_FOR_EVER && confirming == Some("1");
    }
    Ok(confirmed_by_one)
}

fn check_topic(topic: &Wanted<'_>, resource: &ConfigResource) -> Result<(), NotReady> {
    if resource.entries.is_empty() {
        // What a broker answers that has not heard of the topic yet.
        let why = format!("Kafka topic {} has no settings yet", topic.name);
        return Err(NotReady::Yet(why));
    }
    for (name, needed) in topic.needed {
        let found = resource.get(name).and_then(|entry| entry.value.as_deref());
        if !found.is_some_and(|found| suffices(found, needed)) {
            return Err(NotReady::Ever(format!(
                "Kafka topic {} has {name}={} and needs {needed}, or it would lose what must be \
                 kept. Set it with kafka-configs.sh --alter --entity-type topics --entity-name {} \
                 --add-config {name}={needed}",
                topic.name,
                found.unwrap_or("nothing"),
                topic.name
            )));
        }
    }
    Ok(())
}

fn suffices(found: &str, needed: &str) -> bool {
    match (found.parse::<u64>(), needed.parse::<u64>()) {
        (Ok(found), Ok(needed)) => found >= needed,
        _ => found == needed,
    }
}

fn not_yet(what: &str, error: &KafkaError) -> NotReady {
    NotReady::Yet(format!("{what} ({error})"))
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

    const WANTED: Wanted<'_> = Wanted {
        name: "p.global",
        partitions: 1,
        settings: &[],
        needed: &[("retention.ms", "-1")],
    };

    #[test]
    fn a_topic_that_the_asked_broker_does_not_know_yet_is_asked_for_again() {
        let refused = check_topic(&WANTED, &settings(None));
        assert!(matches!(refused, Err(NotReady::Yet(_))), "{refused:?}");
    }

    #[test]
    fn a_size_may_be_larger_than_what_is_needed_and_not_smaller() {
        assert!(suffices("9000000", "8388608") && suffices("8388608", "8388608"));
        assert!(!suffices("1048588", "8388608"));
    }

    #[test]
    fn a_topic_that_keeps_events_for_a_while_only_is_refused_for_good() {
        let refused = check_topic(&WANTED, &settings(Some("1000")));
        assert!(matches!(refused, Err(NotReady::Ever(_))), "{refused:?}");
        assert!(check_topic(&WANTED, &settings(Some("-1"))).is_ok());
    }
}
