//! Writing small answers in one piece. An answer of a head and a short body would otherwise be
//! handed to the system as a list, which costs more than the copy saves.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use tokio::net::TcpStream;

/// Up to this size pieces are joined.
pub const JOINED_MAX: usize = 4096;

thread_local! {
    static JOINED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

pub fn poll_write_pieces(
    io: &mut TcpStream,
    cx: &mut Context<'_>,
    pieces: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    let total: usize = pieces.iter().map(|piece| piece.len()).sum();
    if total > JOINED_MAX {
        return Pin::new(io).poll_write_vectored(cx, pieces);
    }
    JOINED.with_borrow_mut(|joined| {
        joined.clear();
        for piece in pieces {
            joined.extend_from_slice(piece);
        }
        Pin::new(io).poll_write(cx, joined)
    })
}
