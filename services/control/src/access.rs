//! Tokens: a name, a role, an expiry. Only hashes are stored.
//!
//! Invariants: a token is 256 random bits and is shown once; a check compares hashes in constant
//! time; a token that is revoked or expired opens nothing from that moment on.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use contract::events::{AccessGranted, AccessRevoked, AccessRole, Event};
use contract::ids::Position;
use contract::log::{Actor, NewEvent, Record, StreamKind, StreamName};
use contract::time::Timestamp;
use runtime::clock::Clock;
use runtime::ids::Ids;
use store::{Append, Cause, Commit, CommitError, Committed, Store, StoreError};
use subtle::ConstantTimeEq;

use crate::call::Principal;
use crate::error::ApiError;
use crate::seal::hash;

/// More tokens than that are no longer looked after by anybody.
pub const TOKENS_MAX: usize = 1000;
/// The token that the first start makes, and that `client.json` holds.
pub const FIRST_TOKEN: &str = "admin";
const PAGE: usize = 1000;
/// Marks our tokens for scanners that look for leaked secrets.
const PREFIX: &str = "penstock_";

#[derive(Default)]
struct Book {
    version: u64,
    position: Position,
    tokens: BTreeMap<String, AccessGranted>,
}

impl Book {
    /// Takes in the next record of the stream; what it has had already changes nothing.
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

pub struct Access {
    store: Store,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn Ids>,
    book: RwLock<Book>,
    /// Held while the stream is written.
    writing: tokio::sync::Mutex<()>,
}

/// Makes the answer that is kept with a cause, from the token.
pub type Keep<'a> = &'a (dyn Fn(&str) -> Result<String, ApiError> + Sync);

/// Why a bearer token opens nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    Unknown,
    Expired,
}

impl Access {
    pub async fn open(
        store: Store,
        clock: Arc<dyn Clock>,
        ids: Arc<dyn Ids>,
    ) -> Result<Self, StoreError> {
        let access = Self {
            store,
            clock,
            ids,
            book: RwLock::default(),
            writing: tokio::sync::Mutex::default(),
        };
        access.read_on().await?;
        Ok(access)
    }

    /// Takes in what any replica has written, as the log brings it: what is revoked through one of
    /// them opens nothing at the others either.
    pub fn follow(&self, record: &Record) {
        if record.stream.kind() == Some(StreamKind::Access) {
            let mut book = self.book.write().unwrap_or_else(PoisonError::into_inner);
            book.apply(record);
        }
    }

    async fn read_on(&self) -> Result<(), StoreError> {
        loop {
            let after = self.read().version;
            let records = self
                .store
                .read_stream(&StreamName::access(), after, PAGE)
                .await?;
            let mut book = self.book.write().unwrap_or_else(PoisonError::into_inner);
            records.iter().for_each(|record| book.apply(record));
            if records.len() < PAGE {
                return Ok(());
            }
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Book> {
        self.book.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose token this is. Every known hash is compared, so that the time taken tells nothing.
    pub fn check(&self, token: &str, now: Timestamp) -> Result<Principal, Denied> {
        let given = hash(token);
        let book = self.read();
        let mut found = None;
        for granted in book.tokens.values() {
            if bool::from(granted.hash.as_bytes().ct_eq(given.as_bytes())) {
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

    /// Makes a token and returns it: the only time that it is known.
    pub async fn grant(
        &self,
        name: &str,
        role: AccessRole,
        expires: Option<Timestamp>,
        actor: Actor,
        cause: Option<(Cause, Keep<'_>)>,
    ) -> Result<(String, Position), ApiError> {
        let _writing = self.writing.lock().await;
        self.read_on().await?;
        {
            let book = self.read();
            if let Some(granted) = book.tokens.get(name) {
                let alive = granted
                    .expires
                    .is_none_or(|expires| expires > self.clock.now());
                if alive {
                    return Err(ApiError::conflict(
                        "exists",
                        format!(
                            "there is a token `{name}` already; revoke it first, or choose another name"
                        ),
                    ));
                }
            }
            if book.tokens.len() >= TOKENS_MAX {
                return Err(ApiError::conflict(
                    "limit-reached",
                    format!(
                        "there are {TOKENS_MAX} tokens, which is the most; revoke one that is no longer used"
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
        let cause = match cause {
            None => None,
            Some((mut cause, result)) => {
                cause.result = Some(result(&token)?);
                Some(cause)
            }
        };
        let position = self.append(event, actor, cause).await?;
        Ok((token, position))
    }

    pub async fn revoke(&self, name: &str, actor: Actor) -> Result<Position, ApiError> {
        let _writing = self.writing.lock().await;
        self.read_on().await?;
        {
            let book = self.read();
            let Some(granted) = book.tokens.get(name) else {
                return Err(ApiError::not_found(format!(
                    "there is no token `{name}`; nothing was revoked"
                )));
            };
            let now = self.clock.now();
            let opens = |t: &&AccessGranted| {
                t.role == AccessRole::Admin && t.expires.is_none_or(|e| e > now)
            };
            let others = book
                .tokens
                .values()
                .filter(|t| t.name != name)
                .filter(opens)
                .count();
            if opens(&granted) && others == 0 {
                return Err(ApiError::conflict(
                    "last-admin",
                    "this is the last token of an admin; grant another one first",
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
        cause: Option<Cause>,
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
            cause,
            ..Commit::default()
        };
        match self.store.commit(commit).await {
            Ok(Committed::Now { records }) => {
                let mut book = self.book.write().unwrap_or_else(PoisonError::into_inner);
                records.iter().for_each(|record| book.apply(record));
                let written = records.last().map(|record| record.position);
                Ok(written.unwrap_or(book.position))
            }
            Ok(Committed::Before { .. }) => Err(ApiError::conflict(
                "changed-meanwhile",
                "the same request is being carried out; repeat it to see the result",
            )),
            Err(error) => {
                if matches!(error, CommitError::Conflict { .. }) {
                    self.read_on().await?;
                }
                Err(error.into())
            }
        }
    }

    /// The token in `client.json` if it still opens everything; else a new one. The old one of that
    /// name is revoked: it was lost. Replicas with a file each have tokens of their own.
    pub async fn first_token(
        &self,
        known: Option<String>,
        replica: Option<&str>,
    ) -> Result<String, ApiError> {
        let name = match replica {
            None => FIRST_TOKEN.to_owned(),
            Some(replica) => format!("{FIRST_TOKEN}-{replica}"),
        };
        let now = self.clock.now();
        if let Some(token) = known
            && self
                .check(&token, now)
                .is_ok_and(|p| p.role == AccessRole::Admin)
        {
            return Ok(token);
        }
        let taken = self.read().tokens.contains_key(&name);
        if taken {
            let _writing = self.writing.lock().await;
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
