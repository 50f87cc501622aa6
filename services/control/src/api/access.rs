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

use super::{Filter, first_answer, kept, rows};
use crate::access::Keep;
use crate::answer::{Answer, at, json};
use crate::call::Call;
use crate::error::ApiError;
use crate::service::App;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Grant {
    pub name: Name,
    pub role: AccessRole,
    /// Left out: never.
    #[serde(default)]
    pub expires: Option<Timestamp>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Granted {
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

pub async fn list(app: Arc<App>, call: Call) -> Answer {
    let filter = Filter::of(ReadModel::Access, &call)?;
    json(StatusCode::OK, &rows(&app, filter, call.page()?).await?)
}

pub async fn grant(app: Arc<App>, call: Call) -> Answer {
    let Grant {
        name,
        role,
        expires,
    } = call.typed()?;
    if expires.is_some_and(|expires| expires <= call.now) {
        let detail =
            "this moment has passed; name a later one, or none for a token that does not expire";
        return Err(ApiError::invalid(vec![Finding::new("/expires", detail)]));
    }
    if let Some(answer) = first_answer(&app, &call).await? {
        return Ok(answer);
    }
    let granted = |token: &str| Granted {
        name: name.clone(),
        role,
        expires,
        token: token.to_owned(),
    };
    let cause = call.cause()?;
    let key = cause
        .as_ref()
        .map(|cause| cause.key.clone())
        .unwrap_or_default();
    let result = |token: &str| kept(&app, &key, StatusCode::CREATED, &granted(token));
    let cause = cause.map(|cause| (cause, &result as Keep<'_>));
    let (token, position) = app
        .access
        .grant(name.as_str(), role, expires, call.actor(), cause)
        .await?;
    Ok(at(json(StatusCode::CREATED, &granted(&token))?, position))
}

pub async fn revoke(app: Arc<App>, call: Call) -> Answer {
    let name = call.name("name")?;
    let position = app.access.revoke(name.as_str(), call.actor()).await?;
    Ok(at(json(StatusCode::OK, &Revoked { name })?, position))
}
