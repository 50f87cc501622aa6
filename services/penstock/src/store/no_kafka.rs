//! A stub of the log on Kafka for binaries built without it; it is never constructed.

use store::RawRecord;

use super::Extent;
use cli::error::CliError;

#[allow(dead_code, reason = "never constructed")]
pub struct KafkaLog {
    pub extent: Extent,
    never: std::convert::Infallible,
}

impl KafkaLog {
    pub async fn read(url: &str) -> Result<Self, CliError> {
        Err(CliError::Failed(format!(
            "{}: this binary was built without Kafka; `cargo build --release --bin penstock` builds one with it",
            super::without_options(url)
        )))
    }

    pub fn page(&mut self, _: usize) -> Result<Vec<RawRecord>, CliError> {
        match self.never {}
    }
}
