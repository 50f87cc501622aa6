//! The wire format of frames: their version, and how older versions are read.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{Frame, Measure, Source};
use crate::ids::Bucket;
use crate::time::Timestamp;

/// The version of frames that this release writes.
pub const FRAME_VERSION: u32 = 2;

/// The first bytes of a frame in the current version.
const CURRENT_VERSION_PREFIX: &[u8] = br#"{"version":2,"#;

/// The header of a frame of any version.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrameHeader {
    /// The version of the frame; the first release wrote none.
    #[serde(default = "first_version")]
    pub version: u32,
    /// Who sent it.
    pub source: Source,
    /// The start of the source that sent it.
    pub boot: Uuid,
    /// Its sequence number within the boot and bucket.
    pub sequence: u64,
    /// The bucket of the endpoints in it.
    pub bucket: Bucket,
    /// The start of the second that it measures.
    pub start: Timestamp,
}

const fn first_version() -> u32 {
    1
}

/// Why a frame cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// It is not a frame of any version; the sender is unknown.
    #[error("it is not a frame: {0}")]
    NotAFrame(serde_json::Error),
    /// The sender is known, but the measurements are lost.
    #[error(
        "frame {} of {} in bucket {} is of version {} and cannot be read: {source}",
        head.sequence, head.source.id, head.bucket, head.version
    )]
    Unreadable {
        /// The header of the frame.
        head: Box<FrameHeader>,
        /// Why the frame cannot be read.
        source: FrameReadError,
    },
}

/// Why the measurements in a frame cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameReadError {
    /// This release does not know its version.
    #[error("a newer release sent it")]
    Newer,
    /// It does not match the shape of its version.
    #[error(transparent)]
    Malformed(serde_json::Error),
}

impl From<&Frame> for FrameHeader {
    fn from(frame: &Frame) -> Self {
        Self {
            version: FRAME_VERSION,
            source: frame.source.clone(),
            boot: frame.boot,
            sequence: frame.sequence,
            bucket: frame.bucket,
            start: frame.start,
        }
    }
}

#[derive(Serialize)]
struct VersionedFrame<'a> {
    version: u32,
    #[serde(flatten)]
    frame: &'a Frame,
}

impl Frame {
    /// Encodes the frame for the wire.
    ///
    /// # Errors
    ///
    /// Never for what this release measures: all of it can be written as JSON.
    pub fn encode(&self) -> serde_json::Result<String> {
        serde_json::to_string(&VersionedFrame {
            version: FRAME_VERSION,
            frame: self,
        })
    }

    /// Decodes a frame of any version up to the current one.
    ///
    /// # Errors
    ///
    /// Returns [`FrameError::NotAFrame`] for other data, which callers ignore, and
    /// [`FrameError::Unreadable`] for a frame whose measurements are lost, which counts as missing.
    pub fn decode(text: &[u8]) -> Result<Self, FrameError> {
        // Most frames are of the current version, and do not need their header parsed first.
        if text.starts_with(CURRENT_VERSION_PREFIX)
            && let Ok(frame) = serde_json::from_slice(text)
        {
            return Ok(frame);
        }
        let head: FrameHeader = serde_json::from_slice(text).map_err(FrameError::NotAFrame)?;
        let read = match head.version {
            FRAME_VERSION => serde_json::from_slice(text).map_err(FrameReadError::Malformed),
            1 => serde_json::from_slice(text)
                .and_then(|frame| serde_json::from_value(upcast_v1(frame)))
                .map_err(FrameReadError::Malformed),
            _ => Err(FrameReadError::Newer),
        };
        read.map_err(|source| FrameError::Unreadable {
            head: Box::new(head),
            source,
        })
    }
}

/// Version 1 counted latency thresholds only, without naming the measure.
fn upcast_v1(mut frame: Value) -> Value {
    let deployments = frame.get_mut("deployments").and_then(Value::as_array_mut);
    for deployment in deployments.into_iter().flatten() {
        let Some(counts) = deployment.get_mut("atOrBelow") else {
            continue;
        };
        let counts = counts.take();
        deployment["atOrBelow"] = match counts.as_object().is_some_and(Map::is_empty) {
            true => counts,
            false => json!({Measure::LATENCY.as_str(): counts}),
        };
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_frames_begin_with_the_version_prefix() {
        let golden = include_bytes!("../../tests/golden/frames/frame.v2.json");
        let written = Frame::decode(golden).unwrap().encode().unwrap();
        assert!(
            written.as_bytes().starts_with(CURRENT_VERSION_PREFIX),
            "{written}"
        );
        let version = format!("{{\"version\":{FRAME_VERSION},");
        assert_eq!(CURRENT_VERSION_PREFIX, version.as_bytes());
    }
}
