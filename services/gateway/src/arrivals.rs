//! When requests that have not ended arrived, so that the age of the oldest can be told.
//!
//! Invariant: a request enters and leaves in a few steps, however many there are; whoever looks for the
//! oldest looks at no more places than there were requests at once since there was none.

const FREE: u64 = u64::MAX;

#[derive(Debug, Default)]
pub struct Arrivals {
    at_us: Vec<u64>,
    free: Vec<u32>,
}

/// Where a request's arrival stands.
#[derive(Clone, Copy, Debug)]
pub struct Place(u32);

impl Arrivals {
    pub fn enter(&mut self, at_us: u64) -> Place {
        match self.free.pop() {
            Some(place) => {
                self.set(place, at_us);
                Place(place)
            }
            None => {
                self.at_us.push(at_us);
                Place(self.at_us.len() as u32 - 1)
            }
        }
    }

    /// To be called once for each that entered.
    pub fn leave(&mut self, place: Place) {
        self.set(place.0, FREE);
        self.free.push(place.0);
        if self.free.len() == self.at_us.len() {
            self.at_us.clear();
            self.free.clear();
        }
    }

    pub fn oldest(&self) -> Option<u64> {
        self.at_us.iter().copied().min().filter(|at| *at != FREE)
    }

    fn set(&mut self, place: u32, at_us: u64) {
        if let Some(at) = self.at_us.get_mut(place as usize) {
            *at = at_us;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_the_first_of_those_that_have_not_left() {
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.oldest(), None);
        let places: Vec<Place> = [30, 10, 20].map(|at| arrivals.enter(at)).into();
        assert_eq!(arrivals.oldest(), Some(10));
        arrivals.leave(places[1]);
        assert_eq!(arrivals.oldest(), Some(20));
        let again = arrivals.enter(40);
        arrivals.leave(places[2]);
        assert_eq!(arrivals.oldest(), Some(30));
        arrivals.leave(places[0]);
        assert_eq!(arrivals.oldest(), Some(40));
        arrivals.leave(again);
        assert_eq!(arrivals.oldest(), None);
    }

    #[test]
    fn there_are_no_more_places_than_requests_at_once() {
        let mut arrivals = Arrivals::default();
        let long = arrivals.enter(1);
        for at in 2..1000 {
            let short = arrivals.enter(at);
            arrivals.leave(short);
        }
        assert_eq!(arrivals.at_us.len(), 2);
        arrivals.leave(long);
        assert_eq!(arrivals.at_us.len(), 0);
    }
}
