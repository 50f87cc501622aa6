//! How long requests may take, and how a response that takes longer ends.
#![allow(clippy::unwrap_used, reason = "only tests are here")]

mod support;

use contract::time::Span;
use http_body_util::BodyExt;
use support::*;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

const EVENTS: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
const TEXT: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n";

/// Limits in milliseconds.
fn limits(timeout: u64, idle: u64, max_duration: u64) -> Settings {
    let mut settings = Settings::default();
    settings.request.timeout = Span::from_millis(timeout);
    settings.request.stream_idle_timeout = Some(Span::from_millis(idle));
    settings.request.max_duration = Some(Span::from_millis(max_duration));
    settings
}

async fn write_chunk(stream: &mut TcpStream, data: &str) {
    write_text(stream, &format!("{:x}\r\n{data}\r\n", data.len())).await;
}

/// Waits until requests have been on instances for this long.
async fn until_in_flight_for(gateway: &mut TestGateway, millis: u64) {
    let mut total = FrameTotals::default();
    while total.in_flight_us < millis * 1000 {
        total.add(&*gateway.frame(|frame| !frame.deployments.is_empty()).await);
    }
}

/// The reasons of responses that were cut, once the gateway has stopped.
async fn cuts(gateway: TestGateway) -> String {
    let metrics = gateway.metrics.clone();
    gateway.stop().await;
    let text = metrics.encode();
    let cut = text
        .lines()
        .filter(|line| line.starts_with("penstock_responses_cut_total"));
    cut.collect()
}

fn cut_line(reason: &str) -> String {
    format!(
        "penstock_responses_cut_total{{endpoint=\"iris\",deployment=\"blue\",reason=\"{reason}\"}} 1"
    )
}

/// Sends a request, and what the instance answers to it, which then does nothing more. Returns all that
/// the client receives and how it ends.
async fn exchange(
    gateway: &TestGateway,
    instance: &RawInstance,
    head: &str,
    chunks: &[&str],
) -> (String, std::io::Result<usize>) {
    let mut client = send_post(gateway.address, "x").await;
    let mut stream = instance.accept_request().await;
    write_text(&mut stream, head).await;
    for chunk in chunks {
        write_chunk(&mut stream, chunk).await;
    }
    let mut received = Vec::new();
    let mut ends = async || -> std::io::Result<usize> {
        let mut piece = vec![0; 4096];
        loop {
            let read = client.read(&mut piece).await?;
            received.extend_from_slice(&piece[..read]);
            if read == 0 || received.ends_with(b"0\r\n\r\n") {
                return Ok(read);
            }
        }
    };
    let end = within_timeout("the end of the response", ends()).await;
    drop(stream);
    (String::from_utf8(received).unwrap(), end)
}

#[tokio::test]
async fn a_response_that_has_begun_may_take_longer_than_the_timeout() {
    let instance = RawInstance::start().await;
    let settings = limits(300, 10_000, 10_000);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = TestClient::connect(gateway.address).await;
    let request = request("/endpoints/iris/score").body(full_body("x"));
    let sent = client.sender.send_request(request.unwrap());
    let (response, mut stream) = tokio::join!(sent, async {
        let mut stream = instance.accept_request().await;
        write_text(&mut stream, TEXT).await;
        stream
    });
    until_in_flight_for(&mut gateway, 600).await;
    write_chunk(&mut stream, "late").await;
    write_text(&mut stream, "0\r\n\r\n").await;
    let body = within_timeout("the body", response.unwrap().into_body().collect()).await;
    assert_eq!(body.unwrap().to_bytes(), "late");
    assert_eq!(gateway.totals(1).await.outcomes.success, 1);
}

#[tokio::test]
async fn a_stream_of_events_that_pauses_too_long_ends_with_an_error_event() {
    let instance = RawInstance::start().await;
    let settings = limits(5_000, 200, 60_000);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let (text, end) = exchange(&gateway, &instance, EVENTS, &["data: 1\n\n"]).await;
    assert!(end.is_ok(), "{end:?}");
    assert!(
        text.contains("data: 1\n\n") && text.contains("event: error\ndata: {\"error\":"),
        "{text}"
    );
    assert!(text.contains("\"code\":\"stream-idle\""), "{text}");
    assert!(
        text.ends_with("0\r\n\r\n"),
        "the stream is complete: {text}"
    );
    assert_eq!(gateway.totals(1).await.outcomes.timeout, 1);
    assert_eq!(cuts(gateway).await, cut_line("stream-idle"));
}

#[tokio::test]
async fn a_stream_of_events_that_is_cut_inside_an_event_is_reset() {
    let instance = RawInstance::start().await;
    let settings = limits(5_000, 200, 60_000);
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let (text, end) = exchange(&gateway, &instance, EVENTS, &["data: 1\n\nda"]).await;
    assert!(end.is_err(), "{end:?}");
    assert!(!text.contains("event: error"), "{text}");
}

#[tokio::test]
async fn another_stream_that_pauses_too_long_is_reset() {
    let instance = RawInstance::start().await;
    let settings = limits(5_000, 200, 60_000);
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let (_, end) = exchange(&gateway, &instance, TEXT, &["some"]).await;
    let kind = end.map_err(|error| error.kind());
    assert_eq!(kind, Err(std::io::ErrorKind::ConnectionReset));
    assert_eq!(cuts(gateway).await, cut_line("stream-idle"));
}

#[tokio::test]
async fn a_stream_that_never_pauses_is_cut_at_the_maximum_duration() {
    let instance = RawInstance::start().await;
    let settings = limits(300, 10_000, 600);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = send_post(gateway.address, "x").await;
    let mut stream = instance.accept_request().await;
    write_text(&mut stream, EVENTS).await;
    let sending = async {
        loop {
            let sent = tokio::io::AsyncWriteExt::write_all(&mut stream, b"9\r\ndata: 1\n\n\r\n");
            if sent.await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    let reading = async {
        let mut received = Vec::new();
        let mut piece = vec![0; 4096];
        while !received.ends_with(b"0\r\n\r\n") {
            let read = client.read(&mut piece).await.unwrap();
            assert_ne!(read, 0, "closed without a last event");
            received.extend_from_slice(&piece[..read]);
        }
        String::from_utf8(received).unwrap()
    };
    let both = async { tokio::join!(sending, reading).1 };
    let text = within_timeout("the cut", both).await;
    assert!(text.contains("\"code\":\"max-duration\""));
    assert_eq!(gateway.totals(1).await.outcomes.timeout, 1);
    assert_eq!(cuts(gateway).await, cut_line("max-duration"));
}

#[tokio::test]
async fn a_stream_that_its_client_does_not_read_is_reset_and_counted_as_cut_at_the_maximum_duration()
 {
    let instance = RawInstance::start().await;
    let settings = limits(300, 10_000, 600);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = send_post(gateway.address, "x").await;
    let mut stream = instance.accept_request().await;
    write_text(&mut stream, EVENTS).await;
    let event = format!("data: {}\n\n", "x".repeat(60_000));
    let chunk = format!("{:x}\r\n{event}\r\n", event.len());
    let sending = async {
        while tokio::io::AsyncWriteExt::write_all(&mut stream, chunk.as_bytes())
            .await
            .is_ok()
        {}
    };
    within_timeout("the cut", sending).await;
    assert_eq!(gateway.totals(1).await.outcomes.timeout, 1);
    assert_eq!(cuts(gateway).await, cut_line("max-duration"));
    let end = client.read_to_end(&mut Vec::new()).await;
    let kind = end.map_err(|error| error.kind());
    assert_eq!(kind, Err(std::io::ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn a_stream_of_events_that_outlasts_the_gateways_grace_period_ends_with_an_error_event() {
    let instance = RawInstance::start().await;
    let config = gateway::Config {
        grace: std::time::Duration::ZERO,
        ..config()
    };
    let settings = limits(5_000, 60_000, 60_000);
    let gateway = start_with(config, &[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = send_post(gateway.address, "x").await;
    let mut stream = instance.accept_request().await;
    write_text(&mut stream, EVENTS).await;
    write_chunk(&mut stream, "data: 1\n\n").await;
    let mut received = Vec::new();
    while !received.ends_with(b"data: 1\n\n\r\n") {
        let read = within_timeout("an event", client.read_buf(&mut received)).await;
        assert_ne!(read.unwrap(), 0);
    }
    gateway.start_shutdown();
    let rest = read_until_closed(&mut client).await;
    let rest = String::from_utf8(rest).unwrap();
    assert!(
        rest.contains("event: error\ndata: {\"error\":")
            && rest.contains("\"code\":\"gateway-shutdown\""),
        "{rest}"
    );
    assert!(
        rest.ends_with("0\r\n\r\n"),
        "the stream is complete: {rest}"
    );
    assert_eq!(cuts(gateway).await, cut_line("gateway-shutdown"));
}

#[tokio::test]
async fn a_stream_of_events_whose_instance_breaks_off_ends_with_an_error_event() {
    let instance = RawInstance::start().await;
    let mut gateway = start_serving(&[instance.entry()]).await;
    let mut client = send_post(gateway.address, "x").await;
    let mut stream = instance.accept_request().await;
    write_text(&mut stream, EVENTS).await;
    write_chunk(&mut stream, "data: 1\n\n").await;
    let mut received = Vec::new();
    let read_to = async |client: &mut TcpStream, received: &mut Vec<u8>, end: &str| {
        let mut piece = vec![0; 4096];
        while !String::from_utf8_lossy(received).contains(end) {
            let read = within_timeout(end, client.read(&mut piece)).await.unwrap();
            assert_ne!(read, 0, "closed before {end}");
            received.extend_from_slice(&piece[..read]);
        }
    };
    read_to(&mut client, &mut received, "data: 1").await;
    drop(stream);
    read_to(&mut client, &mut received, "instance-closed").await;
    assert_eq!(gateway.totals(1).await.outcomes.unreachable, 1);
    assert_eq!(cuts(gateway).await, cut_line("instance-closed"));
}

const UPLOAD: &str =
    "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";

/// A gateway that streams bodies from their first byte.
async fn start_streaming(updates: &[contract::route::RouteUpdate]) -> TestGateway {
    let config = gateway::Config {
        upload_buffer_bytes: 0,
        ..config()
    };
    start_with(config, updates).await
}

#[tokio::test]
async fn the_time_of_an_upload_does_not_count_against_the_model() {
    let instance = RawInstance::start().await;
    let settings = limits(400, 10_000, 20_000);
    let mut gateway = start_streaming(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = TcpStream::connect(gateway.address).await.unwrap();
    write_text(&mut client, UPLOAD).await;
    write_chunk(&mut client, "some").await;
    let mut stream = instance.accept().await;
    read_head(&mut stream).await;
    until_in_flight_for(&mut gateway, 800).await;
    write_text(&mut client, "0\r\n\r\n").await;
    let mut sent = [0; "4\r\nsome\r\n0\r\n\r\n".len()];
    within_timeout("the request", stream.read_exact(&mut sent))
        .await
        .unwrap();
    write_text(&mut stream, EMPTY_OK).await;
    let mut head = [0; 12];
    within_timeout("the response", client.read_exact(&mut head))
        .await
        .unwrap();
    assert_eq!(&head, b"HTTP/1.1 200");
    assert_eq!(gateway.totals(1).await.outcomes.success, 1);
}

#[tokio::test]
async fn the_time_of_the_model_begins_after_the_upload() {
    let instance = RawInstance::start().await;
    let settings = limits(200, 10_000, 20_000);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let request = format!("{UPLOAD}4\r\nsome\r\n0\r\n\r\n");
    let mut client = TcpStream::connect(gateway.address).await.unwrap();
    write_text(&mut client, &request).await;
    let stream = instance.accept().await;
    let mut head = [0; 12];
    within_timeout("the response", client.read_exact(&mut head))
        .await
        .unwrap();
    assert_eq!(&head, b"HTTP/1.1 408");
    assert_eq!(gateway.totals(1).await.outcomes.timeout, 1);
    drop(stream);
}

#[tokio::test]
async fn a_client_that_stops_sending_its_body_is_refused_and_not_counted_against_the_model() {
    let instance = RawInstance::start().await;
    for settings in [limits(300, 300, 20_000), {
        let mut settings = Settings::default();
        settings.request.timeout = Span::from_millis(300);
        settings
    }] {
        let mut gateway = start_streaming(&[blue_route(1, &settings, &[instance.entry()])]).await;
        let mut client = TcpStream::connect(gateway.address).await.unwrap();
        write_text(&mut client, UPLOAD).await;
        write_chunk(&mut client, "some").await;
        let stream = instance.accept().await;
        let text = read_until_closed(&mut client).await;
        let text = String::from_utf8(text).unwrap();
        assert!(
            text.starts_with("HTTP/1.1 400 ") && text.contains("bad-body"),
            "{text}"
        );
        assert_eq!(gateway.totals(1).await.outcomes.refused, 1);
        drop(stream);
    }
}

#[tokio::test]
async fn a_client_that_stops_sending_during_the_response_is_not_counted_against_the_model() {
    let instance = RawInstance::start().await;
    let settings = limits(10_000, 300, 20_000);
    let mut gateway = start_streaming(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = TcpStream::connect(gateway.address).await.unwrap();
    write_text(&mut client, UPLOAD).await;
    write_chunk(&mut client, "some").await;
    let mut stream = instance.accept().await;
    read_head(&mut stream).await;
    write_text(&mut stream, EVENTS).await;
    write_chunk(&mut stream, "data: 1\n\n").await;
    let mut received = Vec::new();
    while !received.ends_with(b"data: 1\n\n\r\n") {
        let read = within_timeout("an event", client.read_buf(&mut received)).await;
        assert_ne!(read.unwrap(), 0);
    }
    let end = within_timeout("the end", client.read_to_end(&mut received)).await;
    let text = String::from_utf8_lossy(&received);
    assert!(end.is_err(), "{text}");
    let outcomes = gateway.totals(1).await.outcomes;
    assert_eq!((outcomes.client_left, outcomes.timeout), (1, 0));
}
