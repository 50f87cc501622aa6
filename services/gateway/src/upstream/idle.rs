//! A connection on which nothing is asked: new, or at rest after an answer. Only on one of these a
//! request can begin, and the request has it to itself until the connection rests again or closes.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;

use super::connection::Upstream;
use super::counted::Counted;
use super::head::Ask;
use crate::body::RequestBody;
use crate::instance::Instance;

/// An open connection to an instance that waits for a request.
#[derive(Debug)]
pub struct Idle {
    upstream: Box<Upstream>,
    reused: bool,
}

impl Idle {
    /// A new connection, one among `all`.
    pub async fn connect(
        instance: &Instance,
        timeout: Duration,
        all: &Arc<AtomicUsize>,
    ) -> io::Result<Self> {
        let connecting = TcpStream::connect(instance.address.as_str());
        let stream = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        Ok(Self::new(stream, Counted::among(all)))
    }

    pub fn new(stream: TcpStream, counted: Counted) -> Self {
        Self {
            upstream: Box::new(Upstream::new(stream, counted)),
            reused: false,
        }
    }

    /// At rest, after an answer that is whole.
    pub(super) fn after(upstream: Box<Upstream>) -> Self {
        Self {
            upstream,
            reused: true,
        }
    }

    /// It has served a request before.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// Whether it is open and silent, as far as this thread has been told. Costs no system call
    /// unless something has happened to it.
    pub fn is_alive(&self) -> bool {
        is_silent(self.upstream.stream.try_read(&mut [0]))
    }

    /// The same, asked of the system itself: it may know of a close that this thread has not been
    /// told of yet.
    pub fn is_alive_now(&self) -> bool {
        is_silent(SockRef::from(&self.upstream.stream).peek(&mut [MaybeUninit::uninit()]))
    }

    /// Begins a request on it.
    pub fn begin(self, ask: &Ask<'_>, body: RequestBody) -> Box<Upstream> {
        let mut upstream = self.upstream;
        upstream.begin(ask, body);
        upstream
    }

    #[cfg(test)]
    pub fn stream(&self) -> &TcpStream {
        &self.upstream.stream
    }
}

/// What a read of a connection at rest must give: nothing, and no end either.
fn is_silent(read: io::Result<usize>) -> bool {
    read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}
