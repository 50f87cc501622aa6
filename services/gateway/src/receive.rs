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
use crate::upload_buffers::BufferPermit;

/// Reads a body in full or, if it is large, its beginning, so that a slow sender occupies no instance
/// meanwhile. One of unknown length is streamed from the start: its sender may wait for the response to each
/// part.
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
    let stream = |beginning, incoming| {
        let upload = client.upload.clone();
        RequestBody::Stream(StreamedBody::new(beginning, incoming, bytes_max, upload))
    };
    let (length, wanted, permit) = match length {
        Some(length) if length <= SMALL_BODY_BYTES_MAX => (length, length, None),
        Some(length) => match reserve_buffer(client, length) {
            Some(permit) => (length, permit.bytes(), Some(permit)),
            None => return Ok(stream(Bytes::new(), incoming)),
        },
        None => return Ok(stream(Bytes::new(), incoming)),
    };
    client
        .connection
        .deadline
        .borrow_mut()
        .set(in_flight.body_deadline_us(in_flight.arrived_us()));
    let first = next_piece(client, &mut incoming, in_flight).await?;
    client.upload.bytes.set(first.len() as u64);
    let body = if first.len() as u64 >= wanted {
        first
    } else {
        let mut body = BytesMut::with_capacity(wanted as usize);
        body.extend_from_slice(&first);
        while (body.len() as u64) < wanted {
            let deadline_us = in_flight.body_deadline_us(now_us());
            client.connection.deadline.borrow_mut().set(deadline_us);
            body.extend_from_slice(&next_piece(client, &mut incoming, in_flight).await?);
            client.upload.bytes.set(body.len() as u64);
        }
        body.freeze()
    };
    let is_whole = body.len() as u64 == length;
    let body = match permit {
        Some(permit) => permit.hold(body),
        None => body,
    };
    if is_whole {
        client.upload.complete();
        return Ok(RequestBody::Full(Some(body)));
    }
    Ok(stream(body, incoming))
}

/// A buffer for as much of a large body as is received before an instance is chosen, unless that is nothing
/// or too much is buffered already.
fn reserve_buffer(client: &ClientConnection, length: u64) -> Option<BufferPermit> {
    let shared = &client.worker.shared;
    let wanted = length.min(shared.config.upload_buffer_bytes);
    (wanted > 0)
        .then(|| shared.upload_buffers.reserve(wanted))
        .flatten()
}

/// The next piece of an incomplete body.
async fn next_piece(
    client: &ClientConnection,
    incoming: &mut Incoming,
    in_flight: &InFlightRequest,
) -> Result<Bytes, Refusal> {
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
            return Poll::Ready(None);
        }
        frame
    });
    match frame.await {
        Some(Ok(frame)) => frame.into_data().map_err(|_| Refusal::Body),
        _ => Err(Refusal::Body),
    }
}
