//! The real binary against a fake control API: order of requests, exit codes, credentials, and output.
#![allow(clippy::unwrap_used, reason = "all of it is test code")]

mod apply;
mod fake;
mod home;
mod validate;

use std::io::BufRead;
use std::process::Stdio;

use fake::FakeServer;
use home::{AUTOSCALE, ENDPOINT, Home, all_documents};
use serde_json::{Value, json};

#[test]
fn exit_codes_distinguish_refusals_usage_errors_and_an_unreachable_server() {
    let (home, server) = (Home::new(), FakeServer::start());
    assert_eq!(home.run_with(&server, &["get", "endpoints"]).code, 0);
    assert_eq!(home.run_with(&server, &["get", "endpoint", "none"]).code, 1);
    assert_eq!(home.run_with(&server, &["get", "nonsense"]).code, 2);
    assert_eq!(home.run_with(&server, &["scale", "iris/blue"]).code, 2);
    assert_eq!(
        home.run_with(&server, &["traffic", "iris", "blue=90"]).code,
        2
    );
    assert_eq!(home.run(&["--help"]).code, 0);
    assert_eq!(
        home.run(&["get", "endpoints"]).code,
        3,
        "no server is known"
    );

    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let result = home.run(&["get", "endpoints", "--server", &format!("http://{address}")]);
    assert_eq!(result.code, 3, "{result:?}");
    assert!(result.err.contains("cannot be reached"), "{}", result.err);
    assert_eq!(result.out, "");
}

#[test]
fn the_token_comes_from_the_environment_or_from_the_servers_own_file() {
    let (home, server) = (Home::new(), FakeServer::start());
    let config = json!({"server": server.url, "token": "from-file"}).to_string();
    home.file("penstock/client.json", &config);
    let file = home.file(
        "other.json",
        &config.replace("from-file", "from-other-file"),
    );

    home.run(&["get", "endpoints"]);
    assert_eq!(server.last_token().as_deref(), Some("Bearer from-file"));

    let mut command = home.command(&["get", "endpoints"]);
    command.env("PENSTOCK_CONFIG", &file);
    command.output().unwrap();
    assert_eq!(
        server.last_token().as_deref(),
        Some("Bearer from-other-file")
    );

    let mut command = home.command(&["get", "endpoints"]);
    command
        .env("PENSTOCK_CONFIG", &file)
        .env("PENSTOCK_TOKEN", "mine");
    command.output().unwrap();
    assert_eq!(server.last_token().as_deref(), Some("Bearer mine"));

    let other = FakeServer::start();
    home.run_with(&other, &["get", "endpoints"]);
    assert_eq!(
        other.last_token(),
        None,
        "a file's token went to another server"
    );
    let mut command = home.command(&["get", "endpoints", "--server", &server.url]);
    command.env("PENSTOCK_SERVER", &other.url);
    command.output().unwrap();
    assert_eq!(
        server.last_token().as_deref(),
        Some("Bearer from-file"),
        "the flag goes before the environment"
    );
}

#[test]
fn tables_are_plain_and_json_is_the_body_unchanged() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("all.yaml", &all_documents());
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    let table = home.run_with(&server, &["get", "deployments", "iris"]).out;
    let lines: Vec<Vec<&str>> = table
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(
        lines[0][..5],
        ["NAME", "STATE", "AVAILABLE", "READY", "TRAFFIC"]
    );
    assert_eq!(
        lines[1][..7],
        [
            "iris/blue",
            "Succeeded",
            "Ready",
            "1/1",
            "100%",
            "simulated",
            "cpu-small"
        ]
    );
    assert_eq!(
        home.run_with(&server, &["get", "ep"]).out.lines().count(),
        2
    );

    let body = home
        .run_with(&server, &["get", "endpoint", "iris", "-o", "json"])
        .out;
    assert_eq!(body.trim_end(), server.stored("/v1/endpoints/iris"));
    let yaml = home
        .run_with(&server, &["get", "endpoint", "iris", "-o", "yaml"])
        .out;
    assert!(yaml.starts_with("apiVersion: penstock/v1"), "{yaml}");
}

/// An instance as the API lists it; times are seconds of one minute.
fn instance(id: &str, state: &str, requested: u32, ended: Option<u32>) -> Value {
    let time = |second| format!("2026-11-22T10:00:{second:02}.000Z");
    json!({"id": id, "endpoint": "iris", "deployment": "blue", "deploymentUid": "u",
        "state": state, "requestedAt": time(requested), "endedAt": ended.map(time)})
}

#[test]
fn terminated_instances_are_listed_only_with_all() {
    let (home, server) = (Home::new(), FakeServer::start());
    // The fake lists by path; the API lists newest first.
    server.store(
        "/v1/instances/1",
        instance("iris-blue-new", "starting", 50, None),
    );
    server.store(
        "/v1/instances/2",
        instance("iris-blue-crashed", "failed", 30, Some(40)),
    );
    server.store(
        "/v1/instances/3",
        instance("iris-blue-broken", "failed", 20, Some(45)),
    );
    server.store(
        "/v1/instances/4",
        instance("iris-blue-ready", "ready", 10, None),
    );
    server.store(
        "/v1/instances/5",
        instance("iris-blue-gone", "stopped", 5, Some(15)),
    );
    let listed = |words: &[&str]| -> Vec<String> {
        let result = home.run_with(&server, words);
        assert_eq!(result.code, 0, "{result:?}");
        let ids = result.out.lines().skip(1).map(first_word);
        ids.collect()
    };
    // One was requested after two had failed: it replaces one of them.
    assert_eq!(
        listed(&["get", "instances"]),
        ["iris-blue-new", "iris-blue-broken", "iris-blue-ready"]
    );
    assert_eq!(
        listed(&["get", "instances", "--limit", "1"]),
        ["iris-blue-new"]
    );
    assert_eq!(listed(&["get", "instances", "--all"]).len(), 5);
    assert_eq!(
        listed(&["get", "instances", "iris-blue-gone"]),
        ["iris-blue-gone"]
    );
    let json = home
        .run_with(&server, &["get", "instances", "-o", "json"])
        .out;
    let body: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(body["items"].as_array().unwrap().len(), 5);
    assert_eq!(
        home.run_with(&server, &["get", "endpoints", "--all"]).code,
        2
    );
}

fn first_word(line: &str) -> String {
    line.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_read_after_a_write_asks_for_the_position_of_that_write() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("e.yaml", &ENDPOINT.replace("{traffic: {blue: 100}}", "{}"));
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap(), "--wait"]);
    let read = server
        .requests()
        .into_iter()
        .rfind(|request| request.line.starts_with("GET /v1/endpoints/iris"));
    assert_eq!(read.unwrap().position.as_deref(), Some("7"));
}

#[test]
fn pins_and_pauses_are_sent_as_the_api_takes_them() {
    let (home, server) = (Home::new(), FakeServer::start());
    let result = home.run_with(
        &server,
        &["scale", "iris/blue", "--instances", "5", "--for", "1h"],
    );
    assert_eq!(result.code, 0, "{result:?}");
    let pin = server.body_of("PUT /v1/autoscale/iris/blue/pin");
    // The server counts the hour, by its own clock.
    assert_eq!(pin, json!({"instances": 5, "for": "1h"}));
    assert_eq!(
        home.run_with(&server, &["scale", "iris/blue", "--release"])
            .code,
        0
    );
    assert_eq!(
        home.run_with(&server, &["pause", "iris/blue", "--scale-in"])
            .code,
        0
    );
    assert_eq!(
        server.body_of("POST /v1/autoscale/iris/blue/pause"),
        json!({"scaleIn": true, "scaleOut": false})
    );
    assert_eq!(home.run_with(&server, &["resume", "iris/blue"]).code, 0);
    assert_eq!(
        server.writes(),
        [
            "PUT /v1/autoscale/iris/blue/pin",
            "DELETE /v1/autoscale/iris/blue/pin",
            "POST /v1/autoscale/iris/blue/pause",
            "POST /v1/autoscale/iris/blue/resume",
        ]
    );
}

#[test]
fn invoke_takes_the_key_from_the_api_and_shows_who_answered() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("e.yaml", &ENDPOINT.replace("{traffic: {blue: 100}}", "{}"));
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    let result = home.run_with(
        &server,
        &[
            "invoke",
            "iris",
            "--data",
            "[1, 2]",
            "--deployment",
            "green",
        ],
    );
    assert_eq!(result.code, 0, "{result:?}");
    assert_eq!(result.out, "{\"echo\":[1, 2]}\n");
    assert!(
        result.err.contains("200 OK, from green, request r-1, "),
        "{}",
        result.err
    );
    assert_eq!(server.last_token().as_deref(), Some("Bearer primary-key"));

    let result = home.run_with(&server, &["invoke", "iris", "--data", "\"fail\""]);
    assert_eq!(result.code, 1, "{result:?}");
    assert!(
        result.err.contains("424") && result.err.contains("model status 500"),
        "{}",
        result.err
    );
}

#[test]
fn an_unreachable_gateway_is_named_with_the_source_of_its_address() {
    let (home, server) = (Home::new(), FakeServer::start());
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let gateway = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let uri = format!("{gateway}/endpoints/iris/score");
    let endpoint = |status: Value| json!({"spec": {"auth": "none"}, "status": status});
    let invoke = ["invoke", "iris", "--data", "[1]"];

    server.store("/v1/endpoints/iris", endpoint(json!({"scoringUri": uri})));
    let result = home.run_with(&server, &invoke);
    assert_eq!((result.code, result.out.as_str()), (3, ""), "{result:?}");
    let origin = format!("scoringUri, as the control API at {}", server.url);
    for word in [&uri, &origin, "Connection refused", "--gateway-url"] {
        assert!(result.err.contains(word), "no {word} in {}", result.err);
    }

    // Control does not know the address: it is in the client's file, or unknown.
    server.store("/v1/endpoints/iris", endpoint(json!({})));
    let result = home.run_with(&server, &invoke);
    assert_eq!(result.code, 1, "{result:?}");
    assert!(result.err.contains("--gateway-url"), "{}", result.err);
    let config = json!({"server": server.url, "gateway": gateway}).to_string();
    home.file("penstock/client.json", &config);
    let result = home.run_with(&server, &invoke);
    assert_eq!(result.code, 3, "{result:?}");
    for word in [&uri, "`gateway` in client.json"] {
        assert!(result.err.contains(word), "no {word} in {}", result.err);
    }
}

#[test]
fn a_list_without_rows_says_so_and_prints_no_table() {
    let (home, server) = (Home::new(), FakeServer::start());
    server.store("/v1/endpoints/iris", json!({"metadata": {"name": "iris"}}));
    for (words, said) in [
        (&["decisions", "iris"][..], "no decisions for iris yet\n"),
        (
            &["decisions", "iris", "--since", "1h"],
            "no decisions for iris in the last 1h\n",
        ),
        (&["decisions"], "no decisions yet\n"),
        (&["get", "decisions", "iris"], "no decisions of iris yet\n"),
        (&["get", "instances", "iris"], "no instances of iris yet\n"),
        (&["get", "access"], "no tokens yet\n"),
        (&["events", "parked"], "no endpoint is parked\n"),
    ] {
        let result = home.run_with(&server, words);
        assert_eq!(
            (result.code, result.out.as_str()),
            (0, ""),
            "{words:?}: {result:?}"
        );
        assert_eq!(result.err, said, "{words:?}");
    }
    server.store(
        "/v1/instances/1",
        instance("iris-blue-gone", "stopped", 5, Some(15)),
    );
    let result = home.run_with(&server, &["get", "instances"]);
    assert_eq!((result.code, result.out.as_str()), (0, ""), "{result:?}");
    assert!(result.err.contains("--all shows 1"), "{}", result.err);
    // Programs get JSON.
    let result = home.run_with(&server, &["decisions", "iris", "-o", "json"]);
    let body: Value = serde_json::from_str(&result.out).unwrap();
    assert_eq!((result.code, &body["items"]), (0, &json!([])), "{result:?}");
}

#[test]
fn heads_are_saved_to_a_file_and_the_log_is_verified_against_them() {
    let (home, server) = (Home::new(), FakeServer::start());
    let result = home.run_with(&server, &["events", "head"]);
    assert_eq!(result.code, 0, "{result:?}");
    for part in ["BUCKET", "2500", &"ab".repeat(32)] {
        assert!(result.out.contains(part), "{part}: {}", result.out);
    }
    let kept = home
        .run_with(&server, &["events", "head", "-o", "json"])
        .out;
    let file = home.dir.path().join("heads.json");
    std::fs::write(&file, &kept).unwrap();
    let words = ["events", "verify", "--heads", "heads.json"];
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 0, "{result:?}");
    let kept: Value = serde_json::from_str(&kept).unwrap();
    let asked = server.body_of("POST /v1/events/verify");
    assert_eq!(asked, json!({"heads": kept["items"]}));
    for text in ["", "{}", r#"{"items":[]}"#, "BUCKET POSITION HASH"] {
        std::fs::write(&file, text).unwrap();
        let result = home.run_with(&server, &words);
        assert_eq!(result.code, 1, "{text}: {result:?}");
        assert!(
            result.err.contains("penstock events head -o json"),
            "{result:?}"
        );
    }
}

#[test]
fn replay_shows_decisions_of_other_versions_in_a_table_and_does_not_fail_for_them() {
    let (home, server) = (Home::new(), FakeServer::start());
    let words = ["events", "replay", "--check-decisions"];
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 0, "{result:?}");
    assert!(result.out.contains("decisions: 9\n"), "{}", result.out);
    let rows: Vec<Vec<&str>> = result
        .out
        .lines()
        .map(|l| l.split_whitespace().collect())
        .collect();
    for row in [
        ["autoscale", "1", "-", "2", "3", "1"],
        ["autoscale", "2", "2025b", "1", "0", "0"],
    ] {
        assert!(rows.iter().any(|cells| cells[..] == row), "{}", result.out);
    }
    let json = home.run_with(&server, &[&words[..], &["-o", "json"]].concat());
    let body: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(body["otherVersions"][0]["onlyWords"], 3);
}

#[test]
fn the_complete_log_is_exported_over_several_pages() {
    let (home, server) = (Home::new(), FakeServer::start());
    let result = home.run_with(&server, &["events", "export", "--out", "events.ndjson"]);
    assert_eq!(result.code, 0, "{result:?}");
    let text = std::fs::read_to_string(home.dir.path().join("events.ndjson")).unwrap();
    let positions: Vec<u64> = text
        .lines()
        .map(|line| {
            serde_json::from_str::<Value>(line).unwrap()["position"]
                .as_u64()
                .unwrap()
        })
        .collect();
    assert_eq!(positions, (1..=2500).collect::<Vec<u64>>());
}

#[test]
fn tail_shows_the_last_events_and_what_comes_after_them() {
    let (home, server) = (Home::new(), FakeServer::start());
    let words = ["events", "tail", "-n", "2", "--no-follow"];
    let result = home.run_with(&server, &words);
    assert_eq!(result.code, 0, "{result:?}");
    let first_words = |text: &str| -> Vec<String> {
        let lines = text.lines();
        lines
            .map(|line| line.split_whitespace().next().unwrap().to_owned())
            .collect()
    };
    assert_eq!(first_words(&result.out), ["2499", "2500"]);

    let mut child = home
        .command(&["events", "tail", "--after", "2500", "--type", "scaling."])
        .env("PENSTOCK_SERVER", &server.url)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(
        first_words(&line),
        ["2502"],
        "the usage event is filtered out"
    );
}

#[test]
fn logs_are_printed_byte_for_byte() {
    let (home, server) = (Home::new(), FakeServer::start());
    let result = home.run_with(&server, &["logs", "iris/blue", "--since", "10m"]);
    assert_eq!(
        (result.code, result.out.as_str()),
        (0, "{\"a\": 1}\n"),
        "{result:?}"
    );
    let asked = server.requests().pop().unwrap().line;
    assert_eq!(asked, "GET /v1/logs/iris/blue?since=10m");
    home.run_with(&server, &["logs", "iris/blue", "--timestamps"]);
    let asked = server.requests().pop().unwrap().line;
    assert_eq!(asked, "GET /v1/logs/iris/blue?timestamps=true");
    home.run_with(&server, &["logs", "iris/blue", "--timestamps"]);
    let asked = server.requests().pop().unwrap().line;
    assert_eq!(asked, "GET /v1/logs/iris/blue?timestamps=true");
}

#[test]
fn a_preview_of_a_file_needs_no_server_and_shows_the_hours_of_the_zone() {
    let home = Home::new();
    home.file("rules.yaml", AUTOSCALE);
    let words = [
        "autoscale",
        "preview",
        "-f",
        "rules.yaml",
        "--from",
        "2026-10-23T00:00:00Z",
        "--to",
        "2026-10-27T00:00:00Z",
        "-o",
        "json",
    ];
    let result = home.run(&words);
    assert_eq!(result.code, 0, "{result:?}");
    let body: Value = serde_json::from_str(&result.out).unwrap();
    let shown: Vec<(String, String)> = body["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            (
                one["at"].as_str().unwrap().into(),
                one["profile"].as_str().unwrap().into(),
            )
        })
        .collect();
    let expected = [
        ("2026-10-23T00:00:00.000Z", "default"),
        ("2026-10-23T07:00:00.000Z", "office-hours"),
        ("2026-10-23T16:00:00.000Z", "default"),
        // Clocks went back on Sunday.
        ("2026-10-26T08:00:00.000Z", "office-hours"),
        ("2026-10-26T17:00:00.000Z", "default"),
    ];
    assert_eq!(
        shown,
        expected.map(|(at, profile)| (at.to_owned(), profile.to_owned()))
    );
}

#[test]
fn a_preview_with_too_many_changes_says_from_when_on_it_was_cut() {
    let home = Home::new();
    let rules = AUTOSCALE.replace("0 9 * * Mon-Fri", "*/2 * * * *");
    home.file("rules.yaml", &rules.replace("9h", "1m"));
    for (to, output, is_cut) in [
        ("8d", "json", true),
        ("8d", "table", true),
        ("1d", "json", false),
    ] {
        let words = [
            "autoscale",
            "preview",
            "-f",
            "rules.yaml",
            "--to",
            to,
            "-o",
            output,
        ];
        let result = home.run(&words);
        assert_eq!(result.code, 0, "{}", result.err);
        assert_eq!(result.err.contains("the preview was cut"), is_cut, "{to}");
        if output == "json" {
            let body: Value = serde_json::from_str(&result.out).unwrap();
            assert_eq!(body["cutAt"].is_string(), is_cut, "{to}");
        }
    }
}

#[test]
fn one_frame_of_top_is_plain_text() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("all.yaml", &all_documents());
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    let result = home.run_with(&server, &["top", "--once"]);
    assert_eq!(result.code, 0, "{result:?}");
    assert!(result.out.contains("iris/blue"), "{}", result.out);
    assert!(!result.out.contains('\x1b'), "{}", result.out);
}

#[test]
fn a_name_in_place_of_a_kind_gives_a_hint() {
    let home = Home::new();
    for command in ["describe", "get", "delete"] {
        let result = home.run(&[command, "iris/blue"]);
        assert_eq!(result.code, 2, "{result:?}");
        let hint = format!("`penstock {command} deployment iris/blue`");
        assert!(result.err.contains(&hint), "{}", result.err);
    }
    // A mistyped kind still gives the list of kinds.
    let result = home.run(&["get", "endpoint s"]);
    assert_eq!(result.code, 2, "{result:?}");
    assert!(result.err.contains("deployments"), "{}", result.err);
}

#[test]
fn a_pin_beyond_the_limits_is_set_with_a_warning() {
    let (home, server) = (Home::new(), FakeServer::start());
    let file = home.file("all.yaml", &home::all_documents());
    home.run_with(&server, &["apply", "-f", file.to_str().unwrap()]);
    let pin = |instances: &str| {
        let result = home.run_with(&server, &["scale", "iris/blue", "--instances", instances]);
        assert_eq!(result.code, 0, "{result:?}");
        result.err
    };
    // The larger of the two profiles' limits.
    assert_eq!(pin("8"), "");
    let warning = pin("9");
    assert!(warning.contains("more than the 8"), "{warning}");
    assert_eq!(
        server.writes().last().unwrap(),
        "PUT /v1/autoscale/iris/blue/pin"
    );
}

#[test]
fn a_missing_file_is_a_failure_in_every_command() {
    let (home, server) = (Home::new(), FakeServer::start());
    for words in [
        &["apply", "-f", "none.yaml"][..],
        &["diff", "-f", "none.yaml"],
        &["validate", "-f", "none.yaml"],
        &["autoscale", "preview", "-f", "none.yaml"],
        &["invoke", "iris", "--data", "none.json"],
        &["serve", "--config", "none.conf"],
        &["store", "rebuild", "--store", "sqlite:none.db"],
    ] {
        let result = home.run_with(&server, words);
        assert_eq!(result.code, 1, "{words:?}: {result:?}");
        assert!(result.err.contains("none."), "{words:?}: {}", result.err);
    }
}
