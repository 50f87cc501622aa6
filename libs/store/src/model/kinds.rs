//! Which kind of stream each event type belongs in. Each stream has one writing service; every commit
//! enforces this and `verify` checks it again. The event types declare their streams.

use contract::events::Event;
use contract::log::StreamName;

/// Whether the event is allowed in this stream.
pub fn belongs(event: &Event, stream: &StreamName) -> bool {
    stream
        .kind()
        .is_some_and(|kind| event.streams().contains(&kind))
}
