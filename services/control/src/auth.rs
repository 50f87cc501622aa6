//! Who may do what: a bearer token, and the least role that the route asks for.

use std::net::SocketAddr;

use contract::events::AccessRole;
use contract::time::Timestamp;
use http::{HeaderMap, StatusCode, header};
use runtime::token::InternalToken;

use crate::access::{Access, Denied};
use crate::call::Principal;
use crate::error::ApiError;
use crate::table::Gate;

/// Lets the request through, as whom, or says why not.
pub fn authorize(
    gate: Gate,
    access: &Access,
    headers: &HeaderMap,
    is_ours: bool,
    now: Timestamp,
) -> Result<Option<Principal>, ApiError> {
    let least = match gate {
        Gate::Open => return Ok(None),
        Gate::Loopback | Gate::Health if is_ours => return Ok(None),
        // A load balancer asks without a token; a wrong one is as good as none.
        Gate::Health => {
            let known = bearer(headers).ok();
            return Ok(known.and_then(|token| access.check(token, now).ok()));
        }
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

/// Whether this machine asks, or another process of this installation.
pub fn is_ours(token: Option<&InternalToken>, headers: &HeaderMap, peer: SocketAddr) -> bool {
    peer.ip().is_loopback() || token.is_some_and(|token| token.is_in(headers))
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

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn from_another_machine_only_the_internal_token_itself_is_ours() {
        let token = InternalToken::new("a token of this one installation").unwrap();
        let elsewhere: SocketAddr = "10.0.0.5:40000".parse().unwrap();
        let given = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_static(value));
            headers
        };
        let right = given("Bearer a token of this one installation");
        assert!(is_ours(Some(&token), &right, elsewhere));
        assert!(!is_ours(None, &right, elsewhere));
        for wrong in [
            "Bearer a token of this one installatioN",
            "a token of this one installation",
            "Bearer ",
        ] {
            assert!(!is_ours(Some(&token), &given(wrong), elsewhere), "{wrong}");
        }
        assert!(!is_ours(Some(&token), &HeaderMap::new(), elsewhere));
        let here: SocketAddr = "127.0.0.1:40000".parse().unwrap();
        assert!(is_ours(None, &HeaderMap::new(), here));
    }
}
