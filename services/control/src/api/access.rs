//! Tokens.

use std::sync::Arc;

use contract::events::AccessRole;
use contract::ids::Name;
use contract::problem::Finding;
use contract::time::Timestamp;
use domain::views::ReadModel;
use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Filter, list_rows, seal_response, stored_response};
use crate::access::SealResponse;
use crate::app::App;
use crate::call::Call;
use crate::error::ApiError;
use crate::response::{ApiResult, List, json, with_position};
use crate::table::{ADMIN, Content, IDEMPOTENT, PAGED, RouteEntry, route, schema};
use contract::views::AccessView;

/// The routes of this module.
pub(super) fn routes() -> Vec<RouteEntry> {
    vec![
        route!(GET "/v1/access" "listAccess" ADMIN, "Tokens, without their secrets",
            Content::Json(schema::<List<AccessView>>), list, query PAGED),
        route!(POST "/v1/access" "grantAccess" ADMIN, "Create a token; it is shown once",
            Content::Json(schema::<GrantedToken>), grant, headers &[IDEMPOTENT], body schema::<Grant>, statuses &[201]),
        route!(DELETE "/v1/access/{name}" "revokeAccess" ADMIN, "Revoke a token",
            Content::Json(schema::<Revoked>), revoke),
    ]
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Grant {
    pub name: Name,
    pub role: AccessRole,
    /// Omitted: the token never expires.
    #[serde(default)]
    pub expires: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(rename = "Granted")]
pub struct GrantedToken {
    pub name: Name,
    pub role: AccessRole,
    pub expires: Option<Timestamp>,
    /// Shown here and never again.
    pub token: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Revoked {
    pub name: Name,
}

pub async fn list(app: Arc<App>, call: Call) -> ApiResult {
    let filter = Filter::from_query(ReadModel::Access, &call)?;
    json(
        StatusCode::OK,
        &list_rows(&app, filter, call.page()?).await?,
    )
}

pub async fn grant(app: Arc<App>, call: Call) -> ApiResult {
    let Grant {
        name,
        role,
        expires,
    } = call.parse_body()?;
    if expires.is_some_and(|expires| expires <= call.now) {
        let detail =
            "this time has passed; give a later one, or omit it for a token that does not expire";
        return Err(ApiError::invalid(vec![Finding::new("/expires", detail)]));
    }
    if let Some(response) = stored_response(&app, &call).await? {
        return Ok(response);
    }
    let granted = |token: &str| GrantedToken {
        name: name.clone(),
        role,
        expires,
        token: token.to_owned(),
    };
    let idempotency_key = call.idempotency_key()?;
    let key = idempotency_key
        .as_ref()
        .map(|idempotency_key| idempotency_key.key.clone())
        .unwrap_or_default();
    let build_response =
        |token: &str| seal_response(&app, &key, StatusCode::CREATED, &granted(token));
    let idempotency_key = idempotency_key
        .map(|idempotency_key| (idempotency_key, &build_response as SealResponse<'_>));
    let (token, position) = app
        .access
        .grant(name.as_str(), role, expires, call.actor(), idempotency_key)
        .await?;
    Ok(with_position(
        json(StatusCode::CREATED, &granted(&token))?,
        position,
    ))
}

pub async fn revoke(app: Arc<App>, call: Call) -> ApiResult {
    let name = call.name("name")?;
    let position = app.access.revoke(name.as_str(), call.actor()).await?;
    Ok(with_position(
        json(StatusCode::OK, &Revoked { name })?,
        position,
    ))
}
