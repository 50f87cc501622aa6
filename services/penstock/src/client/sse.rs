//! Server-sent events, read from a stream of bytes that may be cut anywhere.

/// One event of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SseEvent {
    pub id: Option<String>,
    pub event: Option<String>,
    pub data: String,
}

/// Feeds on chunks, gives whole events. A line is at most `LINE_MAX` bytes long; a longer one is cut.
#[derive(Debug, Default)]
pub struct SseReader {
    line: Vec<u8>,
    current: SseEvent,
    has_data: bool,
}

const LINE_MAX: usize = 4 * 1024 * 1024;

impl SseReader {
    pub fn feed(&mut self, chunk: &[u8]) -> Vec<SseEvent> {
        let mut events = Vec::new();
        for byte in chunk {
            if *byte == b'\n' {
                events.extend(self.end_line());
            } else if self.line.len() < LINE_MAX {
                self.line.push(*byte);
            }
        }
        events
    }

    fn end_line(&mut self) -> Option<SseEvent> {
        let line = std::mem::take(&mut self.line);
        let line = String::from_utf8_lossy(&line);
        let line = line.trim_end_matches('\r');
        if line.is_empty() {
            let event = std::mem::take(&mut self.current);
            return std::mem::take(&mut self.has_data).then_some(event);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => {
                if self.has_data {
                    self.current.data.push('\n');
                }
                self.current.data.push_str(value);
                self.has_data = true;
            }
            "id" => self.current.id = Some(value.to_owned()),
            "event" => self.current.event = Some(value.to_owned()),
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_however_the_bytes_are_cut() {
        let text = "id: 7\nevent: scaling.decided\ndata: {\"a\":\ndata: 1}\n\n: keep-alive\n\ndata: ü\r\n\r\n".as_bytes();
        for size in 1..text.len() {
            let mut reader = SseReader::default();
            let events: Vec<SseEvent> = text.chunks(size).flat_map(|c| reader.feed(c)).collect();
            assert_eq!(events.len(), 2, "cut at {size}");
            assert_eq!(events[0].id.as_deref(), Some("7"));
            assert_eq!(events[0].event.as_deref(), Some("scaling.decided"));
            assert_eq!(events[0].data, "{\"a\":\n1}");
            assert_eq!(events[1].data, "ü");
        }
    }
}
