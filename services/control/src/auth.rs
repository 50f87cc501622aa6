//! Authorization: a bearer token, and the minimum role that the route requires.

use std::net::SocketAddr;

use contract::events::AccessRole;
use contract::time::Timestamp;
use http::{HeaderMap, StatusCode, header};
use runtime::token::InternalToken;

use crate::access::{AccessTokens, Denied};
use crate::call::Principal;
use crate::error::ApiError;
use crate::table::Gate;

/// Authorizes a request and returns its principal, if it has one.
///
/// # Errors
/// 401 without a valid token, 403 if the role of the token is too low.
pub fn authorize(
    gate: Gate,
    access: &AccessTokens,
    headers: &HeaderMap,
    is_trusted_peer: bool,
    now: Timestamp,
) -> Result<Option<Principal>, ApiError> {
    let required = match gate {
        Gate::Open => return Ok(None),
        Gate::Loopback | Gate::Health if is_trusted_peer => return Ok(None),
        // Load balancers send no token; an invalid token is treated as none.
        Gate::Health => {
            let token = bearer(headers).ok();
            return Ok(token.and_then(|token| access.check(token, now).ok()));
        }
        Gate::Loopback => AccessRole::Viewer,
        Gate::Role(role) => role,
    };
    let token = bearer(headers)?;
    let principal = access.check(token, now).map_err(|denied| {
        let detail = match denied {
            Denied::Unknown => {
                "this token is unknown or was revoked; ask for a new one (`penstock access grant`)"
            }
            Denied::Expired => {
                "this token has expired; ask for a new one (`penstock access grant`)"
            }
        };
        ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
    })?;
    if principal.role < required {
        let detail = format!(
            "this requires the role {}, but token `{}` has {}; use another token",
            role_name(required),
            principal.name,
            role_name(principal.role)
        );
        return Err(ApiError::new(StatusCode::FORBIDDEN, "forbidden", detail));
    }
    Ok(Some(principal))
}

/// Whether the request comes from this machine, or from another process of this installation.
pub fn is_trusted_peer(
    token: Option<&InternalToken>,
    headers: &HeaderMap,
    peer: SocketAddr,
) -> bool {
    peer.ip().is_loopback() || token.is_some_and(|token| token.is_in(headers))
}

pub fn role_name(role: AccessRole) -> &'static str {
    match role {
        AccessRole::Viewer => "viewer",
        AccessRole::Operator => "operator",
        AccessRole::Admin => "admin",
    }
}

fn bearer(headers: &HeaderMap) -> Result<&str, ApiError> {
    let missing = || {
        let detail = "this requires a token; send it as `Authorization: Bearer TOKEN`";
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

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn from_another_machine_only_the_exact_internal_token_is_trusted() {
        let token = InternalToken::new("a token of this one installation").unwrap();
        let remote: SocketAddr = "10.0.0.5:40000".parse().unwrap();
        let with_header = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_static(value));
            headers
        };
        let valid = with_header("Bearer a token of this one installation");
        assert!(is_trusted_peer(Some(&token), &valid, remote));
        assert!(!is_trusted_peer(None, &valid, remote));
        for invalid in [
            "Bearer a token of this one installatioN",
            "a token of this one installation",
            "Bearer ",
        ] {
            assert!(
                !is_trusted_peer(Some(&token), &with_header(invalid), remote),
                "{invalid}"
            );
        }
        assert!(!is_trusted_peer(Some(&token), &HeaderMap::new(), remote));
        let loopback: SocketAddr = "127.0.0.1:40000".parse().unwrap();
        assert!(is_trusted_peer(None, &HeaderMap::new(), loopback));
    }
}
