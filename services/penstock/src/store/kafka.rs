//! The log as read from Kafka, in order of position.
//!
//! Invariant: events are returned exactly as published, which is as stored, whether or not this release
//! can decode them; memory use does not depend on the length of the log.

use bus::BusError;
use bus::kafka::{KafkaConfig, LogItem, LogReader, read_log};
use store::RawRecord;

use super::external_sort::{ExternalSorter, SortedEvents};
use super::slow_notice::notice_if_slow;
use super::{Extent, Gap, Progress, failed, without_options};
use cli::error::CliError;

pub struct KafkaLog {
    pub extent: Extent,
    sorted: SortedEvents,
    url: String,
}

impl KafkaLog {
    /// Reads the topics to their end.
    pub async fn read(url: &str) -> Result<Self, CliError> {
        let config = KafkaConfig::parse(url).map_err(|error| {
            // The message names the server's option.
            CliError::Usage(error.to_string().replacen("--bus ", "", 1)).caused_by(error)
        })?;
        let mut reader = read_log(&config);
        let mut sorter = ExternalSorter::default();
        let mut progress = Progress::new("events read from Kafka");
        let mut read = 0;
        while let Some(item) = notice_if_slow(reader.next(), || waiting_notice(url, read)).await {
            match item.map_err(read_error)? {
                LogItem::Event(event) | LogItem::Repeated(event) => {
                    sorter.push(event).map_err(failed)?;
                    read += 1;
                    progress.count(read);
                }
                LogItem::End(extent) => {
                    return Ok(Self {
                        extent: convert_extent(extent),
                        sorted: sorter.sorted().map_err(failed)?,
                        url: without_options(url).to_owned(),
                    });
                }
            }
        }
        Err(CliError::Failed(
            "the log on Kafka cannot be read to its end".to_owned(),
        ))
    }

    /// The next events in order of position; empty at the end.
    pub fn page(&mut self, limit: usize) -> Result<Vec<RawRecord>, CliError> {
        let mut page = Vec::with_capacity(limit);
        while page.len() < limit {
            let next = self.sorted.next();
            let next = next.map_err(|error| {
                CliError::Failed(format!("{}: {error}", self.url)).caused_by(error)
            })?;
            let Some(event) = next else { break };
            page.push(event);
        }
        Ok(page)
    }
}

fn waiting_notice(url: &str, read: u64) -> String {
    let (url, patience) = (without_options(url), LogReader::PATIENCE.as_secs());
    match read {
        0 => format!(
            "waiting for {url}, which has not answered yet: gives up after {patience} s without a response"
        ),
        read => format!(
            "waiting for more from {url}, after {read} events: gives up after {patience} s without any"
        ),
    }
}

fn read_error(error: BusError) -> CliError {
    match error {
        BusError::Unreachable(why) => CliError::NoServer(why),
        // The message names the server's option.
        error => CliError::Failed(error.to_string().replace("--bus", "the URL")).caused_by(error),
    }
}

fn convert_extent(extent: bus::kafka::Extent) -> Extent {
    let gaps = extent.gaps.iter().map(|gap| Gap {
        missing: gap.missing,
        bucket: gap.bucket,
        needed_by: gap.needed_by,
    });
    Extent {
        contiguous: extent.contiguous,
        last: extent.last,
        records: extent.records,
        repeated: extent.repeated,
        gaps: gaps.collect(),
        unreadable: extent.unreadable,
    }
}
