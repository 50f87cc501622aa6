//! Reads a request's body before an instance is chosen.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use http_body::Body;
use hyper::body::Incoming;

use crate::body::{RequestBody, StreamedBody};
use crate::client::Client;
use crate::config::REPLAY_BYTES_MAX;
use crate::in_flight::InFlightRequest;
use crate::reply::Refusal;
use crate::timer::now_us;

/// Reads a small body in full, so that a slow sender occupies no instance; streams a large one, or
/// one of unknown length.
pub async fn receive_body(
    client: &Client,
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
    let Some(length) = length.filter(|length| *length <= REPLAY_BYTES_MAX) else {
        let upload = client.upload.clone();
        return Ok(RequestBody::Stream(StreamedBody::new(
            incoming, bytes_max, upload,
        )));
    };
    client
        .connection
        .deadline
        .borrow_mut()
        .set(in_flight.body_deadline_us(in_flight.arrived_us()));
    let first = next_piece(client, &mut incoming).await?;
    if first.len() as u64 == length {
        client.upload.bytes.set(length);
        return Ok(RequestBody::Full(Some(first)));
    }
    client.upload.bytes.set(first.len() as u64);
    let mut body = BytesMut::with_capacity(length as usize);
    body.extend_from_slice(&first);
    while (body.len() as u64) < length {
        let deadline_us = in_flight.body_deadline_us(now_us());
        client.connection.deadline.borrow_mut().set(deadline_us);
        body.extend_from_slice(&next_piece(client, &mut incoming).await?);
        client.upload.bytes.set(body.len() as u64);
    }
    Ok(RequestBody::Full(Some(body.freeze())))
}

/// The next piece of an incomplete body.
async fn next_piece(client: &Client, incoming: &mut Incoming) -> Result<Bytes, Refusal> {
    let frame = poll_fn(|cx| {
        let woken = client.connection.wakes.is_woken();
        let frame = Pin::new(&mut *incoming).poll_frame(cx);
        if incoming.is_end_stream() {
            // Taking the last piece signals capacity to a sender that is already gone.
            client.connection.wakes.restore_woken(woken);
        }
        if frame.is_pending() {
            client.upload.has_waited.set(true);
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
