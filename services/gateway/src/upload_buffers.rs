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

/// The right to a buffer of this size; returned when dropped.
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
    /// Returns `None` if that is too much together with the others.
    pub fn reserve(&self, bytes: u64) -> Option<BufferPermit> {
        let before = self.bytes.fetch_add(bytes, Ordering::Relaxed);
        let permit = BufferPermit {
            buffers: self.clone(),
            bytes,
        };
        // Dropping the permit takes it back.
        (before.saturating_add(bytes) <= BYTES_MAX).then_some(permit)
    }
}

impl BufferPermit {
    pub fn bytes(&self) -> u64 {
        self.bytes
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
        let most = buffers.reserve(BYTES_MAX - 1).unwrap();
        assert!(buffers.reserve(2).is_none());
        let data = buffers.reserve(1).unwrap().hold(Bytes::from_static(b"x"));
        let copy = data.clone();
        drop(data);
        assert!(buffers.reserve(1).is_none());
        drop(copy);
        assert!(buffers.reserve(1).is_some());
        drop(most);
        assert!(buffers.reserve(BYTES_MAX).is_some());
    }
}
