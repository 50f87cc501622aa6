//! Writes small responses in one piece. A response of a head and a short body would otherwise be a
//! vectored write, which costs more than the copy saves.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

/// Writes up to this size are coalesced.
pub const COALESCE_BYTES_MAX: usize = 4096;

thread_local! {
    static COALESCED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

pub fn poll_write_coalesced(
    io: &mut TcpStream,
    cx: &mut Context<'_>,
    pieces: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    let total: usize = pieces.iter().map(|piece| piece.len()).sum();
    if total > COALESCE_BYTES_MAX {
        return Pin::new(io).poll_write_vectored(cx, pieces);
    }
    COALESCED.with_borrow_mut(|buffer| {
        buffer.clear();
        for piece in pieces {
            buffer.extend_from_slice(piece);
        }
        Pin::new(io).poll_write(cx, buffer)
    })
}
