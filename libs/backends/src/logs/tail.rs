//! Finds the position of the last lines, searching backwards from the end.
//!
//! Invariant: no more is read than the lines found, the line before them, and one block.

use std::collections::VecDeque;
use std::io::{self, Read, Seek, SeekFrom};

use contract::time::Timestamp;

use super::LINE_BYTES_MAX;
use super::files::{Output, OutputPosition};
use super::position::{first_position, line_start};
use super::rotate::block_rotation;

/// How many bytes one step reads.
const BLOCK_BYTES: u64 = 64 * 1024;
const LINE: u64 = LINE_BYTES_MAX as u64;

/// How much of the backlog is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TailLimits {
    /// Maximum number of lines, over all instances.
    pub lines: usize,
    /// Maximum number of bytes, over all instances.
    pub bytes: u64,
}

/// The range to be read of one instance.
#[derive(Debug)]
pub(super) struct TailRange {
    pub instance: String,
    pub start: OutputPosition,
    pub end: OutputPosition,
    /// Whether the end is known to be the end of a line.
    pub is_settled: bool,
}

/// A search for the last lines of some instances. Those of the instance that wrote last come last.
#[derive(Debug)]
pub struct TailSearch {
    since: Option<Timestamp>,
    /// What is still to be found.
    left: TailLimits,
    lines: usize,
    /// Whether earlier lines were left out because of their size.
    is_cut_by_size: bool,
    /// Whether there are lines before those found.
    has_earlier_lines: bool,
    /// Instances not searched yet, in order of their last write.
    waiting: Vec<(String, Output)>,
    scan: Option<BackwardScan>,
    found: VecDeque<TailRange>,
    bytes_read: u64,
}

impl TailSearch {
    pub(super) fn new(
        waiting: Vec<(String, Output)>,
        since: Option<Timestamp>,
        limits: TailLimits,
    ) -> Self {
        Self {
            since,
            left: limits,
            lines: 0,
            is_cut_by_size: false,
            has_earlier_lines: false,
            waiting,
            scan: None,
            found: VecDeque::new(),
            bytes_read: 0,
        }
    }

    /// Reads one more block. Returns false when the search is complete.
    ///
    /// # Errors
    ///
    /// If an existing output file cannot be read. A file that was rotated or removed meanwhile is no
    /// error.
    pub fn step(&mut self) -> io::Result<bool> {
        let _guard = block_rotation();
        if self.is_full() {
            return Ok(false);
        }
        let Some(mut scan) = self.scan.take() else {
            return self.next_instance();
        };
        self.bytes_read += scan.read_block()?;
        while let Some(line) = scan.line_before() {
            self.take(&mut scan, line);
            if self.is_full() {
                break;
            }
        }
        // The line is longer than what is still allowed: its start need not be known.
        let allowed = (self.left.lines as u64).saturating_mul(LINE);
        let allowed = allowed.min(self.left.bytes - self.left.bytes % LINE);
        if !self.is_full() && scan.pending() >= allowed.saturating_add(LINE) {
            let begin = scan.line_end - allowed;
            self.take(&mut scan, begin);
            self.is_cut_by_size |= self.left.lines > 0;
        }
        if self.is_full() {
            let mut others = self.waiting.iter().map(|(_, output)| output);
            let more = others.any(|output| output.length > 0 || !output.parts.is_empty());
            self.has_earlier_lines = more || scan.first.is_before(scan.start);
        } else if scan.is_in_part() || scan.move_to_older_part()? {
            self.scan = Some(scan);
            return Ok(true);
        }
        self.found.push_front(scan.into_range());
        Ok(true)
    }

    /// Returns the number of lines found.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// Whether there are lines before those found.
    pub fn has_earlier_lines(&self) -> bool {
        self.has_earlier_lines
    }

    /// Whether earlier lines were left out because of their size, not their number.
    pub fn is_cut_by_size(&self) -> bool {
        self.is_cut_by_size
    }

    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    pub(super) fn into_ranges(self) -> impl Iterator<Item = TailRange> {
        let skipped = self
            .waiting
            .into_iter()
            .map(|(instance, output)| TailRange {
                instance,
                start: output.end(),
                end: output.end(),
                is_settled: false,
            });
        skipped.chain(self.found)
    }

    fn is_full(&self) -> bool {
        self.left.lines == 0 || self.is_cut_by_size
    }

    fn next_instance(&mut self) -> io::Result<bool> {
        let Some((instance, output)) = self.waiting.pop() else {
            return Ok(false);
        };
        let mut end = output.end();
        end.offset = line_start(&output.log, end.offset)?;
        let first = first_position(&output, self.since)?;
        self.scan = Some(BackwardScan::new(instance, output, first, end));
        Ok(true)
    }

    /// Takes as much of the end of a line as is still allowed.
    fn take(&mut self, scan: &mut BackwardScan, begin: u64) {
        let mut end = scan.line_end;
        while end > begin && self.left.lines > 0 {
            let length = match (end - begin) % LINE {
                0 => LINE,
                rest => rest,
            };
            if length > self.left.bytes {
                self.is_cut_by_size = true;
                break;
            }
            end -= length;
            self.lines += 1;
            self.left.lines -= 1;
            self.left.bytes -= length;
            scan.start = OutputPosition {
                offset: end,
                ..scan.part
            };
        }
        scan.line_end = begin;
    }
}

/// The search in one instance, backwards from its end.
#[derive(Debug)]
struct BackwardScan {
    instance: String,
    output: Output,
    /// The search does not go before this position.
    first: OutputPosition,
    start: OutputPosition,
    end: OutputPosition,
    /// The part being read, and the offset below which it has not been read.
    part: OutputPosition,
    /// The block read last, from `part.offset` on.
    block: Vec<u8>,
    /// The end of the line whose start is searched for.
    line_end: u64,
}

impl BackwardScan {
    fn new(instance: String, output: Output, first: OutputPosition, end: OutputPosition) -> Self {
        Self {
            instance,
            output,
            first,
            start: end,
            end,
            part: end,
            block: Vec::new(),
            line_end: end.offset,
        }
    }

    /// Reads the preceding block and returns its size.
    fn read_block(&mut self) -> io::Result<u64> {
        let from = self
            .part
            .offset
            .saturating_sub(BLOCK_BYTES)
            .max(self.floor());
        let length = self.part.offset.saturating_sub(from);
        self.block.clear();
        if let Some(mut file) = self.output.open(self.part.part)? {
            file.seek(SeekFrom::Start(from))?;
            file.take(length).read_to_end(&mut self.block)?;
        }
        if (self.block.len() as u64) < length {
            // Dropped meanwhile, and so is everything before it.
            self.block.clear();
            self.first = self.part;
            self.line_end = self.part.offset;
            return Ok(0);
        }
        self.part.offset = from;
        Ok(length)
    }

    /// Returns the start of the last line not taken yet, if it is known by now.
    fn line_before(&mut self) -> Option<u64> {
        let newline = self.block.iter().rposition(|byte| *byte == b'\n');
        if let Some(newline) = newline {
            self.block.truncate(newline);
            return Some(self.part.offset + newline as u64 + 1);
        }
        self.block.clear();
        let is_start = self.part.offset <= self.floor() && self.line_end > self.part.offset;
        is_start.then_some(self.part.offset)
    }

    /// Returns how many bytes of the current line have been read.
    fn pending(&self) -> u64 {
        self.line_end.saturating_sub(self.part.offset)
    }

    /// Whether there is more to read in this part.
    fn is_in_part(&self) -> bool {
        self.part.offset > self.floor() || self.line_end > self.part.offset
    }

    /// Continues at the end of the preceding part. Returns false if there is none.
    fn move_to_older_part(&mut self) -> io::Result<bool> {
        let wanted = self.first.part..self.part.part;
        let Some(&part) = self.output.parts.range(wanted).next_back() else {
            return Ok(false);
        };
        let Some(file) = self.output.open(part)? else {
            // Dropped meanwhile, and so is everything before it.
            return Ok(false);
        };
        self.line_end = file.metadata()?.len();
        self.part = OutputPosition {
            part,
            offset: self.line_end,
            is_rotated: true,
        };
        Ok(true)
    }

    fn floor(&self) -> u64 {
        match self.part.part == self.first.part {
            true => self.first.offset,
            false => 0,
        }
    }

    fn into_range(self) -> TailRange {
        TailRange {
            instance: self.instance,
            start: self.start,
            end: self.end,
            is_settled: true,
        }
    }
}
