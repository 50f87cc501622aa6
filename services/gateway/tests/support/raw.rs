//! Clients and instances that exchange raw bytes, for what a library would not send.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::{InstanceEntry, entry_at, within_timeout};

pub const EMPTY_OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

pub async fn write_text(stream: &mut TcpStream, text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
}

/// Connects a client that has sent a request and waits for the response.
pub async fn send_post(gateway: SocketAddr, body: &str) -> TcpStream {
    let mut client = TcpStream::connect(gateway).await.unwrap();
    let length = body.len();
    let head =
        format!("POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ncontent-length: {length}");
    write_text(&mut client, &format!("{head}\r\n\r\n{body}")).await;
    client
}

/// Sends raw bytes and reads until the gateway closes.
pub async fn send_raw(address: SocketAddr, bytes: &[u8]) -> String {
    within_timeout("the connection to close", async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text).await;
        String::from_utf8_lossy(&text).into_owned()
    })
    .await
}

/// An instance that hands out its connections, to be driven byte by byte.
pub struct RawInstance {
    pub address: SocketAddr,
    listener: TcpListener,
}

impl RawInstance {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self {
            address: listener.local_addr().unwrap(),
            listener,
        }
    }

    pub fn entry(&self) -> InstanceEntry {
        entry_at(self.address)
    }

    pub async fn accept(&self) -> TcpStream {
        within_timeout("a connection", self.listener.accept())
            .await
            .unwrap()
            .0
    }

    /// Accepts a connection and reads the request on it.
    pub async fn accept_request(&self) -> TcpStream {
        let mut stream = self.accept().await;
        read_request(&mut stream).await;
        stream
    }
}

/// Reads a request's head, and nothing of its body.
pub async fn read_head(stream: &mut TcpStream) -> String {
    within_timeout("a request", async {
        let mut text = Vec::new();
        loop {
            let mut byte = [0];
            let read = stream.read(&mut byte).await.unwrap();
            assert_eq!(
                read,
                1,
                "closed in a head: {:?}",
                String::from_utf8_lossy(&text)
            );
            text.push(byte[0]);
            if text.ends_with(b"\r\n\r\n") {
                break;
            }
        }
        String::from_utf8(text).unwrap()
    })
    .await
}

/// Reads a request's head, and as much body as its content-length says.
pub async fn read_request(stream: &mut TcpStream) -> String {
    let head = read_head(stream).await;
    within_timeout("a request's body", async {
        let length = head
            .lines()
            .find_map(|line| {
                line.to_ascii_lowercase()
                    .strip_prefix("content-length: ")
                    .map(str::to_owned)
            })
            .map_or(0, |length| length.parse::<usize>().unwrap());
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.unwrap();
        head + &String::from_utf8_lossy(&body)
    })
    .await
}

/// Waits until the other side closes; returns what it still sent.
pub async fn read_until_closed(stream: &mut TcpStream) -> Vec<u8> {
    within_timeout("the connection to close", async {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        rest
    })
    .await
}
