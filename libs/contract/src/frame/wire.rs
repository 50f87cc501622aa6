//! Frames as they go over the wire: which version they are of, and how an older one is read.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{Frame, Measure, Source};
use crate::ids::Bucket;
use crate::time::Timestamp;

/// The version of frames that this release writes.
pub const FRAME_VERSION: u32 = 2;

/// How frames begin that this release writes.
const PRESENT: &[u8] = br#"{"version":2,"#;

/// What a frame of any version says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrameHead {
    /// The first release wrote none.
    #[serde(default = "first_version")]
    pub version: u32,
    /// Who sent it.
    pub source: Source,
    /// The start of the source that it belongs to.
    pub boot: Uuid,
    /// Its place in what the source told of the bucket since then.
    pub sequence: u64,
    /// Of which endpoints it tells.
    pub bucket: Bucket,
    /// The whole second that it measures.
    pub start: Timestamp,
}

const fn first_version() -> u32 {
    1
}

/// Why bytes give no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// They are no frame of any version; who sent them is not known.
    #[error("it is no frame: {0}")]
    Foreign(serde_json::Error),
    /// Who sent it is known, and what it measured is lost here.
    #[error(
        "frame {} of {} in bucket {} is of version {} and cannot be read: {source}",
        head.sequence, head.source.id, head.bucket, head.version
    )]
    Unreadable {
        /// What the frame says of itself.
        head: Box<FrameHead>,
        /// Why it cannot be read.
        source: Unread,
    },
}

/// What stands in the way of reading a frame.
#[derive(Debug, thiserror::Error)]
pub enum Unread {
    /// Its version is one that this release does not know.
    #[error("a newer release sent it")]
    Newer,
    /// It is not what its version says.
    #[error(transparent)]
    Malformed(serde_json::Error),
}

impl From<&Frame> for FrameHead {
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
struct Written<'a> {
    version: u32,
    #[serde(flatten)]
    frame: &'a Frame,
}

impl Frame {
    /// As it goes over the wire.
    ///
    /// # Errors
    ///
    /// Never for what this release measures: all of it can be written as JSON.
    pub fn encode(&self) -> serde_json::Result<String> {
        serde_json::to_string(&Written {
            version: FRAME_VERSION,
            frame: self,
        })
    }

    /// Reads a frame of any version up to the present one.
    ///
    /// # Errors
    ///
    /// [`FrameError::Foreign`] for what is no frame, to be left alone; [`FrameError::Unreadable`]
    /// for a frame whose measurements are lost, to be counted as missing.
    pub fn decode(text: &[u8]) -> Result<Self, FrameError> {
        // Most are as this release writes them, and need not be looked through for their head first.
        if text.starts_with(PRESENT)
            && let Ok(frame) = serde_json::from_slice(text)
        {
            return Ok(frame);
        }
        let head: FrameHead = serde_json::from_slice(text).map_err(FrameError::Foreign)?;
        let read = match head.version {
            FRAME_VERSION => serde_json::from_slice(text).map_err(Unread::Malformed),
            1 => serde_json::from_slice(text)
                .and_then(|frame| serde_json::from_value(upcast_1(frame)))
                .map_err(Unread::Malformed),
            _ => Err(Unread::Newer),
        };
        read.map_err(|source| FrameError::Unreadable {
            head: Box::new(head),
            source,
        })
    }
}

/// Version 1 counted thresholds of the latency only, without naming it.
fn upcast_1(mut frame: Value) -> Value {
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
    fn frames_begin_as_those_of_the_present_version() {
        let golden = include_bytes!("../../tests/golden/frames/frame.v2.json");
        let written = Frame::decode(golden).unwrap().encode().unwrap();
        assert!(written.as_bytes().starts_with(PRESENT), "{written}");
        let version = format!("{{\"version\":{FRAME_VERSION},");
        assert_eq!(PRESENT, version.as_bytes());
    }
}
