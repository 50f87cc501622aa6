//! Historical measurements: owned by the meter, shown by control.

use control::{HistoryQuery, HistorySource, SourceError};
use meter::{History, Query};

/// The meter's history, as control's [`HistorySource`].
pub struct MeterHistory {
    history: History,
}

impl MeterHistory {
    pub fn new(history: History) -> Self {
        Self { history }
    }
}

#[async_trait::async_trait]
impl HistorySource for MeterHistory {
    async fn history(&self, query: HistoryQuery) -> Result<Vec<serde_json::Value>, SourceError> {
        let query = Query {
            endpoint: query.endpoint,
            deployment: query.deployment,
            from: query.from,
            to: query.to,
            step: query.step,
        };
        let failed = |error: String| SourceError::Failed(error);
        let points = self
            .history
            .points(&query)
            .await
            .map_err(|error| failed(error.to_string()))?;
        points
            .iter()
            .map(serde_json::to_value)
            .collect::<Result<_, _>>()
            .map_err(|error| failed(error.to_string()))
    }
}
