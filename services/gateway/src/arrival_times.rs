//! When the requests that have not ended arrived, or had been received, to determine the age of the oldest.
//!
//! Invariant: inserting and removing take constant time; finding the oldest scans no more entries
//! than there were concurrent requests since the set was last empty.

const FREE: u64 = u64::MAX;
/// Of a request whose client has not sent it yet: it has no age.
const RECEIVING: u64 = u64::MAX - 1;

#[derive(Debug, Default)]
pub struct ArrivalTimes {
    at_us: Vec<u64>,
    free: Vec<u32>,
}

/// Identifies an arrival.
#[derive(Clone, Copy, Debug)]
pub struct ArrivalId(u32);

impl ArrivalTimes {
    pub fn insert(&mut self, at_us: u64) -> ArrivalId {
        match self.free.pop() {
            Some(index) => {
                self.set(index, at_us);
                ArrivalId(index)
            }
            None => {
                self.at_us.push(at_us);
                ArrivalId(self.at_us.len() as u32 - 1)
            }
        }
    }

    /// Call once for each insertion.
    pub fn remove(&mut self, id: ArrivalId) {
        self.set(id.0, FREE);
        self.free.push(id.0);
        if self.free.len() == self.at_us.len() {
            self.at_us.clear();
            self.free.clear();
        }
    }

    pub fn oldest(&self) -> Option<u64> {
        let oldest = self.at_us.iter().copied().min();
        oldest.filter(|at| *at < RECEIVING)
    }

    pub fn is_empty(&self) -> bool {
        self.at_us.is_empty()
    }

    /// The request has no age until it is [`received`](Self::received).
    pub fn receive(&mut self, id: ArrivalId) {
        self.set(id.0, RECEIVING);
    }

    pub fn received(&mut self, id: ArrivalId, at_us: u64) {
        self.set(id.0, at_us);
    }

    fn set(&mut self, index: u32, at_us: u64) {
        if let Some(at) = self.at_us.get_mut(index as usize) {
            *at = at_us;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_the_earliest_that_has_not_been_removed() {
        let mut arrivals = ArrivalTimes::default();
        assert_eq!(arrivals.oldest(), None);
        let ids: Vec<ArrivalId> = [30, 10, 20].map(|at| arrivals.insert(at)).into();
        assert_eq!(arrivals.oldest(), Some(10));
        arrivals.remove(ids[1]);
        assert_eq!(arrivals.oldest(), Some(20));
        let later = arrivals.insert(40);
        arrivals.remove(ids[2]);
        assert_eq!(arrivals.oldest(), Some(30));
        arrivals.remove(ids[0]);
        assert_eq!(arrivals.oldest(), Some(40));
        arrivals.remove(later);
        assert_eq!(arrivals.oldest(), None);
    }

    #[test]
    fn a_request_that_is_being_received_has_no_age_and_is_open() {
        let mut arrivals = ArrivalTimes::default();
        let id = arrivals.insert(10);
        arrivals.receive(id);
        assert_eq!(arrivals.oldest(), None);
        assert!(!arrivals.is_empty());
        arrivals.received(id, 30);
        assert_eq!(arrivals.oldest(), Some(30));
        arrivals.remove(id);
        assert!(arrivals.is_empty());
    }

    #[test]
    fn the_table_is_no_larger_than_the_number_of_concurrent_requests() {
        let mut arrivals = ArrivalTimes::default();
        let long = arrivals.insert(1);
        for at in 2..1000 {
            let short = arrivals.insert(at);
            arrivals.remove(short);
        }
        assert_eq!(arrivals.at_us.len(), 2);
        arrivals.remove(long);
        assert_eq!(arrivals.at_us.len(), 0);
    }
}
