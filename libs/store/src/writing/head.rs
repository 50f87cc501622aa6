//! The highest position known to be committed by any process.
//!
//! Invariants: it never decreases, and everything below it can be read.

use std::sync::Arc;

use contract::ids::Position;
use tokio::sync::watch;

#[derive(Clone)]
pub(crate) struct LogHead {
    sender: Arc<watch::Sender<Position>>,
}

impl LogHead {
    pub(crate) fn at(position: Position) -> Self {
        Self {
            sender: Arc::new(watch::Sender::new(position)),
        }
    }

    pub(crate) fn advance(&self, position: Position) {
        self.sender.send_if_modified(|head| {
            let newer = position > *head;
            if newer {
                *head = position;
            }
            newer
        });
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Position> {
        self.sender.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_never_decreases() {
        let head = LogHead::at(Position(3));
        let mut watch = head.watch();
        head.advance(Position(5));
        head.advance(Position(4));
        assert_eq!(*watch.borrow_and_update(), Position(5));
        head.advance(Position(5));
        assert!(!watch.has_changed().unwrap());
    }
}
