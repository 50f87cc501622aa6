//! A request ended in each of its phases.

use std::sync::Mutex;

use contract::resources::AuthMode;
use contract::{EndpointKey, Uid};
use http::HeaderValue;

use super::*;
use crate::admission::{DeploymentState, Wanted};
use crate::shard::Shard;

const SLOT: usize = 0;

/// One deployment with one instance of one slot, and what is counted of it.
struct Place {
    endpoint: Arc<Endpoint>,
    meter: Rc<ThreadMeter>,
}

impl Place {
    fn new() -> Self {
        let key = EndpointKey::new(&"iris".parse().unwrap());
        let uid = Uid(uuid::Uuid::nil());
        let name = "blue".parse().unwrap();
        let state = Arc::new(DeploymentState::new(key, name, uid, SLOT));
        let wanted = Wanted {
            id: "i".to_owned().into(),
            address: "127.0.0.1:1".into(),
            draining: false,
            slots: 1,
        };
        state.set_instances(&[wanted], || 0);
        let deployment = Deployment {
            header: HeaderValue::from_static("blue"),
            timeout_us: 1,
            queue_wait_us: 1,
            keep_alive_idle_us: 1,
            limit: 1,
            thresholds_us: Vec::new(),
            state,
        };
        let endpoint = Endpoint {
            uid,
            auth: AuthMode::Key,
            keys: Vec::new(),
            model_client_errors: ModelClientErrors::default(),
            request_bytes_max: 0,
            split: None,
            count: Arc::default(),
            deployments: vec![deployment],
        };
        let meter = ThreadMeter {
            shard: Arc::new(Mutex::new(Shard::default())),
            cutting: Rc::default(),
        };
        Self {
            endpoint: Arc::new(endpoint),
            meter: Rc::new(meter),
        }
    }

    fn flight(&self) -> Flight {
        let (meter, endpoint) = (self.meter.clone(), self.endpoint.clone());
        Flight::new(meter, endpoint, 0, now_us(), Rc::default())
    }

    fn admitted(&self) -> Flight {
        let mut flight = self.flight();
        flight.admit().unwrap();
        flight
    }

    fn served(&self) -> Flight {
        let mut flight = self.admitted();
        assert!(flight.try_serve(0, now_us()).unwrap());
        flight
    }

    fn answering(&self) -> Flight {
        let mut flight = self.served();
        flight.answer(StatusCode::OK, Outcome::Success).unwrap();
        flight
    }

    /// Outcomes since the last call; nothing may be held.
    fn ended(&self) -> contract::frame::Outcomes {
        let state = &self.endpoint.deployments[0].state;
        let held = [state.pending(), state.serving.now(), state.queued.now()];
        assert_eq!(held, [0; 3]);
        assert_eq!(state.reported_instances()[0].in_flight(), 0);
        let mut shard = lock(&self.meter.shard);
        let cell = shard.cell(SLOT);
        assert_eq!(cell.open.oldest(), None);
        // A request that were still counted in would add up from here on.
        for gauge in [&mut cell.serving, &mut cell.queued] {
            gauge.take(now_us());
            assert_eq!(gauge.take(now_us() + 1_000_000), 0);
        }
        cell.take().outcomes
    }
}

#[test]
fn a_request_is_counted_once_and_gives_back_what_it_holds_in_whichever_phase_it_ends() {
    let place = Place::new();
    let arrived: fn(&Place) -> Flight = Place::flight;
    for begin in [arrived, Place::admitted, Place::served, Place::answering] {
        drop(begin(&place));
        let ended = place.ended();
        assert_eq!((ended.client_left, ended.total()), (1, 1));
        begin(&place).end_refused(Refusal::Timeout);
        let ended = place.ended();
        assert_eq!((ended.timeout, ended.total()), (1, 1));
    }
    place.answering().end_whole(now_us());
    let ended = place.ended();
    assert_eq!((ended.success, ended.total()), (1, 1));
    place.answering().end_broken(Outcome::Unreachable);
    let ended = place.ended();
    assert_eq!((ended.unreachable, ended.total()), (1, 1));
}

#[test]
fn a_request_in_the_queue_is_served_when_its_turn_comes_and_leaves_no_trace_when_it_goes() {
    let place = Place::new();
    let first = place.served();
    let mut second = place.admitted();
    assert!(!second.try_serve(0, now_us()).unwrap());
    second.queue().unwrap();
    let cx = &mut Context::from_waker(std::task::Waker::noop());
    assert!(second.poll_served(cx).is_pending());
    drop(first);
    assert!(matches!(second.poll_served(cx), Poll::Ready(Ok(_))));
    let mut left = place.flight();
    assert!(left.admit().is_ok());
    left.queue().unwrap();
    drop(left);
    drop(second);
    assert_eq!(place.ended().client_left, 3);
}

#[test]
fn no_phase_is_reached_out_of_turn() {
    let place = Place::new();
    let mut arrived = place.flight();
    assert_eq!(arrived.try_serve(0, 0), Err(Refusal::Internal));
    assert_eq!(arrived.queue(), Err(Refusal::Internal));
    let answered = arrived.answer(StatusCode::OK, Outcome::Success);
    assert_eq!(answered, Err(Refusal::Internal));
    // Whole without an answer, it has not succeeded.
    arrived.end_whole(now_us());
    let mut served = place.served();
    assert_eq!(served.admit(), Err(Refusal::Internal));
    drop(served);
    let ended = place.ended();
    assert_eq!((ended.client_left, ended.total()), (2, 2));
}
