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
    pub source: Source,
    pub boot: Uuid,
    pub sequence: u64,
    pub bucket: Bucket,
    pub start: Timestamp,
}

const fn first_version() -> u32 {
    1
}

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("it is no frame: {0}")]
    Foreign(serde_json::Error),
    /// Who sent it is known, and what it measured is lost here.
    #[error(
        "frame {} of {} in bucket {} is of version {} and cannot be read: {reason}",
        head.sequence, head.source.id, head.bucket, head.version
    )]
    Unreadable {
        head: Box<FrameHead>,
        reason: String,
    },
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
    pub fn encode(&self) -> serde_json::Result<String> {
        serde_json::to_string(&Written {
            version: FRAME_VERSION,
            frame: self,
        })
    }

    /// Reads a frame of any version up to the present one.
    pub fn decode(text: &[u8]) -> Result<Self, FrameError> {
        // Most are as this release writes them, and need not be looked through for their head first.
        if text.starts_with(PRESENT)
            && let Ok(frame) = serde_json::from_slice(text)
        {
            return Ok(frame);
        }
        let head: FrameHead = serde_json::from_slice(text).map_err(FrameError::Foreign)?;
        let read = match head.version {
            FRAME_VERSION => serde_json::from_slice(text).map_err(|error| error.to_string()),
            1 => serde_json::from_slice(text)
                .and_then(|frame| serde_json::from_value(upcast_1(frame)))
                .map_err(|error| error.to_string()),
            _ => Err("a newer release sent it".to_owned()),
        };
        read.map_err(|reason| FrameError::Unreadable {
            head: Box::new(head),
            reason,
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
