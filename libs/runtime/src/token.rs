//! The token by which the processes of one installation trust each other.
//!
//! Invariant: it is never printed, and comparing it takes as long whatever is given.

use std::sync::Arc;

use http::{HeaderMap, header};
use subtle::ConstantTimeEq;

/// Shortest token that is taken; a shorter one could be guessed.
pub const TOKEN_BYTES_MIN: usize = 32;

/// What the processes of an installation know each other by.
#[derive(Clone)]
pub struct InternalToken(Arc<str>);

/// Why a text is no token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It could be guessed.
    #[error(
        "the internal token is shorter than {TOKEN_BYTES_MIN} characters; make one with `openssl rand -hex 32`"
    )]
    Short,
}

impl InternalToken {
    /// Takes the token as it was configured; white space around it does not count.
    ///
    /// # Errors
    ///
    /// [`TokenError::Short`] below [`TOKEN_BYTES_MIN`] bytes.
    pub fn new(token: &str) -> Result<Self, TokenError> {
        let token = token.trim();
        if token.len() < TOKEN_BYTES_MIN {
            return Err(TokenError::Short);
        }
        Ok(Self(token.into()))
    }

    /// The token itself, to be sent and not to be shown.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether these headers of a request carry it.
    pub fn is_in(&self, headers: &HeaderMap) -> bool {
        let header = headers.get(header::AUTHORIZATION);
        let given = header.and_then(|header| header.as_bytes().strip_prefix(b"Bearer "));
        given.is_some_and(|given| bool::from(given.ct_eq(self.0.as_bytes())))
    }
}

impl std::fmt::Debug for InternalToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InternalToken")
    }
}
