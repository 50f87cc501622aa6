//! Every row of the contract's status table, authentication, headers, routing to deployments.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use contract::time::Span;
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use support::*;
use tokio::io::AsyncWriteExt;

#[tokio::test]
async fn a_models_response_is_forwarded_with_an_id_and_the_deployment() {
    let instance = TestInstance::echo().await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let response = gateway.post("hello").await;
    assert_eq!(
        (response.status, response.text()),
        (StatusCode::OK, "hello")
    );
    assert_eq!(response.header("penstock-deployment"), "blue");
    let id: uuid::Uuid = response.header("x-request-id").parse().unwrap();
    assert_eq!(id.get_version_num(), 4);
    assert_eq!(response.header("penstock-error-code"), "");
    assert_ne!(
        gateway.post("").await.header("x-request-id"),
        id.to_string()
    );
}

#[tokio::test]
async fn the_model_sees_the_rest_of_the_path_and_no_hop_by_hop_headers() {
    let instance = TestInstance::start(|request| async move {
        let mut seen = format!("{} {}\n", request.method(), request.uri());
        for (name, value) in request.headers() {
            seen += &format!("{name}: {}\n", value.to_str().unwrap());
        }
        Response::new(full_body(seen))
    })
    .await;
    let settings = Settings {
        keys: vec!["secret"],
        ..Settings::default()
    };
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let request = request("/endpoints/iris/score/v1/a%20b?x=1&y=..")
        .header("authorization", "Bearer secret")
        .header("connection", "x-hop, content-length, keep-alive")
        .header("x-hop", "1")
        .header("te", "trailers")
        .header("proxy-authorization", "p")
        .header("x-kept", "k")
        .body(full_body("body"));
    let response = send(gateway.address, request.unwrap()).await;
    let seen = response.text();
    assert!(
        seen.starts_with("POST /score/v1/a%20b?x=1&y=..\n"),
        "{seen}"
    );
    assert!(
        seen.contains("x-kept: k\n") && seen.contains("content-length: 4\n"),
        "{seen}"
    );
    assert!(
        seen.contains(&format!("host: {}\n", instance.address)),
        "{seen}"
    );
    assert!(
        seen.contains(&format!(
            "x-request-id: {}\n",
            response.header("x-request-id")
        )),
        "{seen}"
    );
    for hidden in ["secret", "x-hop", "te:", "proxy-", "connection"] {
        assert!(!seen.contains(hidden), "{hidden} in {seen}");
    }
}

#[tokio::test]
async fn a_redirect_is_forwarded_and_an_error_of_the_model_is_424_with_its_body() {
    let instance = TestInstance::start(|request| async move {
        let status: u16 = request.uri().query().unwrap().parse().unwrap();
        Response::builder()
            .status(status)
            .header("x-model", "m")
            .body(full_body("why"))
            .unwrap()
    })
    .await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let cases = [
        (201, 201, ""),
        (302, 302, ""),
        (404, 424, "404"),
        (429, 424, "429"),
        (500, 424, "500"),
        (503, 424, "503"),
    ];
    for (model, expected, model_status) in cases {
        let request = request(&format!("/endpoints/iris/score?{model}")).body(full_body("x"));
        let response = send(gateway.address, request.unwrap()).await;
        assert_eq!(response.status.as_u16(), expected, "{model}");
        assert_eq!(
            response.header("penstock-model-status"),
            model_status,
            "{model}"
        );
        assert_eq!((response.text(), response.header("x-model")), ("why", "m"));
        assert_eq!(
            response.header("penstock-error-code"),
            "",
            "the model failed, not Penstock"
        );
    }
}

#[tokio::test]
async fn a_model_that_is_too_slow_is_408_and_its_connection_closes() {
    let instance = RawInstance::start().await;
    let mut settings = Settings::default();
    settings.request.timeout = Span::from_millis(200);
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let (response, rest) = tokio::join!(gateway.post("x"), async {
        let mut stream = instance.accept().await;
        read_request(&mut stream).await;
        read_until_closed(&mut stream).await
    });
    assert_eq!(
        (response.status, response.code()),
        (StatusCode::REQUEST_TIMEOUT, "model-timeout")
    );
    assert_eq!(response.header("penstock-deployment"), "blue");
    assert!(rest.is_empty());
}

#[tokio::test]
async fn a_response_that_exceeds_the_timeout_is_cut_off() {
    let instance = RawInstance::start().await;
    let mut settings = Settings::default();
    settings.request.timeout = Span::from_millis(300);
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut client = TestClient::connect(gateway.address).await;
    let sent = client.sender.send_request(
        request("/endpoints/iris/score")
            .body(full_body("x"))
            .unwrap(),
    );
    let (response, mut stream) = tokio::join!(sent, async {
        let mut stream = instance.accept().await;
        read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nsome")
            .await
            .unwrap();
        stream
    });
    let response = response.unwrap();
    assert_eq!(response.status(), 200);
    assert!(
        within_timeout("the response to be cut off", response.into_body().collect())
            .await
            .is_err()
    );
    read_until_closed(&mut stream).await;
    assert_eq!(gateway.totals(1).await.outcomes.timeout, 1);
}

#[tokio::test]
async fn an_instance_that_cannot_be_reached_is_502() {
    let unused_address = RawInstance::start().await.address;
    let gateway = start(&[blue_route(
        1,
        &Settings::default(),
        &[entry_at(unused_address)],
    )])
    .await;
    let response = gateway.post("x").await;
    assert_eq!(
        (response.status, response.code()),
        (StatusCode::BAD_GATEWAY, "instance-unreachable")
    );
}

#[tokio::test]
async fn an_instance_that_closes_early_or_sends_garbage_is_502() {
    let instance = RawInstance::start().await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    for (reply, code) in [
        ("", "instance-unreachable"),
        ("HTTP/1.1 2", "instance-unreachable"),
        ("nonsense\r\n\r\n", "bad-answer"),
    ] {
        let (response, ()) = tokio::join!(gateway.post("x"), async {
            let mut stream = instance.accept().await;
            read_request(&mut stream).await;
            stream.write_all(reply.as_bytes()).await.unwrap();
        });
        assert_eq!(
            (response.status, response.code()),
            (StatusCode::BAD_GATEWAY, code),
            "{reply:?}"
        );
    }
}

#[tokio::test]
async fn a_response_that_ends_in_its_body_is_cut_off_and_counted() {
    let instance = RawInstance::start().await;
    let mut gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let mut client = TestClient::connect(gateway.address).await;
    let sent = client.sender.send_request(
        request("/endpoints/iris/score")
            .body(full_body("x"))
            .unwrap(),
    );
    let (response, stream) = tokio::join!(sent, async {
        let mut stream = instance.accept().await;
        read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nsome")
            .await
            .unwrap();
        stream
    });
    // The head has gone out.
    let response = response.unwrap();
    drop(stream);
    assert!(
        within_timeout("the response to be cut off", response.into_body().collect())
            .await
            .is_err()
    );
    assert_eq!(gateway.totals(1).await.outcomes.unreachable, 1);
}

#[tokio::test]
async fn an_instance_that_breaks_off_before_the_response_has_gone_out_is_502_every_time() {
    let instance = RawInstance::start().await;
    let mut gateway = start_serving(&[instance.entry()]).await;
    let replies = [
        "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome",
        "HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n",
    ];
    for round in 0..20 {
        for reply in replies {
            let (response, ()) = tokio::join!(gateway.post("x"), async {
                let mut stream = instance.accept_request().await;
                write_text(&mut stream, reply).await;
            });
            assert_eq!(
                (response.status.as_u16(), response.code()),
                (502, "instance-unreachable"),
                "round {round}: {reply:?}"
            );
        }
    }
    assert_eq!(gateway.totals(60).await.outcomes.unreachable, 60);
}

#[tokio::test]
async fn a_stream_that_breaks_off_at_once_is_never_an_empty_reply() {
    let instance = RawInstance::start().await;
    let gateway = start_serving(&[instance.entry()]).await;
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    let large = format!("{head}ffff\r\n{}", "x".repeat(20_000));
    let replies = [head.to_owned(), format!("{head}4\r\nsome\r\n"), large];
    for (round, reply) in (0..20).flat_map(|round| replies.iter().map(move |reply| (round, reply)))
    {
        let mut client = send_post(gateway.address, "x").await;
        let mut stream = instance.accept_request().await;
        write_text(&mut stream, reply).await;
        drop(stream);
        let response = String::from_utf8(read_until_closed(&mut client).await).unwrap();
        let is_cut = response.starts_with("HTTP/1.1 200 ") && !response.ends_with("0\r\n\r\n");
        assert!(
            is_cut || response.starts_with("HTTP/1.1 502 "),
            "round {round}: {response:?}"
        );
    }
}

#[tokio::test]
async fn without_an_instance_in_time_it_is_503_and_an_early_frame_reports_the_queue() {
    let mut settings = Settings::default();
    settings.request.max_queue_wait = Span::from_secs(3);
    let mut gateway = start(&[blue_route(1, &settings, &[])]).await;
    let address = gateway.address;
    let pending = tokio::spawn(async move {
        send(
            address,
            request("/endpoints/iris/score")
                .body(full_body("x"))
                .unwrap(),
        )
        .await
    });
    let bucket = contract::EndpointKey::new(&"iris".parse().unwrap()).bucket();
    let frame = gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 1))
        .await;
    assert_eq!(frame.bucket, bucket);
    assert!(!pending.is_finished());
    let next = gateway.frame(|frame| frame.bucket == bucket).await;
    assert_eq!(next.sequence, frame.sequence + 1);
    if frame.length_us < 900_000 {
        assert_eq!(next.start, frame.start, "both are parts of one second");
    }
    let response = within_timeout("503", pending).await.unwrap();
    assert_eq!(
        (response.status, response.code()),
        (StatusCode::SERVICE_UNAVAILABLE, "no-instance")
    );
    let total = gateway.totals(1).await;
    assert_eq!(total.outcomes.unavailable, 1);
}

#[tokio::test]
async fn both_keys_are_accepted_and_nothing_else_is() {
    let instance = TestInstance::echo().await;
    let settings = Settings {
        keys: vec!["first", "second"],
        ..Settings::default()
    };
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let send_with = async |authorization: Option<&str>| {
        let mut request = request("/endpoints/iris/score");
        if let Some(value) = authorization {
            request = request.header("authorization", value);
        }
        send(gateway.address, request.body(full_body("x")).unwrap()).await
    };
    for valid in ["Bearer first", "Bearer second", "bearer first"] {
        assert_eq!(send_with(Some(valid)).await.status, 200, "{valid}");
    }
    let bad = [
        (None, "no-key"),
        (Some(""), "no-key"),
        (Some("Basic first"), "no-key"),
        (Some("Bearer"), "no-key"),
        (Some("Bearer  first"), "wrong-key"),
        (Some("Bearer firs"), "wrong-key"),
        (Some("Bearer third"), "wrong-key"),
    ];
    for (value, code) in bad {
        let response = send_with(value).await;
        assert_eq!(
            (response.status, response.code()),
            (StatusCode::UNAUTHORIZED, code),
            "{value:?}"
        );
        assert_eq!(response.header("www-authenticate"), "Bearer");
    }
}

#[tokio::test]
async fn what_does_not_exist_is_404() {
    let instance = TestInstance::echo().await;
    let idle = Settings {
        endpoint: "idle",
        ..Settings::default()
    };
    let gateway = start(&[
        blue_route(1, &Settings::default(), &[instance.entry()]),
        route(2, &idle, &[("blue", 0, &[instance.entry()])]),
    ])
    .await;
    let cases = [
        ("/", None, "unknown-endpoint"),
        ("/endpoints/none/score", None, "unknown-endpoint"),
        ("/endpoints/iris/other", None, "unknown-endpoint"),
        ("/endpoints/iris/score", Some("green"), "unknown-deployment"),
        ("/endpoints/idle/score", None, "no-traffic"),
    ];
    for (uri, deployment, code) in cases {
        let mut request = request(uri);
        if let Some(name) = deployment {
            request = request.header("penstock-deployment", name);
        }
        let response = send(gateway.address, request.body(full_body("x")).unwrap()).await;
        assert_eq!(
            (response.status, response.code()),
            (StatusCode::NOT_FOUND, code),
            "{uri}"
        );
    }
}

#[tokio::test]
async fn a_deployment_can_be_named_even_without_a_share() {
    let (one, two) = (
        TestInstance::responding_with("blue").await,
        TestInstance::responding_with("green").await,
    );
    let update = route(
        1,
        &Settings::default(),
        &[("blue", 100, &[one.entry()]), ("green", 0, &[two.entry()])],
    );
    let gateway = start(&[update]).await;
    for header in ["penstock-deployment", "azureml-model-deployment"] {
        for name in ["blue", "green"] {
            let request = request("/endpoints/iris/score")
                .header(header, name)
                .body(full_body("x"));
            let response = send(gateway.address, request.unwrap()).await;
            assert_eq!(response.text(), name);
            assert_eq!(response.header("penstock-deployment"), name);
        }
    }
}

#[tokio::test]
async fn the_split_is_exact_across_connections() {
    let (one, two) = (
        TestInstance::responding_with("blue").await,
        TestInstance::responding_with("green").await,
    );
    let update = route(
        1,
        &Settings::default(),
        &[("blue", 90, &[one.entry()]), ("green", 10, &[two.entry()])],
    );
    let gateway = start(&[update]).await;
    let clients = (0..8).map(|_| {
        let address = gateway.address;
        tokio::spawn(async move {
            let mut client = TestClient::connect(address).await;
            let mut green = 0;
            for _ in 0..50 {
                let request = request("/endpoints/iris/score").body(full_body("x"));
                green += usize::from(client.send(request.unwrap()).await.text() == "green");
            }
            green
        })
    });
    let mut green = 0;
    for client in clients.collect::<Vec<_>>() {
        green += client.await.unwrap();
    }
    assert_eq!(green, 40);
}

#[tokio::test]
async fn an_endpoint_is_found_by_host_name() {
    let instance = TestInstance::echo().await;
    let config = gateway::Config {
        domain: Some("ml.example".into()),
        ..config()
    };
    let gateway = start_with(
        config,
        &[blue_route(1, &Settings::default(), &[instance.entry()])],
    )
    .await;
    let mut request = request("/score").body(full_body("x")).unwrap();
    request
        .headers_mut()
        .insert("host", "iris.ml.example:80".parse().unwrap());
    assert_eq!(send(gateway.address, request).await.status, 200);
}

#[tokio::test]
async fn bodies_over_the_limit_are_413_before_they_are_read() {
    let instance = TestInstance::echo().await;
    let settings = Settings {
        body_max: 1000,
        ..Settings::default()
    };
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let head = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ncontent-length: 1001\r\n";
    // The body is never sent, and the gateway does not ask for it.
    for expect in ["", "expect: 100-continue\r\n"] {
        let response = send_raw(gateway.address, format!("{head}{expect}\r\n").as_bytes()).await;
        assert!(response.starts_with("HTTP/1.1 413 "), "{response}");
        assert!(
            response.contains("penstock-error-code: body-too-large"),
            "{response}"
        );
    }
    assert_eq!(gateway.post(vec![b'x'; 1000]).await.status, 200);
    assert_eq!(
        instance
            .connections
            .load(std::sync::atomic::Ordering::SeqCst),
        1
    );
}

#[tokio::test]
async fn a_chunked_body_over_the_limit_is_413() {
    let instance = TestInstance::echo().await;
    let settings = Settings {
        body_max: 1000,
        ..Settings::default()
    };
    let mut gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let mut text =
        b"POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec();
    for _ in 0..3 {
        text.extend_from_slice(format!("190\r\n{}\r\n", "x".repeat(400)).as_bytes());
    }
    let response = send_raw(gateway.address, &text).await;
    assert!(response.starts_with("HTTP/1.1 413 "), "{response}");
    assert_eq!(gateway.totals(1).await.outcomes.refused, 1);
}

#[tokio::test]
async fn expect_100_continue_is_honoured() {
    let instance = TestInstance::echo().await;
    let gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    let mut stream = tokio::net::TcpStream::connect(gateway.address)
        .await
        .unwrap();
    let head = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut interim = vec![0; 25];
    within_timeout(
        "100",
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut interim),
    )
    .await
    .unwrap();
    assert_eq!(interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"ok").await.unwrap();
    let rest = String::from_utf8(read_until_closed(&mut stream).await).unwrap();
    assert!(
        rest.starts_with("HTTP/1.1 200 OK") && rest.ends_with("ok"),
        "{rest}"
    );
}

#[tokio::test]
async fn an_incomplete_body_is_400_and_never_reaches_the_model() {
    let instance = TestInstance::echo().await;
    let mut settings = Settings::default();
    settings.request.timeout = Span::from_millis(200);
    let gateway = start(&[blue_route(1, &settings, &[instance.entry()])]).await;
    let text = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf";
    let response = send_raw(gateway.address, text.as_bytes()).await;
    assert!(
        response.starts_with("HTTP/1.1 400 ") && response.contains("bad-body"),
        "{response}"
    );
    assert_eq!(
        instance
            .connections
            .load(std::sync::atomic::Ordering::SeqCst),
        0
    );
}

#[tokio::test]
async fn the_metrics_count_responses() {
    let instance = TestInstance::echo().await;
    let mut gateway = start(&[blue_route(1, &Settings::default(), &[instance.entry()])]).await;
    for _ in 0..3 {
        gateway.post("x").await;
    }
    gateway.totals(3).await;
    let metrics = gateway.metrics.clone();
    assert!(gateway.health.missing().is_empty());
    gateway.stop().await;
    let text = metrics.encode();
    let line = r#"penstock_requests_total{endpoint="iris",deployment="blue",role="live",code_class="2xx"} 3"#;
    assert!(text.contains(line), "{text}");
    let count = r#"penstock_request_duration_seconds_count{endpoint="iris",deployment="blue",role="live"} 3"#;
    assert!(text.contains(count), "{text}");
    assert!(text.contains("penstock_inflight_requests{"), "{text}");
    // The harness probes for the deployment `none` at startup.
    assert!(
        text.contains(r#"deployment="",role="live",code_class="4xx"}"#),
        "{text}"
    );
}
