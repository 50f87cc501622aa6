//! Stands for the log on Kafka in a binary that was built without it: there never is one.

use store::RawRecord;

use super::Extent;
use cli::error::CliError;

#[allow(dead_code, reason = "there never is one")]
pub struct KafkaLog {
    pub extent: Extent,
    never: std::convert::Infallible,
}

impl KafkaLog {
    pub async fn read(url: &str) -> Result<Self, CliError> {
        Err(CliError::Failed(format!(
            "{}: this binary was built without Kafka; `cargo build --release --bin penstock` makes one with it",
            super::shown(url)
        )))
    }

    pub fn page(&mut self, _: usize) -> Result<Vec<RawRecord>, CliError> {
        match self.never {}
    }
}
