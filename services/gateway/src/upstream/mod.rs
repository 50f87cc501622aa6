//! HTTP/1.1 towards instances: requests are written and answers read straight on the socket.
//!
//! - `head`: the bytes of a request's head, and an answer's head from its bytes.
//! - `body`: where an answer's body ends, as a machine without a socket.
//! - `idle`: a connection on which nothing is asked.
//! - `connection`: the same in use, the socket between the other two.
//! - `counted`: how many of them are open.
//!
//! A connection is idle, in use, idle again and so on until it closes; each is a type of its own:
//!
//! ```text
//! connect -> Idle -begin-> Upstream -rest-> Idle      (dropped, either closes)
//!     a request:  Body -> Rest -> Sent, or Refused by the instance, or Failed at the client
//!     an answer:  Head -> Known | Chunks | UntilClose -> Whole, or Malformed
//! ```
//!
//! Invariants: an answer whose length can be read in two ways is refused; a connection serves a
//! next request only after an answer that was read to its end, with nothing behind it, to a request
//! that was sent to its end. Trailers are read and dropped, like every header of one hop.
//!
//! It is no task: whoever waits for an answer polls the connection, in the task of the client's
//! connection. So there is no hand-over between tasks, and a request that is given up closes its
//! connection by dropping it.

mod body;
mod connection;
mod counted;
mod head;
mod idle;
#[cfg(test)]
mod socket_tests;
#[cfg(test)]
mod tests;

pub use connection::{Broken, Upstream};
#[cfg(test)]
pub use counted::Counted;
pub use head::{Ask, Head};
pub use idle::Idle;
