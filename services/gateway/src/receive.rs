//! Reads a request's body before an instance is chosen.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use http_body::Body;
use hyper::body::Incoming;

use crate::body::{RequestBody, StreamedBody};
use crate::client::ClientConnection;
use crate::config::SMALL_BODY_BYTES_MAX;
use crate::in_flight::InFlightRequest;
use crate::reply::Refusal;
use crate::timer::now_us;

/// A sender of a body of unknown length that pauses for so long may wait for the response to what it sent.
const PAUSE_US: u64 = 1_000_000;

/// Reads a body in full or, if it is large, its beginning, so that a slow sender occupies no instance
/// meanwhile.
pub async fn receive_body(
    client: &ClientConnection,
    mut incoming: Incoming,
    in_flight: &InFlightRequest,
) -> Result<RequestBody, Refusal> {
    if incoming.is_end_stream() {
        return Ok(RequestBody::EMPTY);
    }
    let bytes_max = in_flight.endpoint().request_bytes_max;
    let length = incoming.size_hint().exact();
    if length.is_some_and(|length| length > bytes_max) {
        return Err(Refusal::BodyTooLarge);
    }
    let shared = &client.worker.shared;
    let (wanted, mut permit) = match length {
        Some(length) if length <= SMALL_BODY_BYTES_MAX => (length, None),
        length => {
            let beginning_max = shared.config.upload_buffer_bytes;
            let wanted = length.map_or(beginning_max, |length| length.min(beginning_max));
            (wanted, Some(shared.upload_buffers.begin()))
        }
    };
    let stream = |beginning, incoming| {
        let upload = client.upload.clone();
        RequestBody::Stream(StreamedBody::new(beginning, incoming, bytes_max, upload))
    };
    if wanted == 0 {
        return Ok(stream(Bytes::new(), incoming));
    }
    let mut end_us = in_flight.body_deadline_us(in_flight.arrived_us());
    client.connection.deadline.borrow_mut().set(end_us);
    let mut whole = None;
    // Of a body in several pieces.
    let mut joined = BytesMut::new();
    while let Some(piece) = next_piece(client, &mut incoming, in_flight, end_us).await? {
        let received = joined.len() as u64 + piece.len() as u64;
        if received > bytes_max {
            return Err(Refusal::BodyTooLarge);
        }
        client.upload.bytes.set(received);
        let has_room = match &mut permit {
            Some(permit) => permit.grow(piece.len() as u64),
            None => true,
        };
        if joined.is_empty() && length == Some(received) {
            whole = Some(piece);
            break;
        }
        if joined.is_empty() && permit.is_none() {
            joined.reserve(wanted as usize);
        }
        joined.extend_from_slice(&piece);
        if received >= wanted || !has_room {
            break;
        }
        let now_us = now_us();
        end_us = in_flight.body_deadline_us(now_us);
        let deadline_us = match length {
            Some(_) => end_us,
            None => end_us.min(now_us + PAUSE_US),
        };
        client.connection.deadline.borrow_mut().set(deadline_us);
    }
    let is_whole = whole.is_some() || length == Some(joined.len() as u64);
    let mut body = whole.unwrap_or_else(|| joined.freeze());
    if let Some(permit) = permit {
        body = permit.hold(body);
    }
    if is_whole {
        client.upload.complete();
        return Ok(RequestBody::Full(Some(body)));
    }
    Ok(stream(body, incoming))
}

/// The next piece of an incomplete body, before `end_us`; `None` at the end of one of unknown length, or if the
/// connection's deadline is earlier and has passed.
async fn next_piece(
    client: &ClientConnection,
    incoming: &mut Incoming,
    in_flight: &InFlightRequest,
    end_us: u64,
) -> Result<Option<Bytes>, Refusal> {
    let frame = poll_fn(|cx| {
        let woken = client.connection.wakes.is_woken();
        let frame = Pin::new(&mut *incoming).poll_frame(cx);
        if incoming.is_end_stream() {
            // Taking the last piece signals capacity to a sender that is already gone.
            client.connection.wakes.restore_woken(woken);
        }
        if frame.is_pending() && !client.upload.has_waited.replace(true) {
            in_flight.receive();
        }
        if frame.is_pending() && client.connection.deadline.borrow_mut().poll(cx).is_ready() {
            let has_paused = !client.upload.is_length_known() && now_us() < end_us;
            return Poll::Ready(has_paused.then_some(None).ok_or(Refusal::Body));
        }
        frame.map(Ok)
    });
    match frame.await? {
        // Trailers are not passed on.
        Some(Ok(frame)) => Ok(Some(frame.into_data().unwrap_or_default())),
        Some(Err(_)) => Err(Refusal::Body),
        None => Ok(None),
    }
}
