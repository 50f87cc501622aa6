//! The HTTP server around the model. Owns the format of requests and responses, and their limits.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::model::{INPUTS, Model};

/// A flower takes about 25 bytes of JSON, so this is enough for `ROWS_MAX` rows.
const BODY_BYTES_MAX: usize = 256 * 1024;
/// Limits the CPU time of a request.
const ROWS_MAX: usize = 1000;

#[derive(Clone, Copy)]
pub struct Log {
    level: u8,
}

impl Log {
    pub fn new(level: u8) -> Self {
        Self { level }
    }

    pub fn line(self, level: u8, text: &str) {
        if self.level >= level {
            println!("penstock-scorer: {text}");
        }
    }
}

#[derive(Clone)]
pub struct Server {
    model: Arc<Model>,
    delay: Duration,
    log: Log,
}

#[derive(Deserialize)]
struct ScoreRequest {
    data: Vec<Vec<f32>>,
}

#[derive(Serialize)]
struct ScoreAnswer {
    classes: Vec<&'static str>,
    scores: Vec<[f32; 3]>,
}

#[derive(Serialize)]
struct ErrorAnswer {
    error: String,
}

impl Server {
    pub fn new(model: Arc<Model>, delay: Duration, log: Log) -> Self {
        Self { model, delay, log }
    }

    /// Serves until `stopped`; returns once the requests in flight have been answered.
    pub async fn run(self, listener: TcpListener, stopped: impl Future<Output = ()>) {
        let (drain, draining) = watch::channel(false);
        let mut connections = JoinSet::new();
        tokio::pin!(stopped);
        loop {
            tokio::select! {
                () = &mut stopped => break,
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        connections.spawn(self.clone().connection(stream, draining.clone()));
                    }
                    // Usually out of file descriptors: wait for a connection to close.
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                },
                Some(_) = connections.join_next() => {}
            }
        }
        drop(listener);
        // Without receivers there are no connections to notify.
        let _ = drain.send(true);
        while connections.join_next().await.is_some() {}
    }

    async fn connection(self, stream: TcpStream, mut draining: watch::Receiver<bool>) {
        let _ = stream.set_nodelay(true);
        let service = service_fn(|request| {
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.answer(request).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(stream), service);
        tokio::pin!(connection);
        // Connection errors are the client's problem.
        tokio::select! {
            _ = connection.as_mut() => return,
            _ = draining.changed() => connection.as_mut().graceful_shutdown(),
        }
        let _ = connection.await;
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let line = format!("{} {}", request.method(), request.uri().path());
        let response = match (request.uri().path(), request.method()) {
            ("/", &Method::GET) => json(StatusCode::OK, br#"{"status":"ready"}"#.to_vec()),
            ("/score", &Method::POST) => self.score(request.into_body()).await,
            ("/", _) => not_allowed("GET"),
            ("/score", _) => not_allowed("POST"),
            (path, _) => refusal(
                StatusCode::NOT_FOUND,
                format!("there is no `{path}` here: POST /score, or GET /"),
            ),
        };
        self.log
            .line(2, &format!("{line} {}", response.status().as_u16()));
        response
    }

    async fn score(&self, body: Incoming) -> Response<Full<Bytes>> {
        let body = match Limited::new(body, BODY_BYTES_MAX).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => {
                return refusal(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("the body was not read ({error}): send at most {BODY_BYTES_MAX} bytes"),
                );
            }
        };
        let flowers = match flowers(&body) {
            Ok(flowers) => flowers,
            Err(reason) => return refusal(StatusCode::BAD_REQUEST, reason),
        };
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        // On a blocking thread, so that health checks are answered while a request computes.
        let model = self.model.clone();
        match tokio::task::spawn_blocking(move || score(&model, &flowers)).await {
            Ok(Ok(body)) => json(StatusCode::OK, body),
            Ok(Err(reason)) => refusal(StatusCode::BAD_REQUEST, reason),
            Err(_) => refusal(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the model broke off".to_owned(),
            ),
        }
    }
}

fn flowers(body: &[u8]) -> Result<Vec<[f32; INPUTS]>, String> {
    let request: ScoreRequest = serde_json::from_slice(body)
        .map_err(|error| format!(r#"the body is not {{"data": [[…4 numbers…], …]}}: {error}"#))?;
    if request.data.is_empty() || request.data.len() > ROWS_MAX {
        return Err(format!(
            "data has {} rows: send 1 to {ROWS_MAX}",
            request.data.len()
        ));
    }
    let row = |(index, values): (usize, Vec<f32>)| {
        let found = values.len();
        <[f32; INPUTS]>::try_from(values).map_err(|_| {
            format!("data[{index}] has {found} numbers: a flower has {INPUTS} measurements")
        })
    };
    request.data.into_iter().enumerate().map(row).collect()
}

fn score(model: &Model, flowers: &[[f32; INPUTS]]) -> Result<Vec<u8>, String> {
    let mut answer = ScoreAnswer {
        classes: Vec::with_capacity(flowers.len()),
        scores: Vec::with_capacity(flowers.len()),
    };
    for (index, flower) in flowers.iter().enumerate() {
        let scores = model
            .score(flower)
            .map_err(|fault| format!("data[{index}]: {fault}"))?;
        answer.classes.push(scores.class());
        answer.scores.push(scores.0);
    }
    serde_json::to_vec(&answer).map_err(|error| error.to_string())
}

fn json(status: StatusCode, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(
        CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/json"),
    );
    response
}

fn refusal(status: StatusCode, error: String) -> Response<Full<Bytes>> {
    let body = serde_json::to_vec(&ErrorAnswer { error }).unwrap_or_default();
    json(status, body)
}

fn not_allowed(method: &'static str) -> Response<Full<Bytes>> {
    let mut response = refusal(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("only {method} is answered here"),
    );
    response
        .headers_mut()
        .insert(ALLOW, hyper::header::HeaderValue::from_static(method));
    response
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    use super::*;

    struct Running {
        address: SocketAddr,
        stop: oneshot::Sender<()>,
        done: JoinHandle<()>,
    }

    async fn running(delay: Duration) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = Server::new(Arc::new(Model::new(16, 2)), delay, Log::new(0));
        let done = tokio::spawn(server.run(listener, async {
            let _ = stopped.await;
        }));
        Running {
            address,
            stop,
            done,
        }
    }

    async fn send(stream: &mut TcpStream, method: &str, path: &str, body: &str) {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
    }

    async fn answer(stream: &mut TcpStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    async fn ask(address: SocketAddr, method: &str, path: &str, body: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        send(&mut stream, method, path, body).await;
        answer(&mut stream).await
    }

    #[tokio::test]
    async fn flowers_are_scored_row_by_row() {
        let server = running(Duration::ZERO).await;
        let body = r#"{"data":[[5.1,3.5,1.4,0.2],[6.3,3.3,6.0,2.5]]}"#;
        let text = ask(server.address, "POST", "/score", body).await;
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        assert!(
            text.contains(r#""classes":["setosa","virginica"]"#),
            "{text}"
        );
    }

    #[tokio::test]
    async fn health_is_answered() {
        let server = running(Duration::ZERO).await;
        let text = ask(server.address, "GET", "/", "").await;
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
    }

    #[tokio::test]
    async fn bad_input_is_refused_with_its_location() {
        let server = running(Duration::ZERO).await;
        for (method, path, body, expected) in [
            ("POST", "/score", "", "400"),
            ("POST", "/score", r#"{"data":[]}"#, "data has 0 rows"),
            (
                "POST",
                "/score",
                r#"{"data":[[1,2,3,4],[1,2]]}"#,
                "data[1] has 2 numbers",
            ),
            ("POST", "/score", r#"{"data":[[1,2,3,1e39]]}"#, "400"),
            ("GET", "/score", "", "405"),
            ("DELETE", "/", "", "405"),
            ("GET", "/else", "", "404"),
        ] {
            let text = ask(server.address, method, path, body).await;
            assert!(text.contains(expected), "{method} {path} {body}: {text}");
        }
    }

    #[tokio::test]
    async fn a_stop_lets_an_accepted_request_finish() {
        let server = running(Duration::from_millis(300)).await;
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        send(
            &mut stream,
            "POST",
            "/score",
            r#"{"data":[[5.1,3.5,1.4,0.2]]}"#,
        )
        .await;
        // Connections are accepted in order: once a later one is answered, the first is being processed.
        ask(server.address, "POST", "/score", "").await;
        server.stop.send(()).unwrap();
        server.done.await.unwrap();
        let text = answer(&mut stream).await;
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
    }

    #[tokio::test]
    async fn an_idle_connection_does_not_hold_up_the_stop() {
        let server = running(Duration::ZERO).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        idle.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut first = [0; 12];
        idle.read_exact(&mut first).await.unwrap();
        server.stop.send(()).unwrap();
        server.done.await.unwrap();
    }
}
