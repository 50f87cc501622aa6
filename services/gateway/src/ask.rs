//! One request to an instance, up to the head of its answer.
//!
//! Invariant: nothing is sent twice unless not one byte of it left the first time, or its method or
//! an `Idempotency-Key` says that twice is as once.

use std::future::Future;
use std::pin::pin;

use http::{HeaderMap, HeaderValue};
use runtime::descriptors::is_lack;

use crate::body::{Fault, RequestBody};
use crate::client::{Client, Failure};
use crate::flight::Flight;
use crate::instance::Instance;
use crate::reply::Refusal;
use crate::timer::now_us;
use crate::upstream::{Ask, Broken, Head, Idle, Upstream};

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

/// Which try it is; there are two at most.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Try {
    First,
    Second,
}

impl Try {
    /// Once more, if that has not been done.
    fn again(&mut self) -> Result<(), Refusal> {
        match *self {
            Self::First => *self = Self::Second,
            Self::Second => return Err(Refusal::Unreachable),
        }
        Ok(())
    }
}

/// What became of one try.
enum Exchanged {
    Answer(Box<Head>),
    /// The instance broke off before the head of its answer was whole.
    BrokeOff,
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
    let mut this = Try::First;
    loop {
        let instance = flight.instance()?.clone();
        let rested = match this {
            Try::First => client.thread.pool.borrow_mut().take(&instance, at_us),
            Try::Second => None,
        };
        let idle = match rested {
            Some(idle) => idle,
            None => match Box::pin(new_connection(client, flight, &instance, &mut this)).await? {
                Some(idle) => idle,
                None => continue,
            },
        };
        let copy = if idle.is_reused() && this == Try::First {
            body.replay()
        } else {
            None
        };
        let again = copy.is_some();
        let sent = std::mem::replace(&mut body, copy.unwrap_or_default());
        let mut upstream = idle.begin(&asked.of(&instance), sent);
        match exchange(client, &mut upstream).await? {
            Exchanged::Answer(head) => return Ok((head, upstream)),
            Exchanged::BrokeOff => {}
        }
        let unseen = upstream.none_sent() || asked.is_idempotent();
        if !again || upstream.is_answered() || !unseen {
            return Err(Failure::Refusal(Refusal::Unreachable));
        }
        this.again()?;
    }
}

/// A new connection to the instance; none where the try failed before anything was sent and another
/// is to be made, on another instance if this one refused.
async fn new_connection(
    client: &Client,
    flight: &mut Flight,
    instance: &Instance,
    this: &mut Try,
) -> Result<Option<Idle>, Failure> {
    let error = match connect(client, instance).await? {
        Ok(idle) if idle.is_alive() => return Ok(Some(idle)),
        // Closed before anything was sent.
        Ok(_) => {
            this.again()?;
            return Ok(None);
        }
        Err(error) => error,
    };
    tracing::debug!(instance = %instance.id, %error, "an instance refused a connection");
    instance.suspect(now_us() + SUSPECT_US);
    this.again()?;
    if !flight.move_on(client.thread.rotation())? {
        return Err(Failure::Refusal(Refusal::Unreachable));
    }
    Ok(None)
}

async fn connect(client: &Client, instance: &Instance) -> Result<std::io::Result<Idle>, Failure> {
    let thread = &client.thread;
    let timeout = thread.core.config.connect_timeout;
    thread.make_room_for_an_upstream();
    for _ in 0..CONNECT_TRIES {
        let mut connecting = pin!(Idle::connect(instance, timeout, &thread.core.upstreams));
        let connected = client.wait(|cx| connecting.as_mut().poll(cx)).await;
        match connected.map_err(|stopped| stopped.or(Refusal::Timeout))? {
            Ok(idle) => return Ok(Ok(idle)),
            Err(error) if is_lack(&error) => thread.give_way(TO_AN_INSTANCE, &error),
            Err(error) => return Ok(Err(error)),
        }
    }
    // No word about the instance.
    Err(Refusal::Lacking.into())
}

async fn exchange(client: &Client, upstream: &mut Upstream) -> Result<Exchanged, Failure> {
    let mut spare = client.thread.spare.take();
    let answered = client.wait(|cx| upstream.poll_head(cx, &mut spare)).await;
    match client.upload.fault() {
        Some(Fault::TooLarge) => return Err(Failure::Refusal(Refusal::BodyTooLarge)),
        Some(Fault::Broken) => return Err(Failure::Refusal(Refusal::Body)),
        None => {}
    }
    match answered.map_err(|stopped| stopped.or(Refusal::Timeout))? {
        Ok(head) => Ok(Exchanged::Answer(head)),
        Err(Broken::Malformed) => Err(Failure::Refusal(Refusal::BadAnswer)),
        Err(Broken::Off | Broken::Request) => Ok(Exchanged::BrokeOff),
    }
}
