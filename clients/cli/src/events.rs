//! `events`: follows, exports, verifies and replays the log, and handles endpoints that a consumer has
//! parked.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use contract::ids::Name;
use futures::{Stream, StreamExt, TryStreamExt};
use reqwest::header::HeaderName;
use serde_json::{Value, json};
use sse_stream::SseByteStream;

use super::error::CliError;
use super::heads::{self, HeadArgs};
use super::names::name;
use super::output::{Format, Table, items, print, print_notice, text, yaml};
use crate::client::{Client, ClientError};

/// Follow, export, verify and replay the event log, and unpark what it has parked
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events tail
  penstock events export --out events.ndjson
  penstock events verify
  penstock events head -o json > heads.json
  penstock events replay --check-decisions
  penstock events parked")]
pub struct EventsArgs {
    #[command(subcommand)]
    command: EventsCommand,
}

#[derive(Debug, clap::Subcommand)]
enum EventsCommand {
    Tail(TailArgs),
    Export(ExportArgs),
    Verify(VerifyArgs),
    Head(HeadArgs),
    Replay(ReplayArgs),
    Parked(ParkedArgs),
    Skip(SkipArgs),
    Unpark(UnparkArgs),
}

/// List endpoints that a consumer has parked because of an event it cannot apply, and such events of no endpoint
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events parked
  penstock events parked -o json")]
struct ParkedArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Format,
}

/// Let a consumer skip an event; unpark its endpoint afterwards
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events skip 4711 --consumer autoscaler --reason 'written by a release that was rolled back'")]
struct SkipArgs {
    /// The event, as `penstock events parked` shows it
    #[arg(value_name = "POSITION")]
    position: u64,
    /// As `penstock events parked` shows it
    #[arg(long, value_name = "NAME")]
    consumer: String,
    /// Why; recorded in the log
    #[arg(long, value_name = "TEXT")]
    reason: String,
}

/// Let a consumer rebuild its state of a parked endpoint
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events unpark iris --consumer autoscaler
  penstock events unpark iris --consumer autoscaler --reason 'fixed in 1.4.2'")]
struct UnparkArgs {
    /// The endpoint, as `penstock events parked` shows it
    #[arg(value_name = "ENDPOINT", value_parser = name)]
    endpoint: Name,
    /// As `penstock events parked` shows it
    #[arg(long, value_name = "NAME")]
    consumer: String,
    /// Why; recorded in the log
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
}

/// Follow the log as it grows
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events tail
  penstock events tail --endpoint iris --type scaling.decided
  penstock events tail --after 0 -o json
  penstock events tail --lines 50 --no-follow")]
struct TailArgs {
    /// Only of this endpoint
    #[arg(long, value_parser = name)]
    endpoint: Option<Name>,
    /// Only of this type, or with this prefix: scaling.decided, instance.
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// Start after this position
    #[arg(long, value_name = "POSITION", conflicts_with = "lines")]
    after: Option<u64>,
    /// Start this many events before the end
    #[arg(short = 'n', long, value_name = "N", default_value_t = 10)]
    lines: u64,
    /// Stop at the end
    #[arg(long)]
    no_follow: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: EventFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum EventFormat {
    /// One line per event, for people
    Text,
    /// One JSON object per line
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum ReportFormat {
    /// One line per fact and problem, for people
    Text,
    /// The API's body, unchanged
    Json,
}

/// Write the log as one JSON object per line
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events export > events.ndjson
  penstock events export --out events.ndjson
  penstock events export --after 120000 --out rest.ndjson")]
struct ExportArgs {
    /// A file; standard output by default
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Start after this position
    #[arg(long, value_name = "POSITION", default_value_t = 0)]
    after: u64,
}

/// Check the log: order, versions, schemas, hash chains, and that read models equal a rebuild
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events verify
  penstock events verify --heads heads.json
  penstock events verify -o json

Each event carries the hash of the one before it in its bucket, so an event that was changed, removed
or inserted is detected by the events after it. A change or truncation at the very end is detected with
heads that were saved elsewhere: `penstock events head -o json` prints them; a server saves them next to a
store in a file. `penstock store verify` checks the same without a server.

Exit 1 if anything is wrong.")]
struct VerifyArgs {
    /// Saved heads, which the log must still contain
    #[arg(long, value_name = "FILE")]
    heads: Option<PathBuf>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: ReportFormat,
}

/// Re-evaluate recorded decisions with the same inputs
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock events replay --check-decisions

Decisions of this engine version must match byte for byte: exit 1 if one does not. Those of other versions, or
made with another release of the time zones, are counted by version: equal, only the wording differs, other.")]
struct ReplayArgs {
    /// Re-evaluate every decision and compare byte for byte
    #[arg(long, default_value_t = true)]
    check_decisions: bool,
    /// Output format
    #[arg(short, long, value_enum, default_value = "text")]
    output: ReportFormat,
}

/// Number of events per request.
const PAGE: u64 = 1000;

pub async fn events(client: &Client, args: &EventsArgs) -> Result<(), CliError> {
    match &args.command {
        EventsCommand::Tail(args) => tail(client, args).await,
        EventsCommand::Export(args) => export(client, args).await,
        EventsCommand::Verify(args) => {
            let path = ["v1", "events", "verify"];
            let answer = match &args.heads {
                None => client.get(&path, &[]).await?,
                Some(file) => client.post(&path, &heads::read_heads(file)?).await?,
            };
            print_report(&answer.text, &answer.json()?, args.output)
        }
        EventsCommand::Head(args) => heads::heads(client, args).await,
        EventsCommand::Replay(args) => {
            let body = json!({"checkDecisions": args.check_decisions});
            let answer = client.post(&["v1", "events", "replay"], &body).await?;
            print_replay_report(&answer.text, answer.json()?, args.output)
        }
        EventsCommand::Parked(args) => parked(client, args).await,
        EventsCommand::Skip(args) => {
            let body = json!({"consumer": args.consumer, "reason": args.reason});
            let position = args.position.to_string();
            let path = ["v1", "events", &position, "skip"];
            let answer = client.post(&path, &body).await?.json()?;
            let endpoint = text(&answer, "/endpoint");
            print(&format!(
                "{} will skip position {position} of {endpoint} at its next rebuild; continue with `penstock events unpark {endpoint} --consumer {}`",
                args.consumer, args.consumer
            ))
        }
        EventsCommand::Unpark(args) => {
            let body = json!({"consumer": args.consumer, "reason": args.reason});
            let path = ["v1", "endpoints", args.endpoint.as_str(), "unpark"];
            client.post(&path, &body).await?;
            print(&format!(
                "{} is rebuilding {}",
                args.consumer, args.endpoint
            ))
        }
    }
}

async fn parked(client: &Client, args: &ParkedArgs) -> Result<(), CliError> {
    let answer = client.get(&["v1", "events", "parked"], &[]).await?;
    match args.output {
        Format::Json => print(&answer.text),
        Format::Yaml => print(&yaml(&answer.json()?)),
        Format::Table => {
            let rows = items(&answer.json()?);
            if rows.is_empty() {
                print_notice("no endpoint is parked");
                return Ok(());
            }
            print(&parked_table(&rows).render(std::io::stdout().is_terminal()))
        }
    }
}

fn parked_table(rows: &[Value]) -> Table {
    let mut table = Table::new(&[
        "CONSUMER", "ENDPOINT", "POSITION", "EVENT", "SINCE", "DETAIL",
    ]);
    for row in rows {
        table.row(vec![
            text(row, "/consumer").to_string(),
            text(row, "/endpoint").to_string(),
            position(row).to_string(),
            text(row, "/eventType").to_string(),
            text(row, "/since").to_string(),
            text(row, "/detail").to_string(),
        ]);
    }
    table
}

async fn page(client: &Client, after: u64) -> Result<Vec<Value>, CliError> {
    let query = [
        ("after", Some(after.to_string())),
        ("limit", Some(PAGE.to_string())),
    ];
    let body = client.get(&["v1", "events"], &query).await?.json()?;
    Ok(items(&body))
}

fn position(event: &Value) -> u64 {
    event.get("position").and_then(Value::as_u64).unwrap_or(0)
}

async fn export(client: &Client, args: &ExportArgs) -> Result<(), CliError> {
    let mut out: Box<dyn Write> = match &args.out {
        None => Box::new(std::io::stdout()),
        Some(path) => Box::new(std::io::BufWriter::new(
            std::fs::File::create(path).map_err(|error| not_written(args, error))?,
        )),
    };
    let (mut after, mut count) = (args.after, 0_u64);
    loop {
        let events = page(client, after).await?;
        let Some(last) = events.last().map(position) else {
            break;
        };
        for event in &events {
            writeln!(out, "{event}").map_err(|error| not_written(args, error))?;
        }
        count += events.len() as u64;
        if last <= after {
            return Err(CliError::Failed(format!(
                "the server sent events that do not come after position {after}; nothing more was written"
            )));
        }
        after = last;
    }
    out.flush().map_err(|error| not_written(args, error))?;
    print_notice(&format!("{count} events written, up to position {after}"));
    Ok(())
}

fn not_written(args: &ExportArgs, error: std::io::Error) -> CliError {
    if error.kind() == std::io::ErrorKind::BrokenPipe {
        return CliError::Quiet(0);
    }
    let name = args
        .out
        .as_ref()
        .map_or("standard output".into(), |path| path.display().to_string());
    CliError::Failed(format!("{name} cannot be written: {error}")).caused_by(error)
}

/// Which events are shown, and how.
struct Filter<'a> {
    endpoint: Option<&'a Name>,
    kind: Option<&'a str>,
    format: EventFormat,
}

impl Filter<'_> {
    fn matches(&self, event: &Value) -> bool {
        let kind = text(event, "/type");
        let stream = text(event, "/stream");
        let endpoint = stream.split('/').nth(2).unwrap_or_default();
        self.endpoint
            .is_none_or(|wanted| wanted.as_str() == endpoint)
            && self.kind.is_none_or(|wanted| kind.starts_with(wanted))
    }

    fn show(&self, event: &Value) -> Result<(), CliError> {
        if !self.matches(event) {
            return Ok(());
        }
        match self.format {
            EventFormat::Json => print(&event.to_string()),
            EventFormat::Text => print(&line(event)),
        }
    }
}

/// `POSITION TIME TYPE STREAM by ACTOR DATA`, with the data truncated. For an event that the server
/// cannot decode, the reason.
fn line(event: &Value) -> String {
    const DATA: usize = 100;
    let data = match event.get("unreadable") {
        Some(reason) => format!("cannot be read: {}", reason.as_str().unwrap_or_default()),
        None => event
            .get("data")
            .map(ToString::to_string)
            .unwrap_or_default(),
    };
    let mut shown: String = data.chars().take(DATA).collect();
    if shown.len() < data.len() {
        shown.push('…');
    }
    format!(
        "{:>8}  {}  {:<28} {}  by {}  {shown}",
        position(event),
        text(event, "/time"),
        text(event, "/type"),
        text(event, "/stream"),
        text(event, "/actor"),
    )
}

async fn tail(client: &Client, args: &TailArgs) -> Result<(), CliError> {
    let filter = Filter {
        endpoint: args.endpoint.as_ref(),
        kind: args.kind.as_deref(),
        format: args.output,
    };
    if let Some(endpoint) = &args.endpoint {
        let path = ["v1", "endpoints", endpoint.as_str()];
        if client.find(&path).await?.is_none() {
            print_notice(&format!(
                "there is no endpoint `{endpoint}` now: events shown are of a deleted or a future one"
            ));
        }
    }
    let mut after = match args.after {
        Some(after) => after,
        None => head(client).await?.saturating_sub(args.lines),
    };
    loop {
        let events = page(client, after).await?;
        for event in &events {
            filter.show(event)?;
        }
        match events.last().map(position) {
            Some(last) if last > after => after = last,
            _ => break,
        }
    }
    if args.no_follow {
        return Ok(());
    }
    follow(client, after, &filter).await
}

/// The last position of the log, which is on every page.
async fn head(client: &Client) -> Result<u64, CliError> {
    let query = [("limit", Some("1".to_owned()))];
    let body = client.get(&["v1", "events"], &query).await?.json()?;
    Ok(body.get("head").and_then(Value::as_u64).unwrap_or(0))
}

/// The longest delay before a stream is resumed.
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(1);

/// The delays before a stream is resumed. After them, a server that cannot be reached is an error.
const RECONNECT_BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(200))
    .with_max_delay(RECONNECT_DELAY_MAX)
    .with_max_times(4);

/// Follows the stream, and resumes it after a disconnect.
async fn follow(client: &Client, after: u64, filter: &Filter<'_>) -> Result<(), CliError> {
    let mut after = after;
    let mut delays = RECONNECT_BACKOFF.build();
    loop {
        let before = after;
        let ended = follow_once(client, &mut after, filter).await;
        if after > before {
            delays = RECONNECT_BACKOFF.build();
        }
        let delay = match (ended, delays.next()) {
            (Ok(()), delay) => delay.unwrap_or(RECONNECT_DELAY_MAX),
            (Err(CliError::Client(ClientError::Unreachable { .. })), Some(delay)) => delay,
            (Err(error), _) => return Err(error),
        };
        tokio::time::sleep(delay).await;
    }
}

async fn follow_once(
    client: &Client,
    after: &mut u64,
    filter: &Filter<'_>,
) -> Result<(), CliError> {
    let headers = [
        (
            HeaderName::from_static("accept"),
            "text/event-stream".to_owned(),
        ),
        (HeaderName::from_static("last-event-id"), after.to_string()),
    ];
    let query = [("after", Some(after.to_string()))];
    let response = client
        .stream(&["v1", "events", "stream"], &query, &headers)
        .await?;
    let mut bodies = pin!(json_payloads(response.bytes_stream()));
    while let Some(body) = bodies.next().await {
        let body = body.map_err(|error| match error {
            sse_stream::Error::Body(error) => super::logs::disconnected(client, &error),
            other => super::logs::disconnected(client, &other),
        })?;
        show_new(&body, after, filter)?;
    }
    Ok(())
}

/// The JSON payloads of a stream of server-sent events; other payloads are ignored. Chunks may be split
/// anywhere.
fn json_payloads<B, E>(
    chunks: impl Stream<Item = Result<B, E>>,
) -> impl Stream<Item = Result<Value, sse_stream::Error>>
where
    B: bytes::Buf,
    E: std::error::Error + Send + Sync + 'static,
{
    SseByteStream::new(chunks).try_filter_map(|event| async move {
        let data = event.data.unwrap_or_default();
        Ok(serde_json::from_str(&data).ok())
    })
}

/// Shows an event, unless it was shown before the stream was resumed.
fn show_new(body: &Value, after: &mut u64, filter: &Filter<'_>) -> Result<(), CliError> {
    let reached = position(body);
    if reached <= *after {
        return Ok(());
    }
    *after = reached;
    filter.show(body)
}

/// Prints a report, one fact per line; exit 1 if it is not `ok`.
fn print_report(body: &str, report: &Value, format: ReportFormat) -> Result<(), CliError> {
    match format {
        ReportFormat::Json => print(body)?,
        ReportFormat::Text => print(&report_lines(report))?,
    }
    match report.get("ok").and_then(Value::as_bool) {
        Some(true) => Ok(()),
        _ => Err(CliError::Quiet(1)),
    }
}

/// As [`print_report`], with a table of decisions of other versions, which may differ.
fn print_replay_report(body: &str, mut found: Value, format: ReportFormat) -> Result<(), CliError> {
    let versions = found
        .as_object_mut()
        .and_then(|found| found.remove("otherVersions"));
    let outcome = print_report(body, &found, format);
    match versions {
        Some(Value::Array(versions)) if format == ReportFormat::Text && !versions.is_empty() => {
            print(
                "Decisions of other versions, compared with this version's results (differences are not errors):",
            )?;
            print(&versions_table(&versions).render(std::io::stdout().is_terminal()))?;
        }
        _ => {}
    }
    outcome
}

fn versions_table(versions: &[Value]) -> Table {
    let mut table = Table::new(&[
        "ENGINE",
        "VERSION",
        "ZONES",
        "EQUAL",
        "WORDING ONLY",
        "OTHER",
    ]);
    for of in versions {
        let cells = [
            "/engine",
            "/engineVersion",
            "/zoneData",
            "/equal",
            "/onlyWords",
            "/other",
        ];
        table.row(cells.map(|cell| text(of, cell)).into());
    }
    table
}

fn report_lines(report: &Value) -> String {
    let Value::Object(members) = report else {
        return report.to_string();
    };
    let mut out = String::new();
    for (name, value) in members {
        match value {
            Value::Array(items) if items.is_empty() => out.push_str(&format!("{name}: none\n")),
            Value::Array(items) => {
                out.push_str(&format!("{name}:\n"));
                for item in items {
                    let item = item
                        .as_str()
                        .map_or_else(|| item.to_string(), str::to_owned);
                    out.push_str(&format!("  {item}\n"));
                }
            }
            Value::String(text) => out.push_str(&format!("{name}: {text}\n")),
            other => out.push_str(&format!("{name}: {other}\n")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_of_a_report_describes_a_report() {
        let mut command =
            <EventsCommand as clap::Subcommand>::augment_subcommands(clap::Command::new("events"));
        for (name, is_report) in [("tail", false), ("verify", true), ("replay", true)] {
            let subcommand = command.find_subcommand_mut(name).unwrap();
            let help = subcommand.render_long_help().to_string();
            assert_eq!(help.contains("One line per fact"), is_report, "{help}");
            assert_eq!(help.contains("One line per event"), !is_report, "{help}");
        }
    }

    #[tokio::test]
    async fn events_are_complete_however_the_stream_is_chunked() {
        let text = "id: 7\nevent: scaling.decided\ndata: {\"a\":\ndata: 1}\n\n: keep-alive\n\ndata: no\n\ndata: \"ü\"\r\n\r\ndata: 2\n".as_bytes();
        for size in 1..=text.len() {
            let chunks = text.chunks(size).map(Ok::<_, std::io::Error>);
            let found: Vec<Value> = json_payloads(futures::stream::iter(chunks))
                .map(Result::unwrap)
                .collect()
                .await;
            assert_eq!(found, [json!({"a": 1}), json!("ü")], "cut at {size}");
        }
    }

    #[test]
    fn events_are_filtered_by_endpoint_and_by_type() {
        let event =
            json!({"position": 7, "stream": "scaling/default/iris", "type": "scaling.decided"});
        let iris: Name = "iris".parse().unwrap();
        let other: Name = "other".parse().unwrap();
        let matches = |endpoint, kind| {
            let format = EventFormat::Text;
            Filter {
                endpoint,
                kind,
                format,
            }
            .matches(&event)
        };
        assert!(matches(None, None));
        assert!(matches(Some(&iris), Some("scaling.")));
        assert!(!matches(Some(&other), None));
        assert!(!matches(None, Some("instance.")));
    }

    #[test]
    fn a_report_that_is_not_ok_fails_the_command() {
        let good = json!({"ok": true, "events": 5, "faults": []});
        assert_eq!(report_lines(&good), "events: 5\nfaults: none\nok: true\n");
        assert!(print_report("", &good, ReportFormat::Json).is_ok());
        let bad = json!({"ok": false, "faults": ["position 3 stands twice"]});
        assert_eq!(
            print_report("", &bad, ReportFormat::Json)
                .unwrap_err()
                .exit_code(),
            1
        );
    }
}
