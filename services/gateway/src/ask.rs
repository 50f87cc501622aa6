//! One request to an instance, up to the head of its answer.
//!
//! Invariant: nothing is sent twice unless not one byte of it left the first time, or its method or
//! an `Idempotency-Key` says that twice is as once.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use runtime::descriptors::is_lack;

use crate::body::{Fault, RequestBody};
use crate::client::{Client, Failure};
use crate::flight::Flight;
use crate::instance::Instance;
use crate::reply::Refusal;
use crate::timer::now_us;
use crate::upstream::{Ask, Broken, Counted, Head, Upstream};

/// How long an instance that refused a connection comes last.
const SUSPECT_US: u64 = 1_000_000;

/// For want of descriptors once more, when what rests has been closed.
const CONNECT_TRIES: u32 = 2;
const TO_AN_INSTANCE: &str = "a connection to an instance";

/// An answer's head, and the connection that its body comes on.
pub type Answer = (Box<Head>, Box<Upstream>);

/// What a client asks, whichever instance will answer.
pub struct Asked<'a> {
    pub method: &'a http::Method,
    pub path: &'a str,
    pub headers: &'a HeaderMap,
    pub id: &'a HeaderValue,
}

impl<'a> Asked<'a> {
    /// Whether the client holds that being done twice is as being done once.
    fn is_idempotent(&self) -> bool {
        self.method.is_idempotent() || self.headers.contains_key("idempotency-key")
    }

    fn of(&self, instance: &'a Instance) -> Ask<'a> {
        Ask {
            method: self.method,
            path: self.path,
            headers: self.headers,
            host: &instance.host,
            id: self.id,
        }
    }
}

/// What became of one try.
enum Exchanged {
    Answer(Box<Head>),
    Failed {
        /// Part of an answer had come.
        answered: bool,
    },
}

/// Sends the request and waits for the head of the answer. A second try is made at most once,
/// and only where no byte of the first was sent; for an idempotent request also where a
/// connection that had rested closed without a word and the body can be sent again.
pub async fn ask(
    client: &Client,
    flight: &mut Flight,
    asked: &Asked<'_>,
    mut body: RequestBody,
    at_us: u64,
) -> Result<Answer, Failure> {
    let mut second = false;
    loop {
        let instance = flight.instance()?.clone();
        let pooled = if second {
            None
        } else {
            client.thread.pool.borrow_mut().take(&instance, at_us)
        };
        let mut upstream = match pooled {
            Some(upstream) => upstream,
            None => {
                let timeout = client.thread.core.config.connect_timeout;
                let connecting = Box::pin(connect(client, &instance, timeout));
                match connecting.await? {
                    Ok(upstream) if upstream.is_alive() => upstream,
                    // Closed before anything was sent.
                    Ok(_) if second => return Err(Failure::Refusal(Refusal::Unreachable)),
                    Ok(_) => {
                        second = true;
                        continue;
                    }
                    Err(error) => {
                        tracing::debug!(instance = %instance.id, %error, "an instance refused a connection");
                        instance.suspect(now_us() + SUSPECT_US);
                        if second {
                            return Err(Failure::Refusal(Refusal::Unreachable));
                        }
                        second = true;
                        move_on(client, flight)?;
                        continue;
                    }
                }
            }
        };
        let copy = if upstream.reused && !second {
            body.replay()
        } else {
            None
        };
        let again = copy.is_some();
        let sent = std::mem::replace(&mut body, copy.unwrap_or_default());
        match exchange(client, &mut upstream, &instance, asked, sent).await? {
            Exchanged::Answer(head) => return Ok((head, upstream)),
            Exchanged::Failed { answered: false }
                if again && (upstream.none_sent() || asked.is_idempotent()) =>
            {
                second = true;
            }
            Exchanged::Failed { .. } => return Err(Failure::Refusal(Refusal::Unreachable)),
        }
    }
}

/// Takes the request from an instance that cannot be reached to another one.
fn move_on(client: &Client, flight: &mut Flight) -> Result<(), Refusal> {
    if flight.move_on(client.thread.rotation())? {
        return Ok(());
    }
    Err(Refusal::Unreachable)
}

async fn connect(
    client: &Client,
    instance: &Instance,
    timeout: Duration,
) -> Result<std::io::Result<Box<Upstream>>, Failure> {
    let thread = &client.thread;
    thread.make_room_for_an_upstream();
    for _ in 0..CONNECT_TRIES {
        let mut connecting = pin!(Upstream::connect(instance, timeout));
        let connected = client.wait(|cx| connecting.as_mut().poll(cx)).await;
        match connected.map_err(|stopped| stopped.or(Refusal::Timeout))? {
            Ok(mut upstream) => {
                upstream.counted = Some(Counted::among(&thread.core.upstreams));
                return Ok(Ok(upstream));
            }
            Err(error) if is_lack(&error) => thread.give_way(TO_AN_INSTANCE, &error),
            Err(error) => return Ok(Err(error)),
        }
    }
    // No word about the instance.
    Err(Refusal::Lacking.into())
}

async fn exchange(
    client: &Client,
    upstream: &mut Upstream,
    instance: &Instance,
    asked: &Asked<'_>,
    body: RequestBody,
) -> Result<Exchanged, Failure> {
    let mut body = Some(body);
    let mut spare = client.thread.spare.take();
    let answered = client
        .wait(|cx| {
            if let Some(body) = body.take() {
                upstream.begin(cx, &asked.of(instance), body);
            }
            upstream.poll_head(cx, &mut spare)
        })
        .await;
    match client.upload.fault.get() {
        Some(Fault::TooLarge) => return Err(Failure::Refusal(Refusal::BodyTooLarge)),
        Some(Fault::Broken) => return Err(Failure::Refusal(Refusal::Body)),
        None => {}
    }
    match answered.map_err(|stopped| stopped.or(Refusal::Timeout))? {
        Ok(head) => Ok(Exchanged::Answer(head)),
        Err(Broken::Malformed) => Err(Failure::Refusal(Refusal::BadAnswer)),
        Err(Broken::Off | Broken::Request) => Ok(Exchanged::Failed {
            answered: upstream.answered(),
        }),
    }
}
