//! Secrets that processes of one installation share, given by reference so that they stand neither in
//! a command line nor in a log.

use std::fmt;
use std::sync::Arc;

use anyhow::{Context, bail};
use axum::http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Fewer characters could be guessed.
const TOKEN_CHARS_MIN: usize = 32;

/// Reads what `env:NAME` or `file:PATH` refers to.
pub fn resolve(reference: &str) -> anyhow::Result<String> {
    let text = if let Some(name) = reference.strip_prefix("env:") {
        std::env::var(name).with_context(|| format!("the variable {name} cannot be read"))?
    } else if let Some(path) = reference.strip_prefix("file:") {
        std::fs::read_to_string(path).with_context(|| format!("{path} cannot be read"))?
    } else {
        bail!("a secret is given by reference: write env:NAME or file:PATH");
    };
    Ok(text.trim().to_owned())
}

/// By which processes of one installation trust each other.
#[derive(Clone)]
pub struct InternalToken {
    token: Arc<str>,
}

impl fmt::Debug for InternalToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InternalToken(…)")
    }
}

impl InternalToken {
    pub fn read(reference: &str) -> anyhow::Result<Self> {
        let token = resolve(reference).context("--internal-token")?;
        if token.chars().count() < TOKEN_CHARS_MIN {
            bail!(
                "--internal-token: {reference} holds fewer than {TOKEN_CHARS_MIN} characters; make one with: openssl rand -hex 32"
            );
        }
        Ok(Self {
            token: token.into(),
        })
    }

    pub fn text(&self) -> &str {
        &self.token
    }

    pub fn is_sent_in(&self, headers: &HeaderMap) -> bool {
        let sent = headers.get(header::AUTHORIZATION);
        let sent = sent.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        // Hashes are of one length, so the comparison tells nothing about the token.
        sent.is_some_and(|sent| {
            let ours = Sha256::digest(self.token.as_bytes());
            Sha256::digest(sent.trim().as_bytes()).ct_eq(&ours).into()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> anyhow::Result<InternalToken> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        InternalToken::read(&format!("file:{}", file.path().display()))
    }

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn only_the_same_token_is_trusted() {
        let secret = "0123456789abcdef0123456789abcdef";
        let token = token(&format!("{secret}\n")).unwrap();
        assert!(token.is_sent_in(&headers(&format!("Bearer {secret}"))));
        assert!(!token.is_sent_in(&headers("Bearer 0123456789abcdef0123456789abcdee")));
        assert!(!token.is_sent_in(&HeaderMap::new()));
    }

    #[test]
    fn a_token_that_could_be_guessed_is_refused() {
        assert!(token("short").unwrap_err().to_string().contains("32"));
    }

    #[test]
    fn a_secret_in_clear_is_refused_and_not_repeated() {
        let refused = resolve("s3cret").unwrap_err().to_string();
        assert!(!refused.contains("s3cret"), "{refused}");
    }
}
