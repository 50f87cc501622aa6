//! Encryption of secrets that must be shown again: ChaCha20-Poly1305 with a key from control's data
//! directory, or one that replicas share. The log and the read models never hold secrets in plain text.

use std::error::Error;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{ChaCha20Poly1305, Key, Nonce};
use contract::events::SealedKey;
use runtime::ids::Ids;
use sha2::{Digest, Sha256};

const NONCE_BYTES: usize = 12;

pub struct Seal {
    cipher: ChaCha20Poly1305,
}

#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("the seal key {path} cannot be used: {detail}; restore the right file")]
    KeyFile {
        path: String,
        detail: String,
        source: Option<std::io::Error>,
    },
    /// Never repeats the given text unless it is clearly a reference: it may be the key itself.
    #[error("the seal key that --seal-key names cannot be used: {detail}")]
    Reference {
        detail: String,
        source: Option<std::io::Error>,
    },
    #[error("a sealed secret cannot be opened: it was changed, or sealed with another key")]
    Unreadable(#[source] Box<dyn Error + Send + Sync>),
    #[error("a secret cannot be sealed")]
    Unsealable(#[source] chacha20poly1305::Error),
}

impl Seal {
    /// Reads the key, or creates one on the first start.
    pub fn open(path: &Path, ids: &dyn Ids) -> Result<Self, SealError> {
        let fail = |detail: String, source| SealError::KeyFile {
            path: path.display().to_string(),
            detail,
            source,
        };
        let failed = |error: std::io::Error| fail(error.to_string(), Some(error));
        let key: [u8; 32] = match std::fs::read(path) {
            Ok(bytes) => {
                let count = bytes.len();
                let bad_length = |_| fail(format!("it has {count} bytes, but a key has 32"), None);
                bytes.try_into().map_err(bad_length)?
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = ids.secret();
                write_private(path, &key).map_err(failed)?;
                key
            }
            Err(error) => return Err(failed(error)),
        };
        Ok(Self::from_key(&key))
    }

    /// Reads a key that replicas share from `env:NAME` or `file:PATH`: 64 hexadecimal digits, or 32 raw
    /// bytes.
    pub fn from_reference(reference: &str) -> Result<Self, SealError> {
        let fail = |detail: String| SealError::Reference {
            detail,
            source: None,
        };
        let unreadable = |detail: String, source| SealError::Reference {
            detail,
            source: Some(source),
        };
        let bytes = match reference.split_once(':') {
            // The name of a missing variable is not repeated, since it may be the key itself.
            Some(("env", name)) => std::env::var_os(name)
                .map(std::os::unix::ffi::OsStringExt::into_vec)
                .ok_or_else(|| fail("env: names a variable that is not set".to_owned()))?,
            Some(("file", path)) if path.contains('/') => std::fs::read(path)
                .map_err(|error| unreadable(format!("{path}: {error}"), error))?,
            Some(("file", path)) => std::fs::read(path).map_err(|error| {
                let detail = format!("file: names a file that cannot be read: {error}");
                unreadable(detail, error)
            })?,
            _ => {
                return Err(fail(
                    "it must be a reference; write env:NAME or file:PATH".to_owned(),
                ));
            }
        };
        let key = match <[u8; 32]>::try_from(bytes.as_slice()) {
            Ok(key) => Some(key),
            Err(_) => hex::decode(bytes.trim_ascii())
                .ok()
                .and_then(|key| key.try_into().ok()),
        };
        let key = key.ok_or_else(|| {
            fail(
                "a key has 64 hexadecimal digits; create one with `openssl rand -hex 32`"
                    .to_owned(),
            )
        })?;
        Ok(Self::from_key(&key))
    }

    fn from_key(key: &[u8; 32]) -> Self {
        let cipher = ChaCha20Poly1305::new(Key::from_slice(key));
        Self { cipher }
    }

    /// Seals a secret. It is bound to `context`: what was sealed for one purpose opens for no other.
    pub fn seal(&self, text: &str, context: &str, ids: &dyn Ids) -> Result<String, SealError> {
        // A random nonce per message; 96 bits do not repeat in the lifetime of a log.
        let random = ids.secret();
        let nonce = Nonce::from_slice(&random[..NONCE_BYTES]);
        let payload = Payload {
            msg: text.as_bytes(),
            aad: context.as_bytes(),
        };
        let sealed = self.cipher.encrypt(nonce, payload);
        let sealed = sealed.map_err(SealError::Unsealable)?;
        Ok(STANDARD.encode([nonce.as_slice(), &sealed].concat()))
    }

    pub fn unseal(&self, sealed: &str, context: &str) -> Result<String, SealError> {
        let unreadable = |error: Box<dyn Error + Send + Sync>| SealError::Unreadable(error);
        let bytes = STANDARD
            .decode(sealed)
            .map_err(|error| unreadable(error.into()))?;
        let (nonce, msg) = bytes
            .split_at_checked(NONCE_BYTES)
            .ok_or_else(|| unreadable("it is too short".into()))?;
        let payload = Payload {
            msg,
            aad: context.as_bytes(),
        };
        let opened = self.cipher.decrypt(Nonce::from_slice(nonce), payload);
        let opened = opened.map_err(|error| unreadable(error.into()))?;
        // The error without the bytes, which are the secret.
        String::from_utf8(opened).map_err(|error| unreadable(error.utf8_error().into()))
    }

    /// Creates a key of 256 random bits: the hash that gateways check, and the sealed copy.
    pub fn new_key(&self, context: &str, ids: &dyn Ids) -> Result<SealedKey, SealError> {
        let text = hex::encode(ids.secret());
        Ok(SealedKey {
            hash: hash(&text),
            sealed: self.seal(&text, context, ids)?,
        })
    }
}

/// Returns the SHA-256 of a text, in hexadecimal.
pub fn hash(text: &str) -> String {
    hex::encode(Sha256::digest(text.as_bytes()))
}

/// Atomically writes a file that only its owner can read.
pub fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let draft = path.with_extension("draft");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    // A draft that a crash left behind keeps its old mode.
    file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::ids::SeededIds;

    #[test]
    fn a_sealed_secret_opens_only_with_the_same_key_and_context() {
        let dir = tempfile::tempdir().unwrap();
        let ids = SeededIds::new(1);
        let path = dir.path().join("seal.key");
        let sealed = {
            let seal = Seal::open(&path, &ids).unwrap();
            seal.seal("secret", "key/1", &ids).unwrap()
        };
        let reopened = Seal::open(&path, &ids).unwrap();
        assert_eq!(reopened.unseal(&sealed, "key/1").unwrap(), "secret");
        for unreadable in [sealed.as_str(), "not base64!", "AAAA"] {
            let error = reopened.unseal(unreadable, "key/2").unwrap_err();
            assert!(error.source().is_some(), "{unreadable}");
        }
        let other = Seal::open(&dir.path().join("other.key"), &ids).unwrap();
        assert!(other.unseal(&sealed, "key/1").is_err());
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_shared_key_can_be_raw_bytes_or_hexadecimal_digits() {
        let dir = tempfile::tempdir().unwrap();
        let ids = SeededIds::new(1);
        let path = dir.path().join("seal.key");
        let sealed = {
            let seal = Seal::open(&path, &ids).unwrap();
            seal.seal("secret", "key/1", &ids).unwrap()
        };
        let shared = dir.path().join("shared");
        let digits = hex::encode(std::fs::read(&path).unwrap());
        std::fs::write(&shared, format!("{digits}\n")).unwrap();
        for path in [path, shared] {
            let seal = Seal::from_reference(&format!("file:{}", path.display())).unwrap();
            assert_eq!(seal.unseal(&sealed, "key/1").unwrap(), "secret");
        }
    }

    #[test]
    fn a_reference_without_a_key_is_refused() {
        for reference in [
            "seal.key",
            "env:NO_SUCH_VARIABLE_AT_ALL",
            "file:/no/such/file",
            "file:/dev/null",
        ] {
            assert!(Seal::from_reference(reference).is_err(), "{reference}");
        }
    }

    #[test]
    fn a_key_given_instead_of_a_reference_is_not_repeated() {
        let key = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
        for given in [key.to_owned(), format!("env:{key}"), format!("file:{key}")] {
            let error = Seal::from_reference(&given).err().unwrap();
            for text in [error.to_string(), format!("{error:?}")] {
                assert!(!text.contains(key), "{text}");
            }
        }
        let error = Seal::from_reference("file:/no/such/key").err().unwrap();
        assert!(std::error::Error::source(&error).is_some(), "{error:?}");
        assert!(error.to_string().contains("/no/such/key"), "{error}");
    }

    #[test]
    fn a_broken_key_file_is_refused_and_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seal.key");
        std::fs::write(&path, b"short").unwrap();
        assert!(Seal::open(&path, &SeededIds::new(1)).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"short");
    }
}
