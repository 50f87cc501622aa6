//! A request's body before an instance is chosen: a small one is read whole, so that a slow sender
//! holds no instance; a large one, or one of unknown length, is passed on as it comes.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use http_body::Body;
use hyper::body::Incoming;

use crate::body::{RequestBody, Streamed};
use crate::client::Client;
use crate::config::REPLAY_BYTES_MAX;
use crate::flight::Flight;
use crate::reply::Refusal;

/// Reads a small body whole; a large one, or one of unknown length, is passed on as it comes.
pub async fn receive(
    client: &Client,
    mut incoming: Incoming,
    flight: &Flight,
) -> Result<RequestBody, Refusal> {
    if incoming.is_end_stream() {
        return Ok(RequestBody::EMPTY);
    }
    let bytes_max = flight.endpoint().request_bytes_max;
    let length = incoming.size_hint().exact();
    if length.is_some_and(|length| length > bytes_max) {
        return Err(Refusal::BodyTooLarge);
    }
    let Some(length) = length.filter(|length| *length <= REPLAY_BYTES_MAX) else {
        let upload = client.upload.clone();
        return Ok(RequestBody::Stream(Streamed::new(
            incoming, bytes_max, upload,
        )));
    };
    client
        .shared
        .deadline
        .borrow_mut()
        .set(flight.body_deadline_us());
    let first = piece(client, &mut incoming).await?;
    if first.len() as u64 == length {
        client.upload.bytes.set(length);
        return Ok(RequestBody::Whole(Some(first)));
    }
    client.upload.bytes.set(first.len() as u64);
    let mut all = BytesMut::with_capacity(length as usize);
    all.extend_from_slice(&first);
    while (all.len() as u64) < length {
        all.extend_from_slice(&piece(client, &mut incoming).await?);
        client.upload.bytes.set(all.len() as u64);
    }
    Ok(RequestBody::Whole(Some(all.freeze())))
}

/// The next piece of a body that is not whole yet.
async fn piece(client: &Client, incoming: &mut Incoming) -> Result<Bytes, Refusal> {
    let frame = poll_fn(|cx| {
        let woken = client.shared.relay.is_woken();
        let frame = Pin::new(&mut *incoming).poll_frame(cx);
        if incoming.is_end_stream() {
            // Taking the last piece tells the sender, which is gone, that there is room again.
            client.shared.relay.restore(woken);
        }
        if frame.is_pending() {
            client.upload.waited.set(true);
        }
        if frame.is_pending() && client.shared.deadline.borrow_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        frame
    });
    match frame.await {
        Some(Ok(frame)) => frame.into_data().map_err(|_| Refusal::Body),
        _ => Err(Refusal::Body),
    }
}
