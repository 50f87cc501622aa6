//! Finds the place from which the last lines stand, from the end backwards.
//!
//! Invariant: no more is read than the lines found, the line before them, and a block.

use std::collections::VecDeque;
use std::io::{self, Read, Seek, SeekFrom};

use contract::time::Timestamp;

use super::LINE_BYTES_MAX;
use super::files::{Output, Place};
use super::read::{first_place, line_start};
use super::rotate::hold_still;

/// How much one step reads.
const BLOCK_BYTES: u64 = 64 * 1024;
const LINE: u64 = LINE_BYTES_MAX as u64;

/// How much of the past is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Most {
    /// At most so many lines, of all instances together.
    pub lines: usize,
    /// And at most so many bytes.
    pub bytes: u64,
}

/// What is to be given of one instance.
#[derive(Debug)]
pub(super) struct Stretch {
    pub instance: String,
    pub start: Place,
    pub end: Place,
    /// The end is known to be the end of a line.
    pub is_settled: bool,
}

/// A search for the last lines of some instances: those of the instance that wrote last are the last.
#[derive(Debug)]
pub struct Tail {
    since: Option<Timestamp>,
    /// What may still be found.
    left: Most,
    lines: usize,
    /// Lines before those found would have been too many bytes.
    is_cut: bool,
    /// There are lines before those found.
    leaves_out: bool,
    /// Instances not looked at yet, those that wrote last at the end.
    waiting: Vec<(String, Output)>,
    scan: Option<Scan>,
    found: VecDeque<Stretch>,
    bytes_read: u64,
}

impl Tail {
    pub(super) fn new(
        waiting: Vec<(String, Output)>,
        since: Option<Timestamp>,
        most: Most,
    ) -> Self {
        Self {
            since,
            left: most,
            lines: 0,
            is_cut: false,
            leaves_out: false,
            waiting,
            scan: None,
            found: VecDeque::new(),
            bytes_read: 0,
        }
    }

    /// Reads a block more; false when the place is found.
    ///
    /// # Errors
    ///
    /// Where a file of output is there and cannot be read. One that was rotated away or removed
    /// meanwhile is no error.
    pub fn step(&mut self) -> io::Result<bool> {
        let _still = hold_still();
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
        // A line that is longer than all that may still be given: its start need not be known.
        let most = (self.left.lines as u64).saturating_mul(LINE);
        let most = most.min(self.left.bytes - self.left.bytes % LINE);
        if !self.is_full() && scan.pending() >= most.saturating_add(LINE) {
            let begin = scan.line_end - most;
            self.take(&mut scan, begin);
            self.is_cut |= self.left.lines > 0;
        }
        if self.is_full() {
            let mut others = self.waiting.iter().map(|(_, output)| output);
            let more = others.any(|output| output.length > 0 || !output.parts.is_empty());
            self.leaves_out = more || scan.first.is_before(scan.start);
        } else if scan.is_in_part() || scan.go_to_older_part()? {
            self.scan = Some(scan);
            return Ok(true);
        }
        self.found.push_front(scan.stretch());
        Ok(true)
    }

    /// Lines of the past that were found.
    pub fn lines(&self) -> usize {
        self.lines
    }

    /// There are lines before those found.
    pub fn leaves_out(&self) -> bool {
        self.leaves_out
    }

    /// And they are left out for their size, not for their number.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    pub(super) fn bytes_read(&self) -> u64 {
        self.bytes_read
    }

    pub(super) fn into_stretches(self) -> impl Iterator<Item = Stretch> {
        let passed_over = self.waiting.into_iter().map(|(instance, output)| Stretch {
            instance,
            start: output.end(),
            end: output.end(),
            is_settled: false,
        });
        passed_over.chain(self.found)
    }

    fn is_full(&self) -> bool {
        self.left.lines == 0 || self.is_cut
    }

    fn next_instance(&mut self) -> io::Result<bool> {
        let Some((instance, output)) = self.waiting.pop() else {
            return Ok(false);
        };
        let mut end = output.end();
        end.offset = line_start(&output.log, end.offset)?;
        let first = first_place(&output, self.since)?;
        self.scan = Some(Scan::new(instance, output, first, end));
        Ok(true)
    }

    /// Takes as much of the end of a line as may still be given.
    fn take(&mut self, scan: &mut Scan, begin: u64) {
        let mut end = scan.line_end;
        while end > begin && self.left.lines > 0 {
            let length = match (end - begin) % LINE {
                0 => LINE,
                rest => rest,
            };
            if length > self.left.bytes {
                self.is_cut = true;
                break;
            }
            end -= length;
            self.lines += 1;
            self.left.lines -= 1;
            self.left.bytes -= length;
            scan.start = Place {
                offset: end,
                ..scan.part
            };
        }
        scan.line_end = begin;
    }
}

/// The search in one instance, from its end backwards.
#[derive(Debug)]
struct Scan {
    instance: String,
    output: Output,
    /// Nothing before it is asked for.
    first: Place,
    start: Place,
    end: Place,
    /// The part that is being read, and up to where it has not been.
    part: Place,
    /// What was read last of it, from `part.offset` on.
    block: Vec<u8>,
    /// The end of the line whose start is looked for.
    line_end: u64,
}

impl Scan {
    fn new(instance: String, output: Output, first: Place, end: Place) -> Self {
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

    /// Reads what stands before; how much it is.
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
            // Dropped for its age meanwhile, and so is all before it.
            self.block.clear();
            self.first = self.part;
            self.line_end = self.part.offset;
            return Ok(0);
        }
        self.part.offset = from;
        Ok(length)
    }

    /// Where the last line begins that has not been taken, if that is known by now.
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

    /// How much is known of the line whose start is looked for.
    fn pending(&self) -> u64 {
        self.line_end.saturating_sub(self.part.offset)
    }

    /// There is more in this part.
    fn is_in_part(&self) -> bool {
        self.part.offset > self.floor() || self.line_end > self.part.offset
    }

    /// Goes on at the end of the part before; false when there is none.
    fn go_to_older_part(&mut self) -> io::Result<bool> {
        let wanted = self.first.part..self.part.part;
        let Some(&part) = self.output.parts.range(wanted).next_back() else {
            return Ok(false);
        };
        let Some(file) = self.output.open(part)? else {
            // Dropped for its age meanwhile, and so is all before it.
            return Ok(false);
        };
        self.line_end = file.metadata()?.len();
        self.part = Place {
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

    fn stretch(self) -> Stretch {
        Stretch {
            instance: self.instance,
            start: self.start,
            end: self.end,
            is_settled: true,
        }
    }
}
