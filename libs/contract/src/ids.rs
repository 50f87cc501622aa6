//! Identifiers. Each is a separate type, so that they cannot be confused, and each is validated when
//! parsed.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

/// The only workspace for now. Every stored name contains it, because the log cannot change when tenancy
/// is added.
pub const DEFAULT_WORKSPACE: &str = "default";

/// Maximum length of a resource name, in bytes.
pub const NAME_LENGTH_MAX: usize = 32;

/// A resource's name: `[a-z]([a-z0-9-]{0,30}[a-z0-9])?`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Name(String);

/// The text is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a valid name: use 1 to 32 lower-case letters, digits and dashes, starting with a letter and not ending with a dash"
)]
pub struct InvalidName(pub String);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = text.as_bytes();
        let inner = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        let valid = bytes.len() <= NAME_LENGTH_MAX
            && bytes.first().is_some_and(u8::is_ascii_lowercase)
            && bytes.last().is_some_and(|b| *b != b'-')
            && bytes.iter().all(inner);
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName(text.to_owned()))
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// `ENDPOINT/DEPLOYMENT`, the full name of a deployment.
#[derive(
    schemars::JsonSchema, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(deny_unknown_fields)]
pub struct DeploymentRef {
    /// The endpoint's name.
    pub endpoint: Name,
    /// The deployment's name within it.
    pub deployment: Name,
}

impl fmt::Display for DeploymentRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.endpoint, self.deployment)
    }
}

impl FromStr for DeploymentRef {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (endpoint, deployment) = text
            .split_once('/')
            .ok_or_else(|| InvalidName(text.to_owned()))?;
        Ok(Self {
            endpoint: endpoint.parse()?,
            deployment: deployment.parse()?,
        })
    }
}

/// `workspace/endpoint`: the key of everything that belongs to one endpoint, in stream names, in bus
/// records and for the choice of a bucket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointKey {
    text: String,
}

impl EndpointKey {
    /// The key of the endpoint with this name, in the default workspace.
    pub fn new(endpoint: &Name) -> Self {
        Self {
            text: format!("{DEFAULT_WORKSPACE}/{endpoint}"),
        }
    }

    /// `workspace/endpoint`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The endpoint's name alone.
    pub fn endpoint(&self) -> Name {
        let (_, endpoint) = self.text.split_once('/').unwrap_or(("", &self.text));
        Name(endpoint.to_owned())
    }

    /// The bucket of everything that belongs to the endpoint.
    pub fn bucket(&self) -> Bucket {
        Bucket::of(&self.text)
    }
}

impl FromStr for EndpointKey {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (workspace, endpoint) = text
            .split_once('/')
            .ok_or_else(|| InvalidName(text.to_owned()))?;
        Name::from_str(workspace)?;
        Name::from_str(endpoint)?;
        Ok(Self {
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for EndpointKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for EndpointKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for EndpointKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// One incarnation of an endpoint or deployment. A name that is deleted and created again gets another
/// uid and inherits nothing.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct Uid(pub Uuid);

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The id of one running copy of a deployment; never reused.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct InstanceId(String);

impl InstanceId {
    /// Builds an id such as `iris-blue-019a…`: readable in process lists, unique by the random tail of the
    /// UUID.
    pub fn new(of: &DeploymentRef, unique: Uuid) -> Self {
        let tail = unique.simple().to_string();
        Self(format!("{}-{}-{}", of.endpoint, of.deployment, &tail[20..]))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for InstanceId {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The position of an event in the log; the first event has position 1.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct Position(pub u64);

impl Position {
    /// The position before the first event.
    pub const START: Self = Self(0);
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The number of buckets that endpoints are distributed over. Fixed when a store is created.
pub const BUCKETS: u16 = 64;

/// A part of the log: the unit of ownership, and of order on the bus.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct Bucket(pub u16);

impl Bucket {
    /// The bucket for what belongs to no endpoint (tokens, price sheets, targets). Every consumer reads
    /// all of it.
    pub const GLOBAL: Self = Self(BUCKETS);

    /// The bucket whose owner also writes what belongs to no endpoint.
    pub const GLOBAL_OWNER: Self = Self(0);

    /// The bucket of a key, which equals the partition that Kafka's default partitioner chooses of 64.
    pub fn of(key: &str) -> Self {
        Self(((murmur2(key.as_bytes()) & 0x7fff_ffff) % u32::from(BUCKETS)) as u16)
    }

    /// All buckets except the global one.
    pub fn of_endpoints() -> impl Iterator<Item = Self> {
        (0..BUCKETS).map(Self)
    }

    /// All buckets, the global one last.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..=BUCKETS).map(Self)
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The key that determines an event's bucket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum BucketKey {
    /// For events of this endpoint.
    Endpoint(EndpointKey),
    /// For events of no endpoint.
    Global,
}

impl BucketKey {
    /// The bucket for this key.
    pub fn bucket(&self) -> Bucket {
        match self {
            Self::Endpoint(key) => key.bucket(),
            Self::Global => Bucket::GLOBAL,
        }
    }
}

/// MurmurHash2 as Kafka's Java client computes it (seed 0x9747b28c), so that our buckets equal the
/// partitions that `partitioner=murmur2_random` chooses.
fn murmur2(data: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const M: u32 = 0x5bd1_e995;
    const R: u32 = 24;
    let mut hash = SEED ^ data.len() as u32;
    let mut chunks = data.chunks_exact(4);
    for chunk in &mut chunks {
        let mut k = u32::from_le_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]).wrapping_mul(M);
        k = (k ^ (k >> R)).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        let mut tail = 0;
        for (index, byte) in rest.iter().enumerate() {
            tail |= u32::from(*byte) << (8 * index);
        }
        hash = (hash ^ tail).wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn murmur2_matches_the_test_vectors_of_kafkas_client() {
        // org.apache.kafka.common.utils.UtilsTest#testMurmur2
        let vectors: [(&[u8], i32); 6] = [
            (b"21", -973932308),
            (b"foobar", -790332482),
            (b"a-little-bit-long-string", -985981536),
            (b"a-little-bit-longer-string", -1486304829),
            (
                b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58897971,
            ),
            (b"abc", 479470107),
        ];
        for (text, expected) in vectors {
            assert_eq!(
                murmur2(text) as i32,
                expected,
                "{}",
                String::from_utf8_lossy(text)
            );
        }
    }

    #[test]
    fn names_must_match_the_documented_pattern() {
        for good in ["a", "iris", "a-1", "a234567890123456789012345678901b"] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "A",
            "1a",
            "-a",
            "a-",
            "a_b",
            "a.b",
            "ä",
            "a23456789012345678901234567890123",
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }
}
