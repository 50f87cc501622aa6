//! The log as Kafka has it, in order of position.
//!
//! Invariant: an event is as it was published, which is as it was stored, whether or not this release
//! can read it; memory is bounded, whatever the log's length.

use bus::BusError;
use bus::kafka::{KafkaConfig, LogItem, LogReader, read_log};
use store::RawRecord;

use super::spool::{Sorted, Spool};
use super::waiting::told;
use super::{Extent, Hole, Progress, failed, shown};
use cli::error::CliError;

pub struct KafkaLog {
    pub extent: Extent,
    sorted: Sorted,
    url: String,
}

impl KafkaLog {
    /// Reads all that is there.
    pub async fn read(url: &str) -> Result<Self, CliError> {
        let config = KafkaConfig::parse(url).map_err(|error| {
            // The same option names it in a server's words.
            CliError::Usage(error.to_string().replacen("--bus ", "", 1))
        })?;
        let mut reader = read_log(&config);
        let mut spool = Spool::default();
        let mut progress = Progress::new("events read from Kafka");
        let mut read = 0;
        while let Some(item) = told(reader.next(), || waiting(url, read)).await {
            match item.map_err(unread)? {
                LogItem::Event(event) | LogItem::Repeated(event) => {
                    spool.push(event).map_err(failed)?;
                    read += 1;
                    progress.count(read);
                }
                LogItem::End(extent) => {
                    return Ok(Self {
                        extent: extent_of(extent),
                        sorted: spool.sorted().map_err(failed)?,
                        url: shown(url).to_owned(),
                    });
                }
            }
        }
        Err(failed("the log on Kafka cannot be read to its end"))
    }

    /// The next events in order of position; none at the end.
    pub fn page(&mut self, limit: usize) -> Result<Vec<RawRecord>, CliError> {
        let mut page = Vec::with_capacity(limit);
        while page.len() < limit {
            let next = self.sorted.next();
            let next = next.map_err(|error| failed(format!("{}: {error}", self.url)))?;
            let Some(event) = next else { break };
            page.push(event);
        }
        Ok(page)
    }
}

fn waiting(url: &str, read: u64) -> String {
    let (url, patience) = (shown(url), LogReader::PATIENCE.as_secs());
    match read {
        0 => format!(
            "waiting for {url}, which has not answered yet: gives up after {patience} s without a word"
        ),
        read => format!(
            "waiting for more from {url}, after {read} events: gives up after {patience} s without any"
        ),
    }
}

fn unread(error: BusError) -> CliError {
    match error {
        BusError::Unreachable(why) => CliError::NoServer(why),
        // A server's option has the same settings.
        error => failed(error.to_string().replace("--bus", "the URL")),
    }
}

fn extent_of(extent: bus::kafka::Extent) -> Extent {
    let holes = extent.holes.iter().map(|hole| Hole {
        missing: hole.missing,
        bucket: hole.bucket,
        needed_by: hole.needed_by,
    });
    Extent {
        whole: extent.whole,
        last: extent.last,
        records: extent.records,
        repeated: extent.repeated,
        holes: holes.collect(),
        unreadable: extent.unreadable,
    }
}
