//! The hash chain through the events of a bucket.
//!
//! Invariant: the hash of an event covers each of its fields with its length, and the hash of the
//! previous event. So the hash of a bucket's last event covers its whole history: changing, removing or
//! inserting any event changes it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::generate::SchemaGenerator;
use schemars::{JsonSchema, Schema, json_schema};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// Domain separation prefix, so that the hash of an event cannot equal the hash of other data. Another
/// number is another format of the store.
const DOMAIN: &[u8] = b"penstock event 1";

/// SHA-256 of an event and of everything before it in its bucket.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChainHash(pub [u8; 32]);

impl ChainHash {
    /// The previous hash of a bucket's first event.
    pub const START: Self = Self([0; 32]);

    /// Returns the hash with these bytes; `None` unless there are 32.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// The text is not 64 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a hash: write 64 hexadecimal digits")]
pub struct InvalidHash(String);

impl fmt::Display for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChainHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for ChainHash {
    type Err = InvalidHash;

    fn from_str(text: &str) -> Result<Self, InvalidHash> {
        let invalid = || InvalidHash(text.chars().take(80).collect());
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| invalid())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for ChainHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl JsonSchema for ChainHash {
    fn schema_name() -> Cow<'static, str> {
        "ChainHash".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^[0-9a-f]{64}$",
            "description": "SHA-256 of an event and of everything before it in its bucket"
        })
    }
}

impl<'de> Deserialize<'de> for ChainHash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// The fields of an event, in hashing order.
#[derive(Clone, Copy, Debug)]
pub struct HashedFields<'a> {
    /// Position, previous position, bucket, version, version of the type, milliseconds since 1970.
    pub numbers: [u64; 6],
    /// Stream, id, type, actor, data.
    pub texts: [&'a str; 5],
}

impl HashedFields<'_> {
    /// Adds every field to `hash`, text with its length, so that no two events have the same encoding.
    pub fn hash_into(&self, hash: &mut Sha256) {
        for number in self.numbers {
            hash.update(number.to_be_bytes());
        }
        for text in self.texts {
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text.as_bytes());
        }
    }

    /// Returns the hash of the event, which the next one in the bucket carries. `prev` is the hash of the
    /// event before it.
    pub fn hash_after(&self, prev: ChainHash) -> ChainHash {
        let mut hash = Sha256::new_with_prefix(DOMAIN);
        hash.update(prev.0);
        self.hash_into(&mut hash);
        ChainHash(hash.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Bucket, Position};
    use crate::log::RawRecord;
    use crate::time::Timestamp;

    fn event() -> RawRecord {
        RawRecord {
            position: Position(7),
            prev: Position(3),
            prev_hash: None,
            bucket: Bucket(5),
            stream: "endpoint/default/iris".to_owned(),
            version: 2,
            id: "019a0000-0000-7000-8000-000000000001".to_owned(),
            type_name: "traffic.set".to_owned(),
            type_version: 1,
            time: Timestamp::from_secs(1_000),
            actor: "token:ann".to_owned(),
            data: "{\"traffic\":{}}".to_owned(),
        }
    }

    fn hash(event: &RawRecord) -> ChainHash {
        HashedFields::of(event).hash_after(ChainHash::START)
    }

    /// Stores and topics hold such hashes. The expected one was computed independently, in another
    /// language.
    #[test]
    fn the_hash_of_an_event_never_changes() {
        assert_eq!(
            hash(&event()).to_string(),
            "c1410b1c2d268d3f7349b41dd7904169e5e07ffd6da083f148673cc8ea333088"
        );
    }

    #[test]
    fn the_hash_covers_every_field_and_the_previous_hash() {
        let changes: [fn(&mut RawRecord); 11] = [
            |event| event.position = Position(8),
            |event| event.prev = Position(2),
            |event| event.bucket = Bucket(6),
            |event| event.stream.push('a'),
            |event| event.version = 3,
            |event| event.id.push('a'),
            |event| event.type_name.push('a'),
            |event| event.type_version = 2,
            |event| event.time = Timestamp::from_secs(1_001),
            |event| event.actor.push('a'),
            |event| event.data.push('a'),
        ];
        let mut hashes = vec![
            hash(&event()),
            HashedFields::of(&event()).hash_after(ChainHash([1; 32])),
        ];
        for change in changes {
            let mut changed = event();
            change(&mut changed);
            hashes.push(hash(&changed));
        }
        // Moving text from one field to the next changes the hash.
        let mut moved = event();
        moved.actor.insert(0, 't');
        moved.type_name = "traffic.se".to_owned();
        hashes.push(hash(&moved));
        let different: std::collections::BTreeSet<ChainHash> = hashes.iter().copied().collect();
        assert_eq!(different.len(), hashes.len());
    }

    #[test]
    fn a_hash_round_trips_and_anything_else_is_rejected() {
        let hash = hash(&event());
        assert_eq!(hash.to_string().parse(), Ok(hash));
        let json = serde_json::to_string(&hash).unwrap();
        assert_eq!(serde_json::from_str::<ChainHash>(&json).unwrap(), hash);
        for bad in ["", "00", &"g".repeat(64), &"é".repeat(32), &"0".repeat(65)] {
            assert!(bad.parse::<ChainHash>().is_err(), "{bad}");
        }
    }
}
