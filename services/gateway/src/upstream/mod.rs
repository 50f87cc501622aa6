//! HTTP/1.1 towards instances: requests are written and responses read directly on the socket.
//!
//! - `head`: writes request heads and parses response heads.
//! - `body`: finds where a response's body ends, independently of sockets.
//! - `idle`: a connection without a request.
//! - `connection`: a connection in use; joins the socket with `head` and `body`.
//! - `count_guard`: counts open connections.
//!
//! A connection alternates between idle and in use until it closes; each state has its own type:
//!
//! ```text
//! connect -> IdleConnection -begin-> Upstream -into_idle-> IdleConnection  (dropping any closes it)
//!     request:   Body -> Rest -> Sent; or Refused by the instance; or Failed at the client
//!     response:  Head -> Known | Chunks | UntilClose -> Complete; or Malformed
//! ```
//!
//! Invariants: a response whose length is ambiguous is refused; a connection is reused only after a
//! complete response with nothing after it, to a request that was fully sent. Trailers are read and
//! dropped, like every hop-by-hop header.
//!
//! There is no separate task: whoever waits for a response polls the connection, in the task of the
//! client's connection. So nothing is handed over between tasks, and dropping a request closes its
//! connection.

mod body;
mod connection;
mod count_guard;
mod head;
mod idle;
#[cfg(test)]
mod socket_tests;
#[cfg(test)]
mod tests;

pub use connection::{SendProgress, Upstream, UpstreamError};
#[cfg(test)]
pub use count_guard::CountGuard;
pub use head::{ResponseHead, UpstreamRequest};
pub use idle::IdleConnection;
