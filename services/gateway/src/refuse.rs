//! Refuses clients when the gateway is full: a few at a time get a 503 once they have sent a
//! request; the others are disconnected immediately.

use std::io::Write;
use std::rc::Rc;
use std::time::Duration;

use contract::resources::{ErrorMapping, Protocol};
use runtime::descriptors::REFUSING_MAX;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::reply::Refusal;
use crate::worker::Worker;

/// How long a client may take to send a request and read the refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Counts a client that is being refused until dropped.
struct RefusalGuard(Rc<Worker>);

impl Drop for RefusalGuard {
    fn drop(&mut self) {
        self.0.refusing.set(self.0.refusing.get() - 1);
    }
}

pub fn refuse(worker: &Rc<Worker>, stream: TcpStream) {
    let refusing = worker.refusing.get();
    if refusing >= REFUSING_MAX {
        return;
    }
    worker.refusing.set(refusing + 1);
    let guard = RefusalGuard(worker.clone());
    tokio::task::spawn_local(async move {
        let text = text(&guard.0);
        let _ = tokio::time::timeout(REFUSAL_TIMEOUT, respond(stream, &text)).await;
    });
}

/// Many clients treat a response before their request as an error, so a request is awaited first.
async fn respond(mut stream: TcpStream, text: &[u8]) -> std::io::Result<()> {
    let mut scratch = [0; 1024];
    if stream.read(&mut scratch).await? == 0 {
        return Ok(());
    }
    stream.write_all(text).await?;
    stream.shutdown().await?;
    // Closing with unread data would send a reset, which may overtake the response.
    while stream.read(&mut scratch).await? > 0 {}
    Ok(())
}

fn text(worker: &Worker) -> Vec<u8> {
    let response = Refusal::TooManyConnections.response(
        worker.request_id(),
        ErrorMapping::Azure,
        Protocol::Http,
    );
    let mut text = Vec::new();
    // Writing to memory cannot fail.
    let _ = write!(text, "HTTP/1.1 {}\r\n", response.status());
    for (name, value) in response.headers() {
        let _ = write!(text, "{name}: ");
        text.extend_from_slice(value.as_bytes());
        text.extend_from_slice(b"\r\n");
    }
    text.extend_from_slice(b"\r\n");
    text.extend_from_slice(response.body());
    text
}
