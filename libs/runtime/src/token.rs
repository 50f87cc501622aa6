//! The token by which the processes of one installation authenticate each other.
//!
//! Invariant: the token is never printed, and comparisons take constant time.

use std::sync::Arc;

use http::{HeaderMap, header};
use subtle::ConstantTimeEq;

/// The minimum length of a token; a shorter one could be guessed.
pub const TOKEN_BYTES_MIN: usize = 32;

/// The shared secret of an installation.
#[derive(Clone)]
pub struct InternalToken(Arc<str>);

/// Why a token is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is too short, and could be guessed.
    #[error(
        "the internal token is shorter than {TOKEN_BYTES_MIN} characters; generate one with `openssl rand -hex 32`"
    )]
    Short,
}

impl InternalToken {
    /// Creates the token from its configured value; surrounding white space is ignored.
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

    /// The token itself, for sending; never log it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the headers of a request carry the token.
    pub fn is_in(&self, headers: &HeaderMap) -> bool {
        let header = headers.get(header::AUTHORIZATION);
        let token = header.and_then(|header| header.as_bytes().strip_prefix(b"Bearer "));
        token.is_some_and(|token| bool::from(token.ct_eq(self.0.as_bytes())))
    }
}

impl std::fmt::Debug for InternalToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InternalToken")
    }
}
