//! Moving old events of the log into archives.

use std::sync::Arc;

use contract::ids::Position;
use contract::time::{Span, Timestamp};
use http::StatusCode;
use runtime::archive::{ArchiveError, archive as seal_under_lease};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use store::{SealLimits, Sealable, SealedFile, StoreError, sealable};

use crate::app::App;
use crate::call::Call;
use crate::error::ApiError;
use crate::response::{ApiResult, json};
use crate::table::{ADMIN, Content, RouteEntry, route, schema};

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(POST "/v1/archive" "archive" ADMIN, "Move old events of the log into archives, from which they are read as before",
            Content::Json(schema::<ArchiveReport>), archive, body schema::<ArchiveRequest>),
    ]
}

/// The minimum age of archived events if a request sets no limit.
pub const DEFAULT_AGE: Span = Span::from_secs(30 * 24 * 3600);

/// What to archive. All given limits apply.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ArchiveRequest {
    /// Only events older than this; 30d unless `before` is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_than: Option<Span>,
    /// Only events below this position.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Position>,
    /// Minimum number of events per file.
    #[serde(default)]
    pub min_events: u64,
    /// Only return what would be archived.
    #[serde(default)]
    pub dry_run: bool,
}

impl ArchiveRequest {
    pub fn limits(&self, now: Timestamp) -> SealLimits {
        let age = match self.before {
            Some(_) => self.older_than,
            None => Some(self.older_than.unwrap_or(DEFAULT_AGE)),
        };
        SealLimits {
            before: self.before,
            older_than: age.map(|age| now - age),
            events_min: self.min_events,
            ..SealLimits::default()
        }
    }
}

/// What a request archived, and what could be archived when it began.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArchiveReport {
    /// Files sealed by this request.
    pub sealed: Vec<SealedFile>,
    #[serde(flatten)]
    pub sealable: Sealable,
    pub is_dry_run: bool,
}

pub async fn archive(app: Arc<App>, call: Call) -> ApiResult {
    let request: ArchiveRequest = call.parse_body()?;
    let limits = request.limits(call.now);
    let sealable = sealable(&app.deps.store, &limits).await?;
    let sealed = match request.dry_run {
        true => Vec::new(),
        // A task, so that it ends in order if the client goes away.
        false => tokio::spawn(async move {
            let holder = app.deps.ids.uid().to_string();
            seal_under_lease(&app.deps.store, &holder, &limits, call.now).await
        })
        .await
        .map_err(ApiError::internal)??,
    };
    let report = ArchiveReport {
        sealed,
        sealable,
        is_dry_run: request.dry_run,
    };
    json(StatusCode::OK, &report)
}

impl From<ArchiveError> for ApiError {
    fn from(error: ArchiveError) -> Self {
        match error {
            ArchiveError::Busy => Self::conflict("archiving", error.to_string()),
            ArchiveError::Store(StoreError::Closed) => StoreError::Closed.into(),
            // Says what is wrong with the folder or a file, for an administrator.
            ArchiveError::Store(error) => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "archiving-failed",
                error.to_string(),
            ),
        }
    }
}
