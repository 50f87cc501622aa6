//! Historical measurements: owned by the meter, shown by control, and read by the autoscaler to refill windows.

use autoscaler::{PastError, PastRequest, PastSource};
use control::{HistoryQuery, HistorySource, SourceError};
use domain::measure::Past;
use meter::{HistoryLocation, HistoryStore, PastQuery, PointsQuery};
use tokio::sync::OnceCell;

/// The meter's history, as control's [`HistorySource`].
pub struct MeterHistory {
    history: HistoryStore,
}

impl MeterHistory {
    pub fn new(history: HistoryStore) -> Self {
        Self { history }
    }
}

#[async_trait::async_trait]
impl HistorySource for MeterHistory {
    async fn history(&self, query: HistoryQuery) -> Result<Vec<serde_json::Value>, SourceError> {
        let query = PointsQuery {
            endpoint: query.endpoint,
            deployment: query.deployment,
            from: query.from,
            to: query.to,
            step: query.step,
        };
        let points = self
            .history
            .points(&query)
            .await
            .map_err(|error| SourceError::Failed(error.into()))?;
        points
            .iter()
            .map(serde_json::to_value)
            .collect::<Result<_, _>>()
            .map_err(|error| SourceError::Failed(error.into()))
    }
}

/// The meter's history, as the autoscaler's [`PastSource`].
pub struct MeterPast {
    location: HistoryLocation,
    history: OnceCell<HistoryStore>,
}

impl MeterPast {
    /// That of a meter in this process, or of meters in others, which is opened when it is first needed.
    pub fn new(location: HistoryLocation, own: Option<HistoryStore>) -> Self {
        Self {
            location,
            history: OnceCell::new_with(own),
        }
    }
}

#[async_trait::async_trait]
impl PastSource for MeterPast {
    async fn past(&self, request: &PastRequest) -> Result<Past, PastError> {
        let open = || HistoryStore::open_read_only(&self.location);
        let history = self.history.get_or_try_init(open).await?;
        let query = PastQuery {
            endpoint: request.endpoint.clone(),
            deployment: request.deployment.clone(),
            created_at: request.created_at,
            from: request.from,
        };
        Ok(history.past(&query).await?)
    }
}
