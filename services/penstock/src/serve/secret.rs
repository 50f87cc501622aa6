//! Secrets that the processes of one installation share, given by reference so that they appear in
//! neither a command line nor a log.

use anyhow::{Context, bail};
use runtime::token::InternalToken;

/// Resolves a reference `env:NAME` or `file:PATH`.
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

/// The token by which processes of one installation trust each other.
pub fn internal_token(reference: &str) -> anyhow::Result<InternalToken> {
    let token = resolve(reference).context("--internal-token")?;
    InternalToken::new(&token).context("--internal-token")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_read_from_a_file_without_its_line_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "s3cret\n").unwrap();
        let read = resolve(&format!("file:{}", file.path().display())).unwrap();
        assert_eq!(read, "s3cret");
    }

    #[test]
    fn a_plain_text_secret_is_refused_and_not_echoed() {
        let error = resolve("s3cret").unwrap_err().to_string();
        assert!(!error.contains("s3cret"), "{error}");
    }
}
