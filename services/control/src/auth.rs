//! Who may do what: a bearer token, and the least role that the route asks for.

use std::net::SocketAddr;

use contract::events::AccessRole;
use contract::time::Timestamp;
use http::{HeaderMap, StatusCode, header};

use crate::access::{Access, Denied};
use crate::call::Principal;
use crate::error::ApiError;
use crate::table::Gate;

/// Lets the request through, as whom, or says why not.
pub fn authorize(
    gate: Gate,
    access: &Access,
    headers: &HeaderMap,
    peer: SocketAddr,
    now: Timestamp,
) -> Result<Option<Principal>, ApiError> {
    let least = match gate {
        Gate::Open => return Ok(None),
        Gate::Loopback if peer.ip().is_loopback() => return Ok(None),
        Gate::Loopback => AccessRole::Viewer,
        Gate::Role(role) => role,
    };
    let token = bearer(headers)?;
    let principal = access.check(token, now).map_err(|denied| {
        let detail = match denied {
            Denied::Unknown => "this token is not known, or was revoked; ask for a new one (`penstock access grant`)",
            Denied::Expired => "this token has expired; ask for a new one (`penstock access grant`)",
        };
        ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
    })?;
    if principal.role < least {
        let detail = format!(
            "this needs the role {}, and token `{}` has {}; use another token",
            word(least),
            principal.name,
            word(principal.role)
        );
        return Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", detail));
    }
    Ok(Some(principal))
}

pub fn word(role: AccessRole) -> &'static str {
    match role {
        AccessRole::Viewer => "viewer",
        AccessRole::Operator => "operator",
        AccessRole::Admin => "admin",
    }
}

fn bearer(headers: &HeaderMap) -> Result<&str, ApiError> {
    let missing = || {
        let detail = "a token is needed; send it as `Authorization: Bearer TOKEN`";
        ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
    };
    let value = headers.get(header::AUTHORIZATION).ok_or_else(missing)?;
    let text = value.to_str().map_err(|_| missing())?;
    let (scheme, token) = text.split_once(' ').ok_or_else(missing)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(missing());
    }
    Ok(token.trim())
}
