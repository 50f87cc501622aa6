//! Memory for bodies that are received before an instance is chosen, bounded across all threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

/// Maximum size of all such buffers together.
const BYTES_MAX: u64 = 128 << 20;

/// The buffers in use.
#[derive(Clone, Debug, Default)]
pub struct UploadBuffers {
    bytes: Arc<AtomicU64>,
}

/// The right to a buffer of this size, which grows with what arrives, since a sender that only begins must not
/// keep memory from others; returned when dropped.
#[derive(Debug)]
pub struct BufferPermit {
    buffers: UploadBuffers,
    bytes: u64,
}

/// What is in a buffer.
struct Held {
    data: Bytes,
    _permit: BufferPermit,
}

impl UploadBuffers {
    /// A permit for an empty buffer.
    pub fn begin(&self) -> BufferPermit {
        BufferPermit {
            buffers: self.clone(),
            bytes: 0,
        }
    }
}

impl BufferPermit {
    /// Counts a piece that has arrived; returns whether the buffers have room for another one.
    pub fn grow(&mut self, bytes: u64) -> bool {
        self.bytes += bytes;
        let before = self.buffers.bytes.fetch_add(bytes, Ordering::Relaxed);
        before.saturating_add(bytes) < BYTES_MAX
    }

    /// Keeps the permit as long as any copy of `data`.
    pub fn hold(self, data: Bytes) -> Bytes {
        Bytes::from_owner(Held {
            data,
            _permit: self,
        })
    }
}

impl Drop for BufferPermit {
    fn drop(&mut self) {
        self.buffers.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_bounded_together_and_counted_as_long_as_their_data() {
        let buffers = UploadBuffers::default();
        let mut most = buffers.begin();
        assert!(most.grow(BYTES_MAX - 2));
        let mut last = buffers.begin();
        assert!(last.grow(1));
        let data = last.hold(Bytes::from_static(b"x"));
        let copy = data.clone();
        drop(data);
        assert!(!buffers.begin().grow(1));
        drop(copy);
        assert!(buffers.begin().grow(1));
        drop(most);
        assert!(buffers.begin().grow(BYTES_MAX - 1));
    }
}
