//! A connection without a request: new, or idle after a response. Requests can only begin on one of
//! these, and a request owns the connection until it is idle again or closes.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;

use super::connection::Upstream;
use super::count_guard::CountGuard;
use super::head::UpstreamRequest;
use crate::body::RequestBody;
use crate::instance::ServedInstance;

/// An open connection to an instance, ready for a request.
#[derive(Debug)]
pub struct IdleConnection {
    upstream: Box<Upstream>,
    reused: bool,
}

impl Upstream {
    /// Returns the connection for another request, if the response is complete and the request was
    /// fully sent; closes it otherwise.
    pub fn into_idle(self: Box<Self>) -> Option<IdleConnection> {
        self.is_reusable().then(|| IdleConnection {
            upstream: self,
            reused: true,
        })
    }
}

impl IdleConnection {
    /// Opens a new connection, counted in `count`.
    pub async fn connect(
        instance: &ServedInstance,
        timeout: Duration,
        count: &Arc<AtomicUsize>,
    ) -> io::Result<Self> {
        let connecting = TcpStream::connect(instance.address.as_str());
        let stream = tokio::time::timeout(timeout, connecting)
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        Ok(Self::new(stream, CountGuard::new(count)))
    }

    pub fn new(stream: TcpStream, count: CountGuard) -> Self {
        Self {
            upstream: Box::new(Upstream::new(stream, count)),
            reused: false,
        }
    }

    /// Whether it has served a request before.
    pub fn is_reused(&self) -> bool {
        self.reused
    }

    /// Whether it is open and silent, as far as tokio knows. Makes no system call unless there was
    /// an event on the socket.
    pub fn is_alive(&self) -> bool {
        is_silent(self.upstream.stream.try_read(&mut [0]))
    }

    /// Like `is_alive`, but asks the kernel: it may know of a close that this thread has not
    /// processed yet.
    pub fn is_alive_now(&self) -> bool {
        is_silent(SockRef::from(&self.upstream.stream).peek(&mut [MaybeUninit::uninit()]))
    }

    /// Begins a request on it.
    pub fn begin(self, request: &UpstreamRequest<'_>, body: RequestBody) -> Box<Upstream> {
        let mut upstream = self.upstream;
        upstream.begin(request, body);
        upstream
    }

    #[cfg(test)]
    pub fn stream(&self) -> &TcpStream {
        &self.upstream.stream
    }
}

/// What a read of an idle connection must return: no data and no end of stream.
fn is_silent(read: io::Result<usize>) -> bool {
    read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}
