//! Tokens: a name, a role, an expiry. Only hashes are stored.
//!
//! Invariants: a token is 256 random bits and is shown once; a check compares hashes in constant
//! time; a token gives no access once it is revoked or expired.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use contract::events::{AccessGranted, AccessRevoked, AccessRole, Event};
use contract::ids::Position;
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::Timestamp;
use runtime::clock::Clock;
use runtime::ids::Ids;
use store::{Append, Commit, CommitError, Committed, IdempotencyKey, Store, StoreError};
use subtle::ConstantTimeEq;

use crate::call::Principal;
use crate::error::ApiError;
use crate::seal::hash;

/// Maximum number of tokens; nobody keeps track of more.
pub const TOKENS_MAX: usize = 1000;
/// The name of the token that the first start creates and stores in `client.json`.
pub const FIRST_TOKEN: &str = "admin";
const PAGE: usize = 1000;
/// Lets secret scanners recognize leaked tokens.
const PREFIX: &str = "penstock_";

#[derive(Default)]
struct TokenRegistry {
    version: u64,
    position: Position,
    tokens: BTreeMap<String, AccessGranted>,
}

impl TokenRegistry {
    /// Applies a record of the stream, unless it was applied before.
    fn apply(&mut self, record: &Record) {
        if record.version <= self.version {
            return;
        }
        match &record.event {
            Event::AccessGranted(granted) => {
                self.tokens.insert(granted.name.clone(), granted.clone());
            }
            Event::AccessRevoked(revoked) => {
                self.tokens.remove(&revoked.name);
            }
            _ => {}
        }
        self.version = record.version;
        self.position = record.position;
    }
}

pub struct AccessTokens {
    store: Store,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn Ids>,
    registry: RwLock<TokenRegistry>,
    /// Held while writing to the stream.
    write_lock: tokio::sync::Mutex<()>,
}

/// Builds the sealed response that is stored with an idempotency key, given the new token.
pub type SealResponse<'a> = &'a (dyn Fn(&str) -> Result<String, ApiError> + Sync);

/// Why a bearer token was rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    Unknown,
    Expired,
}

impl AccessTokens {
    pub async fn open(
        store: Store,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn Ids>,
    ) -> Result<Self, StoreError> {
        let access = Self {
            store,
            clock,
            ids,
            registry: RwLock::default(),
            write_lock: tokio::sync::Mutex::default(),
        };
        access.catch_up().await?;
        Ok(access)
    }

    /// Applies a record of the log, whichever replica wrote it: a token that is revoked through one
    /// replica is rejected by the others as well.
    pub fn apply(&self, record: &Record) {
        if record.stream.kind() == Some(StreamKind::Access) {
            let mut registry = self
                .registry
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            registry.apply(record);
        }
    }

    async fn catch_up(&self) -> Result<(), StoreError> {
        loop {
            let after = self.read().version;
            let records = self
                .store
                .read_stream(&StreamName::access(), after, PAGE)
                .await?;
            let mut registry = self
                .registry
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            records.iter().for_each(|record| registry.apply(record));
            if records.len() < PAGE {
                return Ok(());
            }
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, TokenRegistry> {
        self.registry.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the principal of a token. Compares every known hash, so that timing reveals nothing.
    pub fn check(&self, token: &str, now: Timestamp) -> Result<Principal, Denied> {
        let presented = hash(token);
        let registry = self.read();
        let mut found = None;
        for granted in registry.tokens.values() {
            if bool::from(granted.hash.as_bytes().ct_eq(presented.as_bytes())) {
                found = Some(granted);
            }
        }
        let granted = found.ok_or(Denied::Unknown)?;
        if granted.expires.is_some_and(|expires| expires <= now) {
            return Err(Denied::Expired);
        }
        Ok(Principal {
            name: granted.name.clone(),
            role: granted.role,
        })
    }

    /// Creates a token and returns it. Only its hash is stored.
    pub async fn grant(
        &self,
        name: &str,
        role: AccessRole,
        expires: Option<Timestamp>,
        actor: Actor,
        idempotency_key: Option<(IdempotencyKey, SealResponse<'_>)>,
    ) -> Result<(String, Position), ApiError> {
        let _guard = self.write_lock.lock().await;
        self.catch_up().await?;
        {
            let registry = self.read();
            if let Some(granted) = registry.tokens.get(name) {
                let is_valid = granted
                    .expires
                    .is_none_or(|expires| expires > self.clock.now());
                if is_valid {
                    return Err(ApiError::conflict(
                        "exists",
                        format!(
                            "there is already a token `{name}`; revoke it first, or choose another name"
                        ),
                    ));
                }
            }
            if registry.tokens.len() >= TOKENS_MAX {
                return Err(ApiError::conflict(
                    "limit-reached",
                    format!(
                        "the limit of {TOKENS_MAX} tokens is reached; revoke one that is no longer used"
                    ),
                ));
            }
        }
        let token = format!("{PREFIX}{}", hex::encode(self.ids.secret()));
        let event = Event::AccessGranted(AccessGranted {
            name: name.to_owned(),
            role,
            hash: hash(&token),
            expires,
        });
        let idempotency_key = match idempotency_key {
            None => None,
            Some((mut idempotency_key, seal_response)) => {
                idempotency_key.result = Some(seal_response(&token)?);
                Some(idempotency_key)
            }
        };
        let position = self.append(event, actor, idempotency_key).await?;
        Ok((token, position))
    }

    pub async fn revoke(&self, name: &str, actor: Actor) -> Result<Position, ApiError> {
        let _guard = self.write_lock.lock().await;
        self.catch_up().await?;
        {
            let registry = self.read();
            let Some(granted) = registry.tokens.get(name) else {
                return Err(ApiError::not_found(format!(
                    "there is no token `{name}`; nothing was revoked"
                )));
            };
            let now = self.clock.now();
            let is_active_admin = |t: &&AccessGranted| {
                t.role == AccessRole::Admin && t.expires.is_none_or(|e| e > now)
            };
            let others = registry
                .tokens
                .values()
                .filter(|t| t.name != name)
                .filter(is_active_admin)
                .count();
            if is_active_admin(&granted) && others == 0 {
                return Err(ApiError::conflict(
                    "last-admin",
                    "this is the last token with the role admin; grant another one first",
                ));
            }
        }
        let event = Event::AccessRevoked(AccessRevoked {
            name: name.to_owned(),
        });
        self.append(event, actor, None).await
    }

    async fn append(
        &self,
        event: Event,
        actor: Actor,
        idempotency_key: Option<IdempotencyKey>,
    ) -> Result<Position, ApiError> {
        let now = self.clock.now();
        let append = Append {
            stream: StreamName::access(),
            expected_version: self.read().version,
            events: vec![NewEvent {
                id: self.ids.event_id(now),
                time: now,
                actor,
                event,
            }],
        };
        let commit = Commit {
            appends: vec![append],
            idempotency_key,
            ..Commit::default()
        };
        match self.store.commit(commit).await {
            Ok(Committed::Written { records }) => {
                let mut registry = self
                    .registry
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                records.iter().for_each(|record| registry.apply(record));
                let written = records.last().map(|record| record.position);
                Ok(written.unwrap_or(registry.position))
            }
            Ok(Committed::Duplicate { .. }) => Err(ApiError::conflict(
                "changed-meanwhile",
                "the same request is already in progress; repeat it to see the result",
            )),
            Err(error) => {
                if matches!(error, CommitError::Conflict { .. }) {
                    self.catch_up().await?;
                }
                Err(error.into())
            }
        }
    }

    /// Returns the token of `client.json` if it is still a valid admin token, and a new one otherwise.
    /// A lost token of the same name is revoked. Each named replica has its own file and token.
    pub async fn first_token(
        &self,
        stored: Option<String>,
        replica: Option<&str>,
    ) -> Result<String, ApiError> {
        let name = match replica {
            None => FIRST_TOKEN.to_owned(),
            Some(replica) => format!("{FIRST_TOKEN}-{replica}"),
        };
        let now = self.clock.now();
        if let Some(token) = stored
            && self
                .check(&token, now)
                .is_ok_and(|p| p.role == AccessRole::Admin)
        {
            return Ok(token);
        }
        let exists = self.read().tokens.contains_key(&name);
        if exists {
            let _guard = self.write_lock.lock().await;
            let event = Event::AccessRevoked(AccessRevoked { name: name.clone() });
            self.append(event, Actor::service("control"), None).await?;
        }
        let actor = Actor::service("control");
        let granted = self
            .grant(&name, AccessRole::Admin, None, actor, None)
            .await?;
        Ok(granted.0)
    }
}
