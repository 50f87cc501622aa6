//! Ends a request in each of its phases.

use std::sync::Mutex;

use contract::resources::AuthMode;
use contract::{EndpointKey, Uid};
use http::HeaderValue;

use super::*;
use crate::admission::{DeploymentState, RoutedInstance};
use crate::paths::PathShares;
use crate::shard::Shard;

const SLOT: usize = 0;

/// One deployment with one instance of one slot, and its counters.
struct TestDeployment {
    endpoint: Arc<ServedEndpoint>,
    meter: Rc<WorkerMeter>,
}

impl TestDeployment {
    fn new() -> Self {
        let key = EndpointKey::new(&"iris".parse().unwrap());
        let uid = Uid(uuid::Uuid::nil());
        let name = "blue".parse().unwrap();
        let state = Arc::new(DeploymentState::new(key, name, uid, SLOT));
        let routed = RoutedInstance {
            id: "i".to_owned().into(),
            address: "127.0.0.1:1".into(),
            draining: false,
            slots: 1,
        };
        state.set_instances(&[routed], || 0);
        let deployment = ServedDeployment {
            name_header: HeaderValue::from_static("blue"),
            limits: crate::limits::TimeLimits::new(&Default::default()),
            passes_authorization: false,
            queue_wait_us: 1,
            keep_alive_idle_us: 1,
            limit: 1,
            thresholds_us: Vec::new(),
            error_mapping: Default::default(),
            protocol: Default::default(),
            paths: None,
            state,
        };
        let endpoint = ServedEndpoint {
            uid,
            auth: AuthMode::Key,
            keys: Vec::new(),
            model_client_errors: ModelClientErrors::default(),
            request_bytes_max: 0,
            error_mapping: Default::default(),
            protocol: Default::default(),
            shares: PathShares::new(std::iter::empty(), None),
            routed: None,
            deployments: vec![deployment],
        };
        let meter = WorkerMeter {
            shard: Arc::new(Mutex::new(Shard::default())),
            is_aborting: Rc::default(),
        };
        Self {
            endpoint: Arc::new(endpoint),
            meter: Rc::new(meter),
        }
    }

    fn in_flight(&self) -> InFlightRequest {
        let (meter, endpoint) = (self.meter.clone(), self.endpoint.clone());
        InFlightRequest::new(meter, endpoint, 0, now_us(), true, Rc::default())
    }

    fn admitted(&self) -> InFlightRequest {
        let mut in_flight = self.in_flight();
        in_flight.admit().unwrap();
        in_flight
    }

    fn serving(&self) -> InFlightRequest {
        let mut in_flight = self.admitted();
        assert!(in_flight.try_serve(0, now_us()).unwrap());
        in_flight
    }

    fn responding(&self) -> InFlightRequest {
        let mut in_flight = self.serving();
        in_flight
            .begin_response(StatusCode::OK, RequestOutcome::Success)
            .unwrap();
        in_flight
    }

    /// Returns the outcomes since the last call; nothing may still be held.
    fn take_outcomes(&self) -> contract::frame::Outcomes {
        self.take_counters().outcomes
    }

    fn take_counters(&self) -> crate::shard::DeploymentCounters {
        let state = &self.endpoint.deployments[0].state;
        let held = [
            state.pending(),
            state.serving.current(),
            state.queued.current(),
        ];
        assert_eq!(held, [0; 3]);
        assert_eq!(state.reported_instances()[0].in_flight(), 0);
        let mut shard = lock(&self.meter.shard);
        let counters = shard.counters(SLOT);
        assert_eq!(counters.arrival_times.oldest(), None);
        // A request that is still counted would accumulate time from here on.
        for gauge in [&mut counters.serving, &mut counters.queued] {
            gauge.take(now_us());
            assert_eq!(gauge.take(now_us() + 1_000_000), 0);
        }
        counters.take()
    }
}

#[test]
fn only_answers_of_the_model_and_time_outs_have_a_latency() {
    let test = TestDeployment::new();
    let latencies = || test.take_counters().latency.count();
    for (outcome, has_latency) in [
        (RequestOutcome::Success, true),
        (RequestOutcome::ModelClientError, true),
        (RequestOutcome::ModelServerError, true),
        (RequestOutcome::Timeout, true),
        (RequestOutcome::Unreachable, false),
        (RequestOutcome::Unavailable, false),
        (RequestOutcome::Internal, false),
        (RequestOutcome::TooManyPending, false),
        (RequestOutcome::Refused, false),
        (RequestOutcome::ClientLeft, false),
    ] {
        test.responding().fail(outcome);
        assert_eq!(latencies(), u64::from(has_latency), "{outcome:?}");
    }
}

#[test]
fn a_request_is_counted_once_and_releases_what_it_holds_in_whichever_phase_it_ends() {
    let test = TestDeployment::new();
    let arrived: fn(&TestDeployment) -> InFlightRequest = TestDeployment::in_flight;
    for begin in [
        arrived,
        TestDeployment::admitted,
        TestDeployment::serving,
        TestDeployment::responding,
    ] {
        drop(begin(&test));
        let outcomes = test.take_outcomes();
        assert_eq!((outcomes.client_left, outcomes.total()), (1, 1));
        begin(&test).refuse(Refusal::Timeout);
        let outcomes = test.take_outcomes();
        assert_eq!((outcomes.timeout, outcomes.total()), (1, 1));
    }
    test.responding().finish(now_us());
    let outcomes = test.take_outcomes();
    assert_eq!((outcomes.success, outcomes.total()), (1, 1));
    test.responding().fail(RequestOutcome::Unreachable);
    let outcomes = test.take_outcomes();
    assert_eq!((outcomes.unreachable, outcomes.total()), (1, 1));
}

#[test]
fn a_queued_request_is_served_in_turn_and_leaves_no_trace_when_it_leaves() {
    let test = TestDeployment::new();
    let first = test.serving();
    let mut second = test.admitted();
    assert!(!second.try_serve(0, now_us()).unwrap());
    second.queue().unwrap();
    let cx = &mut Context::from_waker(std::task::Waker::noop());
    assert!(second.poll_served(cx).is_pending());
    drop(first);
    assert!(matches!(second.poll_served(cx), Poll::Ready(Ok(_))));
    let mut left = test.in_flight();
    assert!(left.admit().is_ok());
    left.queue().unwrap();
    drop(left);
    drop(second);
    assert_eq!(test.take_outcomes().client_left, 3);
}

#[test]
fn no_phase_is_reached_out_of_order() {
    let test = TestDeployment::new();
    let mut arrived = test.in_flight();
    assert_eq!(arrived.try_serve(0, 0), Err(Refusal::Internal));
    assert_eq!(arrived.queue(), Err(Refusal::Internal));
    let result = arrived.begin_response(StatusCode::OK, RequestOutcome::Success);
    assert_eq!(result, Err(Refusal::Internal));
    // Finishing without a response is not a success.
    arrived.finish(now_us());
    let mut serving = test.serving();
    assert_eq!(serving.admit(), Err(Refusal::Internal));
    drop(serving);
    let outcomes = test.take_outcomes();
    assert_eq!((outcomes.client_left, outcomes.total()), (2, 2));
}
