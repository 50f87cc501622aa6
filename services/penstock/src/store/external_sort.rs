//! An external merge sort: orders events by position in bounded memory. Sorted runs are written to
//! temporary files and then merged.
//!
//! Invariant: every position comes out once. Duplicates must be identical.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Seek, Write};

use contract::chain::ChainHash;
use contract::ids::{Bucket, Position};
use contract::time::Timestamp;
use store::RawRecord;

/// Size of the buffer before it is written out as a run. Each run is an open file later: a hundred runs
/// are a log of 3 GB.
const BUFFER_BYTES_MAX: usize = 32 << 20;

#[derive(Debug, thiserror::Error)]
pub enum SortError {
    #[error("a temporary file cannot be written or read (TMPDIR names another folder): {0}")]
    File(#[from] io::Error),
    #[error(
        "position {0} has different events, so these topics hold events of more than one log: publish \
         to new ones with `penstock store republish --to kafka://HOST:PORT/NEWPREFIX`"
    )]
    Conflict(Position),
}

pub struct ExternalSorter {
    buffer: Vec<RawRecord>,
    buffer_bytes: usize,
    bytes_max: usize,
    runs: Vec<Run>,
}

impl Default for ExternalSorter {
    fn default() -> Self {
        Self::with_buffer(BUFFER_BYTES_MAX)
    }
}

impl ExternalSorter {
    fn with_buffer(bytes_max: usize) -> Self {
        Self {
            buffer: Vec::new(),
            buffer_bytes: 0,
            bytes_max,
            runs: Vec::new(),
        }
    }

    pub fn push(&mut self, event: RawRecord) -> Result<(), SortError> {
        self.buffer_bytes += size_of::<RawRecord>() + event.stream.len() + event.data.len();
        self.buffer.push(event);
        if self.buffer_bytes >= self.bytes_max {
            self.write_run()?;
        }
        Ok(())
    }

    fn write_run(&mut self) -> io::Result<()> {
        self.buffer.sort_by_key(|event| event.position);
        let mut writer = BufWriter::new(tempfile::tempfile()?);
        for event in self.buffer.drain(..) {
            serde_json::to_writer(&mut writer, &columns(event))?;
            writer.write_all(b"\n")?;
        }
        let mut file = writer
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        file.rewind()?;
        self.runs.push(Run::File(BufReader::new(file)));
        self.buffer_bytes = 0;
        Ok(())
    }

    pub fn sorted(mut self) -> Result<SortedEvents, SortError> {
        self.buffer.sort_by_key(|event| event.position);
        self.runs.push(Run::Memory(self.buffer.into_iter()));
        let mut sorted = SortedEvents {
            heads: self.runs.iter().map(|_| None).collect(),
            runs: self.runs,
            order: BinaryHeap::new(),
        };
        for run in 0..sorted.runs.len() {
            sorted.advance(run)?;
        }
        Ok(sorted)
    }
}

/// A sorted run.
enum Run {
    File(BufReader<File>),
    Memory(std::vec::IntoIter<RawRecord>),
}

impl Run {
    fn next(&mut self) -> io::Result<Option<RawRecord>> {
        match self {
            Self::Memory(events) => Ok(events.next()),
            Self::File(file) => {
                let mut line = Vec::new();
                if file.read_until(b'\n', &mut line)? == 0 {
                    return Ok(None);
                }
                Ok(Some(event(serde_json::from_slice(&line)?)))
            }
        }
    }
}

/// The merged events, in order of position.
pub struct SortedEvents {
    runs: Vec<Run>,
    /// The next event of each run.
    heads: Vec<Option<RawRecord>>,
    order: BinaryHeap<Reverse<(Position, usize)>>,
}

impl SortedEvents {
    pub fn next(&mut self) -> Result<Option<RawRecord>, SortError> {
        let Some(mut first) = self.pop()? else {
            return Ok(None);
        };
        while let Some(Reverse((position, _))) = self.order.peek()
            && *position == first.position
        {
            let Some(duplicate) = self.pop()? else {
                continue;
            };
            if !duplicate.is_same_as(&first) {
                return Err(SortError::Conflict(first.position));
            }
            // A release without hash chains may have published it first.
            first.prev_hash = first.prev_hash.or(duplicate.prev_hash);
        }
        Ok(Some(first))
    }

    fn pop(&mut self) -> Result<Option<RawRecord>, SortError> {
        let Some(Reverse((_, run))) = self.order.pop() else {
            return Ok(None);
        };
        let event = self.heads[run].take();
        self.advance(run)?;
        Ok(event)
    }

    fn advance(&mut self, run: usize) -> Result<(), SortError> {
        let next = self.runs[run].next()?;
        if let Some(event) = &next {
            self.order.push(Reverse((event.position, run)));
        }
        self.heads[run] = next;
        Ok(())
    }
}

type Columns = (
    (u64, u64, Option<ChainHash>, u16, u64, u32, i64),
    (String, String, String, String, String),
);

fn columns(event: RawRecord) -> Columns {
    (
        (
            event.position.0,
            event.prev.0,
            event.prev_hash,
            event.bucket.0,
            event.version,
            event.type_version,
            event.time.millis(),
        ),
        (
            event.stream,
            event.id,
            event.type_name,
            event.actor,
            event.data,
        ),
    )
}

fn event((numbers, texts): Columns) -> RawRecord {
    let (position, prev, prev_hash, bucket, version, type_version, time) = numbers;
    let (stream, id, type_name, actor, data) = texts;
    RawRecord {
        position: Position(position),
        prev: Position(prev),
        prev_hash,
        bucket: Bucket(bucket),
        stream,
        version,
        id,
        type_name,
        type_version,
        time: Timestamp::from_millis(time),
        actor,
        data,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event_at(position: u64) -> RawRecord {
        RawRecord {
            position: Position(position),
            prev: Position(position / 2),
            prev_hash: (position > 9).then_some(ChainHash([position as u8; 32])),
            bucket: Bucket((position % 64) as u16),
            stream: format!("endpoint/default/e{position}"),
            version: position + 1,
            id: position.to_string(),
            type_name: "EndpointDeletionRequested".to_owned(),
            type_version: 1,
            time: Timestamp::from_millis(-(position as i64)),
            actor: "a\n\"b\"".to_owned(),
            data: format!("{{\"text\":\"line\\n{position}\"}}"),
        }
    }

    fn collect(mut sorted: SortedEvents) -> Result<Vec<RawRecord>, SortError> {
        let mut events = Vec::new();
        while let Some(event) = sorted.next()? {
            events.push(event);
        }
        Ok(events)
    }

    proptest! {
        #[test]
        fn events_come_out_once_and_in_order_with_any_buffer_size(
            positions in prop::collection::vec(1u64..50, 0..120),
            bytes_max in prop::sample::select(vec![1, 1_000, 1 << 20]),
        ) {
            let mut sorter = ExternalSorter::with_buffer(bytes_max);
            for position in &positions {
                sorter.push(event_at(*position)).unwrap();
            }
            let mut expected = positions;
            expected.sort_unstable();
            expected.dedup();
            let expected: Vec<RawRecord> = expected.into_iter().map(event_at).collect();
            prop_assert_eq!(collect(sorter.sorted().unwrap()).unwrap(), expected);
        }
    }

    #[test]
    fn of_duplicates_with_and_without_a_hash_the_hash_is_kept() {
        let event = RawRecord {
            prev_hash: Some(ChainHash([1; 32])),
            ..event_at(1)
        };
        let without = RawRecord {
            prev_hash: None,
            ..event.clone()
        };
        for twice in [[&event, &without], [&without, &event]] {
            let mut sorter = ExternalSorter::default();
            for event in twice {
                sorter.push(event.clone()).unwrap();
            }
            assert_eq!(
                collect(sorter.sorted().unwrap()).unwrap(),
                std::slice::from_ref(&event)
            );
        }
    }

    #[test]
    fn different_events_at_the_same_position_are_a_conflict() {
        for bytes_max in [1, 1 << 20] {
            let mut sorter = ExternalSorter::with_buffer(bytes_max);
            for position in [3, 1, 2] {
                sorter.push(event_at(position)).unwrap();
            }
            let changed = RawRecord {
                data: "{}".to_owned(),
                ..event_at(2)
            };
            sorter.push(changed).unwrap();
            let error = collect(sorter.sorted().unwrap()).unwrap_err();
            assert!(matches!(error, SortError::Conflict(Position(2))), "{error}");
        }
    }
}
