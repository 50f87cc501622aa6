//! A fake of the control API and the gateway: stores what is put, and records requests.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, Uri};
use serde_json::{Value, json};

const EVENTS: u64 = 2500;

#[derive(Clone, Debug)]
pub struct Request {
    /// Method, path and query.
    pub line: String,
    pub token: Option<String>,
    pub position: Option<String>,
    pub body: Value,
}

#[derive(Default)]
struct FakeState {
    url: String,
    requests: Vec<Request>,
    stored: BTreeMap<String, Value>,
    refused: BTreeMap<String, (u16, Value)>,
    states: BTreeMap<String, VecDeque<String>>,
    evaluated: VecDeque<u64>,
}

#[derive(Clone)]
struct SharedState(Arc<Mutex<FakeState>>);

impl SharedState {
    fn lock(&self) -> MutexGuard<'_, FakeState> {
        self.0.lock().unwrap()
    }
}

pub struct FakeServer {
    pub url: String,
    shared: SharedState,
    _runtime: tokio::runtime::Runtime,
}

impl FakeServer {
    pub fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let shared = SharedState(Arc::default());
        shared.lock().url.clone_from(&url);
        let router = Router::new().fallback(answer).with_state(shared.clone());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self {
            url,
            shared,
            _runtime: runtime,
        }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.lock().requests.clone()
    }

    /// Everything but reads, in order.
    pub fn writes(&self) -> Vec<String> {
        let lines = self.requests().into_iter().map(|request| request.line);
        lines.filter(|line| !line.starts_with("GET ")).collect()
    }

    pub fn body_of(&self, line: &str) -> Value {
        let found = self
            .requests()
            .into_iter()
            .find(|request| request.line == line);
        found.unwrap_or_else(|| panic!("{line} was not asked")).body
    }

    pub fn last_token(&self) -> Option<String> {
        self.requests()
            .last()
            .and_then(|request| request.token.clone())
    }

    pub fn stored(&self, path: &str) -> String {
        self.shared.lock().stored[path].to_string()
    }

    /// Stores a resource, as if it existed before.
    pub fn store(&self, path: &str, body: Value) {
        self.shared.lock().stored.insert(path.into(), body);
    }

    pub fn refuse(&self, path: &str, status: u16, problem: Value) {
        self.shared
            .lock()
            .refused
            .insert(path.into(), (status, problem));
    }

    /// Sets the states of a resource, one per read; the last one stays. A state is a provisioning state
    /// and, after a blank, the reason of the condition Available of a server that has it.
    pub fn states(&self, path: &str, states: &[&str]) {
        let states = states.iter().map(|state| (*state).to_owned()).collect();
        self.shared.lock().states.insert(path.into(), states);
    }
}

impl FakeServer {
    /// Sets the revisions of Autoscales that the last decision evaluated, one per read; the last one stays.
    /// Without them, it is always the present one.
    pub fn evaluated(&self, revisions: &[u64]) {
        self.shared.lock().evaluated = revisions.iter().copied().collect();
    }
}

async fn answer(
    State(shared): State<SharedState>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let header = |name: &str| {
        headers
            .get(name)
            .map(|value| value.to_str().unwrap().to_owned())
    };
    let mut inner = shared.lock();
    inner.requests.push(Request {
        line: format!("{method} {uri}"),
        token: header("authorization"),
        position: header("penstock-position"),
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    });
    let path = uri.path().to_owned();
    if path.ends_with("/score") {
        return scored(&body, header("penstock-deployment"));
    }
    if let Some((status, problem)) = inner.refused.get(&path)
        && method == Method::PUT
    {
        return reply(*status, &problem.to_string());
    }
    let query = uri.query().unwrap_or_default().to_owned();
    match method {
        Method::GET => inner.get(&path, &query),
        Method::PUT => {
            let body = serde_json::from_slice(&body).unwrap();
            inner.put(&path, query.contains("dryRun=true"), body)
        }
        _ if path == "/v1/events/replay" => reply(
            200,
            r#"{"ok":true,"decisions":9,"equal":5,"different":0,"differentOlder":4,"otherVersions":[
                {"engine":"autoscale","engineVersion":1,"equal":2,"onlyWords":3,"other":1},
                {"engine":"autoscale","engineVersion":2,"zoneData":"2025b","equal":1,"onlyWords":0,"other":0}]}"#,
        ),
        _ if path == "/v1/events/verify" => reply(200, r#"{"ok":true,"problems":[]}"#),
        _ => reply(200, "{}"),
    }
}

fn scored(body: &[u8], deployment: Option<String>) -> Response<Body> {
    let text = String::from_utf8_lossy(body).into_owned();
    let failed = text == "\"fail\"";
    let mut response = reply(
        if failed { 424 } else { 200 },
        &format!("{{\"echo\":{text}}}"),
    );
    let headers = response.headers_mut();
    let deployment = deployment.unwrap_or_else(|| "blue".into());
    headers.insert("penstock-deployment", deployment.parse().unwrap());
    headers.insert("x-request-id", "r-1".parse().unwrap());
    if failed {
        headers.insert("penstock-model-status", "500".parse().unwrap());
    }
    response
}

impl FakeState {
    fn get(&mut self, path: &str, query: &str) -> Response<Body> {
        if path == "/v1/events" {
            return events(query);
        }
        if path == "/v1/events/stream" {
            return stream();
        }
        if path.starts_with("/v1/logs/") {
            return reply(200, "{\"a\": 1}\n");
        }
        if path == "/v1/deployments" {
            return self.list("/v1/endpoints", 5);
        }
        if path.ends_with("/keys") {
            return reply(
                200,
                &json!({"primary": "primary-key", "secondary": "secondary-key"}).to_string(),
            );
        }
        if let Some(present) = path.strip_prefix("/v1/decisions/of-revision-") {
            let evaluated = match self.evaluated.len() {
                0 => present.parse().unwrap(),
                1 => self.evaluated[0],
                _ => self.evaluated.pop_front().unwrap(),
            };
            return reply(
                200,
                &json!({"inputs": {"policyRevision": evaluated}}).to_string(),
            );
        }
        if let Some(states) = self.states.get_mut(path) {
            let state = match states.len() {
                1 => states[0].clone(),
                _ => states.pop_front().unwrap(),
            };
            let (state, available) = match state.split_once(' ') {
                Some((state, reason)) => (state.to_owned(), Some(reason.to_owned())),
                None => (state, None),
            };
            let mut status = json!({"provisioningState": state, "reason": "no instance became ready",
                "instances": {"ready": u32::from(state == "Succeeded"), "wanted": 1}});
            if let Some(reason) = available {
                status["available"] = json!({"reason": reason, "message": "it exited with 1"});
            }
            return reply(200, &json!({"status": status}).to_string());
        }
        if let Some(body) = self.stored.get(path) {
            return reply(200, &body.to_string());
        }
        let parts: Vec<&str> = path.trim_start_matches("/v1/").split('/').collect();
        match parts.as_slice() {
            ["instances"] if query.contains("endpoint=") => {
                reply(200, r#"{"items":[],"nextCursor":null}"#)
            }
            ["events", "heads"] => reply(
                200,
                &json!({"items": [{"bucket": 7, "position": 2500, "hash": "ab".repeat(32)}]})
                    .to_string(),
            ),
            ["events", "parked"] => reply(200, r#"{"items":[]}"#),
            ["endpoints" | "instances" | "decisions" | "autoscale" | "access"] => {
                let depth = path.matches('/').count() + 1;
                self.list(path, depth)
            }
            ["endpoints", endpoint, "deployments"]
                if self
                    .stored
                    .contains_key(&format!("/v1/endpoints/{endpoint}")) =>
            {
                self.list(path, 5)
            }
            _ => reply(404, &problem(404, "There is nothing by that name.")),
        }
    }

    fn list(&self, under: &str, depth: usize) -> Response<Body> {
        let prefix = format!("{under}/");
        let items: Vec<&Value> = self
            .stored
            .iter()
            .filter(|(path, _)| path.starts_with(&prefix) && path.matches('/').count() == depth)
            .map(|(_, body)| body)
            .collect();
        reply(
            200,
            &json!({"items": items, "nextCursor": null}).to_string(),
        )
    }

    fn put(&mut self, path: &str, dry_run: bool, body: Value) -> Response<Body> {
        let mut resource = body.clone();
        resource["status"] = json!({"provisioningState": "Succeeded", "traffic": 100,
            "available": {"reason": "Ready"},
            "instances": {"ready": 1, "wanted": 1},
            "scoringUri": format!("{}/endpoints/iris/score", self.url)});
        if path.starts_with("/v1/autoscale/") {
            resource["metadata"]["revision"] = json!(1);
            resource["status"]["lastDecision"] = json!({"id": "of-revision-1"});
        }
        // Omitted parts of a split stay unchanged.
        if path.ends_with("/traffic") {
            let endpoint = path.trim_end_matches("/traffic").to_owned();
            self.stored.get_mut(&endpoint).unwrap()["spec"]["traffic"] = body["traffic"].clone();
            return reply(
                200,
                &json!({"result": "changed", "dryRun": false, "changes": []}).to_string(),
            );
        }
        let before = self.stored.get(path);
        let result = match before {
            None => "created",
            Some(old) if old["spec"] == body["spec"] => "unchanged",
            Some(_) => "changed",
        };
        if !dry_run {
            self.stored.insert(path.to_owned(), resource.clone());
        }
        let mut answer =
            json!({"result": result, "dryRun": dry_run, "changes": [], "resource": resource});
        if body.pointer("/metadata/labels/warned").is_some() {
            answer["warnings"] =
                json!([{"pointer": "/spec/mode", "detail": "it is odd: change it"}]);
        }
        reply(200, &answer.to_string())
    }
}

fn events(query: &str) -> Response<Body> {
    let number = |name: &str| -> u64 {
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs
            .into_iter()
            .find(|(key, _)| *key == name)
            .map_or(0, |(_, value)| value.parse().unwrap())
    };
    let (after, limit) = (number("after"), number("limit"));
    let items: Vec<Value> = (after + 1..=EVENTS)
        .take(limit as usize)
        .map(|position| json!({"position": position, "type": "usage.closed"}))
        .collect();
    reply(
        200,
        &json!({"items": items, "nextCursor": null, "head": EVENTS}).to_string(),
    )
}

fn stream() -> Response<Body> {
    let event = |position: u64, kind: &str| {
        let data = json!({"position": position, "type": kind, "stream": "scaling/default/iris"});
        format!("id: {position}\nevent: {kind}\ndata: {data}\n\n")
    };
    let text = event(EVENTS + 1, "usage.closed") + &event(EVENTS + 2, "scaling.decided");
    Response::builder()
        .header("content-type", "text/event-stream")
        .body(Body::from(text))
        .unwrap()
}

fn problem(status: u16, detail: &str) -> String {
    json!({"type": "about:blank", "title": "Refused", "status": status, "detail": detail, "code": "refused"}).to_string()
}

fn reply(status: u16, body: &str) -> Response<Body> {
    Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .header("penstock-position", "7")
        .body(Body::from(body.to_owned()))
        .unwrap()
}
