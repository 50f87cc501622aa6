//! How long a request may take on an instance: to the first byte of its response, between two bytes, in
//! total. All times are in microseconds, those of moments by `timer::now_us`.

use contract::resources::RequestSettings;

/// The limits that a deployment sets to each of its requests.
#[derive(Clone, Copy, Debug)]
pub struct TimeLimits {
    /// From the dispatch, or the end of the upload, to the first byte of the response.
    first_byte_us: u64,
    /// Without a byte, in either direction; unlimited if `None`.
    idle_us: Option<u64>,
    /// From the dispatch to the last byte.
    total_us: u64,
}

impl TimeLimits {
    pub fn new(settings: &RequestSettings) -> Self {
        let micros = |span: contract::time::Span| span.millis() * 1000;
        Self {
            first_byte_us: micros(settings.timeout),
            idle_us: settings.stream_idle().map(micros),
            total_us: micros(settings.longest_request()),
        }
    }

    /// When a request that begins at `at_us` must have ended.
    pub fn end(&self, at_us: u64) -> u64 {
        at_us + self.total_us
    }

    /// When the response must have begun, if the instance has had the request since `since_us`.
    pub fn first_byte(&self, end_us: u64, since_us: u64) -> u64 {
        end_us.min(since_us + self.first_byte_us)
    }

    /// When the next byte must have arrived, if the wait for it began at `since_us`.
    pub fn next_byte(&self, end_us: u64, since_us: u64) -> u64 {
        let idle = self.idle_us.map(|idle| since_us + idle);
        idle.map_or(end_us, |at_us| at_us.min(end_us))
    }
}
