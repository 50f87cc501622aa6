//! Clients for whom there is no room: a few at a time are told so in words, once they have asked; the
//! others lose their connection at once.

use std::io::Write;
use std::rc::Rc;
use std::time::Duration;

use runtime::descriptors::REFUSING_MAX;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::reply::Refusal;
use crate::thread::Thread;

/// How long a client may take to ask, and to read why not.
const WITHIN: Duration = Duration::from_secs(1);

/// One of those that are being refused.
struct Refused(Rc<Thread>);

impl Drop for Refused {
    fn drop(&mut self) {
        self.0.refusing.set(self.0.refusing.get() - 1);
    }
}

pub fn refuse(thread: &Rc<Thread>, stream: TcpStream) {
    let refusing = thread.refusing.get();
    if refusing >= REFUSING_MAX {
        return;
    }
    thread.refusing.set(refusing + 1);
    let refused = Refused(thread.clone());
    tokio::task::spawn_local(async move {
        let text = text(&refused.0);
        let _ = tokio::time::timeout(WITHIN, answer(stream, &text)).await;
    });
}

/// An answer to what has not been asked yet would be an error to many a client.
async fn answer(mut stream: TcpStream, text: &[u8]) -> std::io::Result<()> {
    let mut scratch = [0; 1024];
    if stream.read(&mut scratch).await? == 0 {
        return Ok(());
    }
    stream.write_all(text).await?;
    stream.shutdown().await?;
    // With something unread the close would be a reset, which overtakes the answer.
    while stream.read(&mut scratch).await? > 0 {}
    Ok(())
}

fn text(thread: &Thread) -> Vec<u8> {
    let response = Refusal::TooManyConnections.response(thread.request_id());
    let mut text = Vec::new();
    // Writing to memory does not fail.
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
