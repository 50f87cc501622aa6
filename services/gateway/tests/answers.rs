//! Every row of the contract's status table, authentication, headers, routes to deployments.

#![allow(clippy::unwrap_used, reason = "helpers of tests count as such")]

mod support;

use contract::time::Span;
use http::{Response, StatusCode};
use http_body_util::BodyExt;
use support::*;
use tokio::io::AsyncWriteExt;

#[tokio::test]
async fn a_models_answer_passes_with_an_id_and_the_deployment() {
    let instance = Instance::echo().await;
    let gateway = start(&[blue(1, &Settings::default(), &[instance.place()])]).await;
    let answer = gateway.post("hello").await;
    assert_eq!((answer.status, answer.text()), (StatusCode::OK, "hello"));
    assert_eq!(answer.header("penstock-deployment"), "blue");
    let id: uuid::Uuid = answer.header("x-request-id").parse().unwrap();
    assert_eq!(id.get_version_num(), 4);
    assert_eq!(answer.header("penstock-error-code"), "");
    assert_ne!(
        gateway.post("").await.header("x-request-id"),
        id.to_string()
    );
}

#[tokio::test]
async fn the_model_sees_the_rest_of_the_path_and_no_secrets_of_the_hop() {
    let instance = Instance::start(|request| async move {
        let mut seen = format!("{} {}\n", request.method(), request.uri());
        for (name, value) in request.headers() {
            seen += &format!("{name}: {}\n", value.to_str().unwrap());
        }
        Response::new(whole(seen))
    })
    .await;
    let settings = Settings {
        keys: vec!["secret"],
        ..Settings::default()
    };
    let gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let request = request("/endpoints/iris/score/v1/a%20b?x=1&y=..")
        .header("authorization", "Bearer secret")
        .header("connection", "x-hop, content-length, keep-alive")
        .header("x-hop", "1")
        .header("te", "trailers")
        .header("proxy-authorization", "p")
        .header("x-request-id", "mine")
        .header("x-kept", "k")
        .body(whole("body"));
    let answer = send(gateway.address, request.unwrap()).await;
    let seen = answer.text();
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
            answer.header("x-request-id")
        )),
        "{seen}"
    );
    for hidden in ["secret", "x-hop", "te:", "proxy-", "mine", "connection"] {
        assert!(!seen.contains(hidden), "{hidden} in {seen}");
    }
}

#[tokio::test]
async fn a_redirect_passes_and_an_error_of_the_model_is_424_with_its_body() {
    let instance = Instance::start(|request| async move {
        let status: u16 = request.uri().query().unwrap().parse().unwrap();
        Response::builder()
            .status(status)
            .header("x-model", "m")
            .body(whole("why"))
            .unwrap()
    })
    .await;
    let gateway = start(&[blue(1, &Settings::default(), &[instance.place()])]).await;
    let cases = [
        (201, 201, ""),
        (302, 302, ""),
        (404, 424, "404"),
        (429, 424, "429"),
        (500, 424, "500"),
        (503, 424, "503"),
    ];
    for (model, expected, said) in cases {
        let request = request(&format!("/endpoints/iris/score?{model}")).body(whole("x"));
        let answer = send(gateway.address, request.unwrap()).await;
        assert_eq!(answer.status.as_u16(), expected, "{model}");
        assert_eq!(answer.header("penstock-model-status"), said, "{model}");
        assert_eq!((answer.text(), answer.header("x-model")), ("why", "m"));
        assert_eq!(
            answer.header("penstock-error-code"),
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
    let gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let (answer, rest) = tokio::join!(gateway.post("x"), async {
        let mut stream = instance.accept().await;
        read_request(&mut stream).await;
        until_closed(&mut stream).await
    });
    assert_eq!(
        (answer.status, answer.code()),
        (StatusCode::REQUEST_TIMEOUT, "model-timeout")
    );
    assert_eq!(answer.header("penstock-deployment"), "blue");
    assert!(rest.is_empty());
}

#[tokio::test]
async fn an_answer_that_takes_longer_than_the_timeout_is_cut() {
    let instance = RawInstance::start().await;
    let mut settings = Settings::default();
    settings.request.timeout = Span::from_millis(300);
    let mut gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let mut client = Client::connect(gateway.address).await;
    let sent = client
        .sender
        .send_request(request("/endpoints/iris/score").body(whole("x")).unwrap());
    let (response, mut stream) = tokio::join!(sent, async {
        let mut stream = instance.accept().await;
        read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome")
            .await
            .unwrap();
        stream
    });
    let response = response.unwrap();
    assert_eq!(response.status(), 200);
    assert!(
        soon("the cut", response.into_body().collect())
            .await
            .is_err()
    );
    until_closed(&mut stream).await;
    assert_eq!(gateway.total(1).await.outcomes.timeout, 1);
}

#[tokio::test]
async fn an_instance_that_cannot_be_reached_is_502() {
    let nobody = RawInstance::start().await.address;
    let gateway = start(&[blue(1, &Settings::default(), &[at(nobody)])]).await;
    let answer = gateway.post("x").await;
    assert_eq!(
        (answer.status, answer.code()),
        (StatusCode::BAD_GATEWAY, "instance-unreachable")
    );
}

#[tokio::test]
async fn an_instance_that_breaks_off_or_talks_nonsense_is_502() {
    let instance = RawInstance::start().await;
    let gateway = start(&[blue(1, &Settings::default(), &[instance.place()])]).await;
    for (said, code) in [
        ("", "instance-unreachable"),
        ("HTTP/1.1 2", "instance-unreachable"),
        ("nonsense\r\n\r\n", "bad-answer"),
    ] {
        let (answer, ()) = tokio::join!(gateway.post("x"), async {
            let mut stream = instance.accept().await;
            read_request(&mut stream).await;
            stream.write_all(said.as_bytes()).await.unwrap();
        });
        assert_eq!(
            (answer.status, answer.code()),
            (StatusCode::BAD_GATEWAY, code),
            "{said:?}"
        );
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_in_its_body_is_cut_and_counted() {
    let instance = RawInstance::start().await;
    let mut gateway = start(&[blue(1, &Settings::default(), &[instance.place()])]).await;
    let mut client = Client::connect(gateway.address).await;
    let sent = client
        .sender
        .send_request(request("/endpoints/iris/score").body(whole("x")).unwrap());
    let (response, ()) = tokio::join!(sent, async {
        let mut stream = instance.accept().await;
        read_request(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nsome")
            .await
            .unwrap();
    });
    // The end may have come before the head was passed on.
    if let Ok(response) = response {
        assert!(
            soon("the cut", response.into_body().collect())
                .await
                .is_err()
        );
    }
    assert_eq!(gateway.total(1).await.outcomes.unreachable, 1);
}

#[tokio::test]
async fn without_an_instance_in_time_it_is_503_and_a_frame_says_at_once_that_somebody_waits() {
    let mut settings = Settings::default();
    settings.request.max_queue_wait = Span::from_secs(3);
    let mut gateway = start(&[blue(1, &settings, &[])]).await;
    let address = gateway.address;
    let asking = tokio::spawn(async move {
        send(
            address,
            request("/endpoints/iris/score").body(whole("x")).unwrap(),
        )
        .await
    });
    let bucket = contract::EndpointKey::new(&"iris".parse().unwrap()).bucket();
    let frame = gateway
        .frame(|frame| frame.deployments.iter().any(|d| d.queued_max == 1))
        .await;
    assert_eq!(frame.bucket, bucket);
    assert!(!asking.is_finished());
    let next = gateway.frame(|frame| frame.bucket == bucket).await;
    assert_eq!(next.sequence, frame.sequence + 1);
    if frame.length_us < 900_000 {
        assert_eq!(next.start, frame.start, "both are parts of one second");
    }
    let answer = soon("503", asking).await.unwrap();
    assert_eq!(
        (answer.status, answer.code()),
        (StatusCode::SERVICE_UNAVAILABLE, "no-instance")
    );
    let total = gateway.total(1).await;
    assert_eq!(total.outcomes.unavailable, 1);
}

#[tokio::test]
async fn both_keys_open_and_nothing_else_does() {
    let instance = Instance::echo().await;
    let settings = Settings {
        keys: vec!["first", "second"],
        ..Settings::default()
    };
    let gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let ask = async |authorization: Option<&str>| {
        let mut request = request("/endpoints/iris/score");
        if let Some(value) = authorization {
            request = request.header("authorization", value);
        }
        send(gateway.address, request.body(whole("x")).unwrap()).await
    };
    for good in ["Bearer first", "Bearer second", "bearer first"] {
        assert_eq!(ask(Some(good)).await.status, 200, "{good}");
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
        let answer = ask(value).await;
        assert_eq!(
            (answer.status, answer.code()),
            (StatusCode::UNAUTHORIZED, code),
            "{value:?}"
        );
        assert_eq!(answer.header("www-authenticate"), "Bearer");
    }
}

#[tokio::test]
async fn what_does_not_exist_is_404() {
    let instance = Instance::echo().await;
    let idle = Settings {
        endpoint: "idle",
        ..Settings::default()
    };
    let gateway = start(&[
        blue(1, &Settings::default(), &[instance.place()]),
        route(2, &idle, &[("blue", 0, &[instance.place()])]),
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
        let answer = send(gateway.address, request.body(whole("x")).unwrap()).await;
        assert_eq!(
            (answer.status, answer.code()),
            (StatusCode::NOT_FOUND, code),
            "{uri}"
        );
    }
}

#[tokio::test]
async fn a_deployment_can_be_named_even_without_a_share() {
    let (one, two) = (
        Instance::saying("blue").await,
        Instance::saying("green").await,
    );
    let update = route(
        1,
        &Settings::default(),
        &[("blue", 100, &[one.place()]), ("green", 0, &[two.place()])],
    );
    let gateway = start(&[update]).await;
    for header in ["penstock-deployment", "azureml-model-deployment"] {
        for name in ["blue", "green"] {
            let request = request("/endpoints/iris/score")
                .header(header, name)
                .body(whole("x"));
            let answer = send(gateway.address, request.unwrap()).await;
            assert_eq!(answer.text(), name);
            assert_eq!(answer.header("penstock-deployment"), name);
        }
    }
}

#[tokio::test]
async fn the_split_is_exact_over_requests_of_many_connections() {
    let (one, two) = (
        Instance::saying("blue").await,
        Instance::saying("green").await,
    );
    let update = route(
        1,
        &Settings::default(),
        &[("blue", 90, &[one.place()]), ("green", 10, &[two.place()])],
    );
    let gateway = start(&[update]).await;
    let clients = (0..8).map(|_| {
        let address = gateway.address;
        tokio::spawn(async move {
            let mut client = Client::connect(address).await;
            let mut green = 0;
            for _ in 0..50 {
                let request = request("/endpoints/iris/score").body(whole("x"));
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
    let instance = Instance::echo().await;
    let config = gateway::Config {
        domain: Some("ml.example".into()),
        ..config()
    };
    let gateway = start_with(
        config,
        &[blue(1, &Settings::default(), &[instance.place()])],
    )
    .await;
    let mut request = request("/score").body(whole("x")).unwrap();
    request
        .headers_mut()
        .insert("host", "iris.ml.example:80".parse().unwrap());
    assert_eq!(send(gateway.address, request).await.status, 200);
}

#[tokio::test]
async fn bodies_over_the_limit_are_413_before_they_are_read() {
    let instance = Instance::echo().await;
    let settings = Settings {
        body_max: 1000,
        ..Settings::default()
    };
    let gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let head = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ncontent-length: 1001\r\n";
    // Nothing of the body is ever sent, and nobody is invited to send it.
    for expect in ["", "expect: 100-continue\r\n"] {
        let answer = raw(gateway.address, format!("{head}{expect}\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert!(
            answer.contains("penstock-error-code: body-too-large"),
            "{answer}"
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
async fn a_chunked_body_over_the_limit_is_cut_with_413() {
    let instance = Instance::echo().await;
    let settings = Settings {
        body_max: 1000,
        ..Settings::default()
    };
    let mut gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let mut text =
        b"POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec();
    for _ in 0..3 {
        text.extend_from_slice(format!("190\r\n{}\r\n", "x".repeat(400)).as_bytes());
    }
    let answer = raw(gateway.address, &text).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert_eq!(gateway.total(1).await.outcomes.refused, 1);
}

#[tokio::test]
async fn who_expects_to_be_told_to_continue_is_told() {
    let instance = Instance::echo().await;
    let gateway = start(&[blue(1, &Settings::default(), &[instance.place()])]).await;
    let mut stream = tokio::net::TcpStream::connect(gateway.address)
        .await
        .unwrap();
    let head = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\nconnection: close\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut told = vec![0; 25];
    soon(
        "100",
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut told),
    )
    .await
    .unwrap();
    assert_eq!(told, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"ok").await.unwrap();
    let rest = String::from_utf8(until_closed(&mut stream).await).unwrap();
    assert!(
        rest.starts_with("HTTP/1.1 200 OK") && rest.ends_with("ok"),
        "{rest}"
    );
}

#[tokio::test]
async fn a_body_that_never_comes_whole_is_400_and_never_reaches_the_model() {
    let instance = Instance::echo().await;
    let mut settings = Settings::default();
    settings.request.timeout = Span::from_millis(200);
    let gateway = start(&[blue(1, &settings, &[instance.place()])]).await;
    let text = "POST /endpoints/iris/score HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf";
    let answer = raw(gateway.address, text.as_bytes()).await;
    assert!(
        answer.starts_with("HTTP/1.1 400 ") && answer.contains("bad-body"),
        "{answer}"
    );
    assert_eq!(
        instance
            .connections
            .load(std::sync::atomic::Ordering::SeqCst),
        0
    );
}

#[tokio::test]
async fn the_metrics_show_what_was_answered() {
    let instance = Instance::echo().await;
    let mut gateway = start(&[blue(1, &Settings::default(), &[instance.place()])]).await;
    for _ in 0..3 {
        gateway.post("x").await;
    }
    gateway.total(3).await;
    let metrics = gateway.metrics.clone();
    assert!(gateway.health.missing().is_empty());
    gateway.stop().await;
    let text = metrics.encode();
    let line = r#"penstock_requests_total{endpoint="iris",deployment="blue",role="live",code_class="2xx"} 3"#;
    assert!(text.contains(line), "{text}");
    let count = r#"penstock_request_duration_seconds_count{endpoint="iris",deployment="blue",role="live"} 3"#;
    assert!(text.contains(count), "{text}");
    assert!(text.contains("penstock_inflight_requests{"), "{text}");
    // Asked for by the start: the deployment `none`.
    assert!(
        text.contains(r#"deployment="",role="live",code_class="4xx"}"#),
        "{text}"
    );
}
