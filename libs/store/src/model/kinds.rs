//! Which kind of stream each event type belongs in: one writing service per stream, held at every
//! commit and checked again by `verify`. The events say so themselves.

use contract::events::Event;
use contract::log::StreamName;

/// Whether an event may stand in this stream.
pub fn belongs(event: &Event, stream: &StreamName) -> bool {
    stream
        .kind()
        .is_some_and(|kind| event.streams().contains(&kind))
}
