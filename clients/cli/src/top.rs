//! `top`: a live view of endpoints, deployments, their load, instances and the latest decisions.
//!
//! `fetch_model` queries the server, `Model` is the result, `View` draws a model into a buffer. The live
//! view and `--once` draw the same.

use std::collections::BTreeMap;
use std::time::Duration;

use contract::time::Timestamp;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Table, Widget};
use serde_json::Value;

use super::chart::sparkline;
use super::error::CliError;
use super::kinds::name_of_deployment;
use super::output::{Screen, age, items, print, shares, text};
use super::{decisions, names::Scope};
use crate::client::{Client, ClientError};

/// Watch endpoints, load, instances and decisions; q quits
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock top
  penstock top iris --interval 2s
  penstock top --once                      one frame as plain text")]
pub struct TopArgs {
    /// Only this ENDPOINT or ENDPOINT/DEPLOYMENT
    scope: Option<Scope>,
    /// Print one frame as plain text and exit
    #[arg(long)]
    once: bool,
    /// Refresh interval
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    interval: contract::Span,
}

/// Length of the load history, in seconds.
const HISTORY_SECONDS: u64 = 120;
const DECISIONS: u32 = 12;
/// Size of the frame that `--once` prints.
const ONCE_WIDTH: u16 = 120;

/// The data of one frame.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Model {
    now: Timestamp,
    server: String,
    endpoints: Vec<Value>,
    deployments: Vec<Value>,
    decisions: Vec<Value>,
    /// By `ENDPOINT/DEPLOYMENT`, oldest first.
    loads: BTreeMap<String, Vec<LoadPoint>>,
    /// Why the data is stale, if it is.
    error: Option<String>,
}

/// The load of a deployment in one second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoadPoint {
    requests_per_second: f64,
    concurrency: f64,
    p99_ms: Option<f64>,
    errors_per_second: f64,
}

pub async fn top(client: &Client, args: &TopArgs, screen: Screen) -> Result<(), CliError> {
    if let Some(scope) = &args.scope {
        scope.must_exist(client).await?;
    }
    if args.once {
        let model = fetch_model(client, args.scope.as_ref(), screen.now).await?;
        return print(&render_text(&model));
    }
    // Fetch before switching the terminal, so that an error stays readable.
    let model = fetch_model(client, args.scope.as_ref(), screen.now).await?;
    let mut terminal = ratatui::try_init().map_err(|error| {
        CliError::Failed(format!(
            "a live view needs a terminal ({error}); use `penstock top --once` in scripts"
        ))
        .caused_by(error)
    })?;
    let ended = live(&mut terminal, client, args, model).await;
    ratatui::restore();
    ended
}

async fn live(
    terminal: &mut ratatui::DefaultTerminal,
    client: &Client,
    args: &TopArgs,
    mut model: Model,
) -> Result<(), CliError> {
    let mut keys = keys();
    let interval = args.interval.to_std().max(Duration::from_millis(100));
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        terminal
            .draw(|frame| {
                frame.render_widget(
                    View {
                        model: &model,
                        is_live: true,
                    },
                    frame.area(),
                )
            })
            .map_err(|error| {
                CliError::Failed(format!("the terminal cannot be drawn: {error}")).caused_by(error)
            })?;
        tokio::select! {
            key = keys.recv() => match key {
                Some(Key::Quit) | None => return Ok(()),
                Some(Key::Redraw) => {}
            },
            _ = ticks.tick() => {
                let now = Screen::of_process().now;
                match fetch_model(client, args.scope.as_ref(), now).await {
                    Ok(fresh) => model = fresh,
                    Err(error) => model.error = Some(error.to_string()),
                }
            }
        }
    }
}

enum Key {
    Quit,
    Redraw,
}

/// Capacity of the key queue; the terminal buffers further keys.
const KEYS_MAX: usize = 16;

/// Reads the keyboard on a thread of its own, since reading it blocks.
fn keys() -> tokio::sync::mpsc::Receiver<Key> {
    let (sender, receiver) = tokio::sync::mpsc::channel(KEYS_MAX);
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            let key = match event {
                Event::Key(key) if key.kind == KeyEventKind::Press && is_quit(key) => Key::Quit,
                Event::Resize(..) => Key::Redraw,
                _ => continue,
            };
            if sender.blocking_send(key).is_err() {
                return;
            }
        }
    });
    receiver
}

fn is_quit(key: event::KeyEvent) -> bool {
    let interrupt = key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c');
    interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
}

/// Fetches everything a frame shows, concurrently.
async fn fetch_model(
    client: &Client,
    scope: Option<&Scope>,
    now: Timestamp,
) -> Result<Model, CliError> {
    let endpoint = ("endpoint", scope.map(|scope| scope.endpoint.to_string()));
    let deployment = scope.and_then(|scope| scope.deployment.as_ref());
    let deployment = ("deployment", deployment.map(ToString::to_string));
    let of = [endpoint, deployment];
    let with = |name, value: String| {
        let [endpoint, deployment] = of.clone();
        [endpoint, deployment, (name, Some(value))]
    };
    let (all, latest, seconds) = (
        with("limit", "1000".into()),
        with("limit", DECISIONS.to_string()),
        with("since", format!("{HISTORY_SECONDS}s")),
    );
    let (endpoints, deployments, decisions, loads) = tokio::try_join!(
        list(client, "endpoints", &[]),
        list(client, "deployments", &all),
        list(client, "decisions", &latest),
        history(client, &seconds),
    )?;
    let mut model = Model {
        now,
        server: client.server().to_owned(),
        endpoints,
        deployments,
        decisions,
        loads,
        error: None,
    };
    model.sort(scope);
    Ok(model)
}

async fn list(
    client: &Client,
    collection: &str,
    query: &[(&str, Option<String>)],
) -> Result<Vec<Value>, CliError> {
    let body = client.get(&["v1", collection], query).await?.json()?;
    Ok(items(&body))
}

type LoadHistory = BTreeMap<String, Vec<LoadPoint>>;

/// The latest load of each deployment; empty if the server keeps no history.
async fn history(
    client: &Client,
    query: &[(&str, Option<String>)],
) -> Result<LoadHistory, CliError> {
    match client.get(&["v1", "history"], query).await {
        Ok(answer) => Ok(loads(&answer.json()?)),
        Err(ClientError::Refused(refusal)) if matches!(refusal.status, 404 | 501 | 503) => {
            Ok(LoadHistory::new())
        }
        Err(error) => Err(error.into()),
    }
}

/// The points of a history body by deployment, oldest first.
fn loads(body: &Value) -> LoadHistory {
    let mut points = items(body);
    points.retain(|point| point.get("time").is_some());
    points.sort_by_key(|point| text(point, "/time"));
    let mut loads = LoadHistory::new();
    for point in &points {
        let number = |pointer| point.pointer(pointer).and_then(Value::as_f64);
        let of = format!(
            "{}/{}",
            text(point, "/endpoint"),
            text(point, "/deployment")
        );
        loads.entry(of).or_default().push(LoadPoint {
            requests_per_second: number("/requestsPerSecond").unwrap_or(0.0),
            concurrency: number("/concurrency").unwrap_or(0.0),
            p99_ms: number("/latencyP99Ms"),
            errors_per_second: number("/errorsPerSecond").unwrap_or(0.0),
        });
    }
    loads
}

/// Number of instances of a deployment in a state.
fn tally(deployment: &Value, state: &str) -> u64 {
    let count = deployment.pointer(&format!("/status/instances/{state}"));
    count.and_then(Value::as_u64).unwrap_or(0)
}

/// Instances by state: `3 ready, 1 starting`.
fn by_state(deployment: &Value) -> String {
    let states = ["ready", "starting", "draining", "failed"];
    let parts: Vec<String> = states
        .iter()
        .map(|state| (tally(deployment, state), state))
        .filter(|(count, _)| *count > 0)
        .map(|(count, state)| format!("{count} {state}"))
        .collect();
    if parts.is_empty() {
        "0".into()
    } else {
        parts.join(", ")
    }
}

impl Model {
    /// Filters by scope and sorts by name, so that rows keep their place.
    fn sort(&mut self, scope: Option<&Scope>) {
        if let Some(scope) = scope {
            let endpoint = scope.endpoint.as_str();
            self.endpoints
                .retain(|one| text(one, "/metadata/name") == endpoint);
        }
        self.endpoints
            .sort_by_key(|one| text(one, "/metadata/name"));
        self.deployments.sort_by_key(name_of_deployment);
    }

    fn height(&self) -> u16 {
        let rows = self.endpoints.len() + self.deployments.len() + self.decisions.len();
        u16::try_from(rows)
            .unwrap_or(u16::MAX - 20)
            .saturating_add(13)
    }
}

/// One frame as text.
fn render_text(model: &Model) -> String {
    let area = Rect::new(0, 0, ONCE_WIDTH, model.height());
    let mut buffer = Buffer::empty(area);
    View {
        model,
        is_live: false,
    }
    .render(area, &mut buffer);
    let mut lines: Vec<String> = (0..area.height)
        .map(|y| {
            let row: String = (0..area.width).map(|x| buffer[(x, y)].symbol()).collect();
            row.trim_end().to_owned()
        })
        .collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    lines.join("\n") + "\n"
}

struct View<'a> {
    model: &'a Model,
    /// Whether the view reacts to keys.
    is_live: bool,
}

impl Widget for View<'_> {
    fn render(self, area: Rect, buffer: &mut Buffer) {
        let rows = |count: usize| u16::try_from(count).unwrap_or(u16::MAX).saturating_add(3);
        let [title, endpoints, deployments, decisions, help] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(rows(self.model.endpoints.len()).min(area.height / 4).max(4)),
            Constraint::Length(
                rows(self.model.deployments.len())
                    .min(area.height / 2)
                    .max(4),
            ),
            Constraint::Min(4),
            Constraint::Length(1),
        ])
        .areas(area);
        self.title().render(title, buffer);
        self.endpoints().render(endpoints, buffer);
        self.deployments(deployments.width)
            .render(deployments, buffer);
        self.decisions().render(decisions, buffer);
        if self.is_live {
            let keys = Style::new().add_modifier(Modifier::DIM);
            Line::styled("q quit", keys).render(help, buffer);
        }
    }
}

impl View<'_> {
    fn title(&self) -> Paragraph<'_> {
        let ready: u64 = self
            .model
            .deployments
            .iter()
            .map(|one| tally(one, "ready"))
            .sum();
        let facts = format!(
            "  {}  {}  {} instances ready",
            self.model.server, self.model.now, ready
        );
        let mut spans = vec![
            Span::styled("penstock top", Style::new().add_modifier(Modifier::BOLD)),
            Span::raw(facts),
        ];
        if let Some(error) = &self.model.error {
            let red = Style::new().fg(Color::Red);
            spans.push(Span::styled(format!("  {error}"), red));
        }
        Paragraph::new(Line::from(spans))
    }

    fn endpoints(&self) -> Table<'_> {
        let rows = self.model.endpoints.iter().map(|endpoint| {
            Row::new([
                Cell::new(text(endpoint, "/metadata/name")),
                state(&text(endpoint, "/status/provisioningState")),
                Cell::new(shares(endpoint.pointer("/spec/traffic"))),
                Cell::new(text(endpoint, "/status/scoringUri")),
            ])
        });
        let widths = [
            Constraint::Length(20),
            Constraint::Length(10),
            Constraint::Length(30),
            Constraint::Min(20),
        ];
        panel(
            "endpoints",
            &["NAME", "STATE", "TRAFFIC", "SCORING URI"],
            Table::new(rows, widths),
        )
    }

    fn deployments(&self, width: u16) -> Table<'_> {
        const FIXED: u16 = 20 + 10 + 12 + 26 + 4 * 8 + 10;
        let spark = usize::from(width.saturating_sub(FIXED + 2)).clamp(10, 60);
        let rows = self.model.deployments.iter().map(move |deployment| {
            let name = name_of_deployment(deployment);
            let loads = self
                .model
                .loads
                .get(&name)
                .map(Vec::as_slice)
                .unwrap_or_default();
            let latest = recent_mean(loads);
            let series: Vec<f64> = loads.iter().map(|load| load.requests_per_second).collect();
            let number = |value: Option<f64>| value.map_or("-".into(), short);
            Row::new([
                Cell::new(name.clone()),
                state(&text(deployment, "/status/provisioningState")),
                state(&text(deployment, "/status/available/reason")),
                Cell::new(by_state(deployment)),
                Cell::new(number(latest.map(|load| load.requests_per_second))),
                Cell::new(number(latest.map(|load| load.concurrency))),
                Cell::new(number(latest.and_then(|load| load.p99_ms))),
                Cell::new(number(latest.map(|load| load.errors_per_second))),
                Cell::new(sparkline(&series, spark)),
            ])
        });
        let widths = [
            Constraint::Length(20),
            Constraint::Length(10),
            Constraint::Length(12),
            Constraint::Length(26),
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Length(8),
            Constraint::Min(10),
        ];
        let header = [
            "DEPLOYMENT",
            "STATE",
            "AVAILABLE",
            "INSTANCES",
            "REQ/S",
            "IN USE",
            "P99 MS",
            "ERR/S",
            "LOAD",
        ];
        panel("deployments", &header, Table::new(rows, widths))
    }

    fn decisions(&self) -> Table<'_> {
        let rows = self.model.decisions.iter().map(|decision| {
            let of = format!(
                "{}/{}",
                text(decision, "/endpoint"),
                text(decision, "/deployment")
            );
            Row::new([
                Cell::new(format!(
                    "{} ago",
                    age(&text(decision, "/time"), self.model.now)
                )),
                Cell::new(of),
                Cell::new(decisions::count(decision)),
                Cell::new(text(decision, "/outcome")),
                Cell::new(decisions::because(decision)),
            ])
        });
        let widths = [
            Constraint::Length(9),
            Constraint::Length(20),
            Constraint::Length(20),
            Constraint::Length(22),
            Constraint::Min(20),
        ];
        let header = ["WHEN", "DEPLOYMENT", "COUNT", "OUTCOME", "BECAUSE"];
        panel("latest decisions", &header, Table::new(rows, widths))
    }
}

/// The mean of the last five seconds: single seconds jump too much to be read.
fn recent_mean(loads: &[LoadPoint]) -> Option<LoadPoint> {
    let last = &loads[loads.len().saturating_sub(5)..];
    if last.is_empty() {
        return None;
    }
    let mean = |of: fn(&LoadPoint) -> f64| last.iter().map(of).sum::<f64>() / last.len() as f64;
    Some(LoadPoint {
        requests_per_second: mean(|load| load.requests_per_second),
        concurrency: mean(|load| load.concurrency),
        p99_ms: last.iter().filter_map(|load| load.p99_ms).reduce(f64::max),
        errors_per_second: mean(|load| load.errors_per_second),
    })
}

fn short(value: f64) -> String {
    if value >= 100.0 || value == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

fn state(name: &str) -> Cell<'static> {
    let color = match name {
        "Succeeded" | "Ready" | "ScaledToZero" => Color::Green,
        "Failed" | "Failing" => Color::Red,
        _ => Color::Yellow,
    };
    Cell::new(name.to_owned()).style(Style::new().fg(color))
}

fn panel<'a>(title: &'a str, header: &[&'static str], table: Table<'a>) -> Table<'a> {
    let cells = header
        .iter()
        .map(|name| Cell::new(*name))
        .collect::<Vec<_>>();
    table
        .header(Row::new(cells).style(Style::new().add_modifier(Modifier::DIM)))
        .block(
            Block::new()
                .borders(Borders::TOP)
                .title(format!(" {title} ")),
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn model() -> Model {
        Model {
            now: "2026-10-10T12:00:10.000Z".parse().unwrap(),
            server: "http://127.0.0.1:7070".into(),
            endpoints: vec![
                json!({"metadata": {"name": "iris"}, "spec": {"traffic": {"blue": 100}},
                "status": {"provisioningState": "Succeeded", "scoringUri": "http://127.0.0.1:8080/endpoints/iris/score"}}),
            ],
            deployments: vec![json!({"metadata": {"name": "blue", "endpoint": "iris"},
                "status": {"provisioningState": "Succeeded", "available": {"reason": "Degraded"},
                    "instances": {"ready": 2, "starting": 1, "draining": 0, "failed": 0}}})],
            decisions: vec![
                json!({"time": "2026-10-10T12:00:05.000Z", "endpoint": "iris", "deployment": "blue",
                "from": 2, "wanted": 3, "granted": 3, "outcome": "applied", "decidedBy": "busy",
                "cause": {"kind": "rule", "name": "busy", "detail": "`busy`: 12.4 > 4"},
                "rules": [{"name": "busy", "verdict": "triggered", "because": "12.4 > 4"}]}),
            ],
            loads: BTreeMap::from([(
                "iris/blue".to_owned(),
                (0..8)
                    .map(|step| LoadPoint {
                        requests_per_second: f64::from(step) * 10.0,
                        concurrency: 2.0,
                        p99_ms: Some(12.5),
                        errors_per_second: 0.0,
                    })
                    .collect(),
            )]),
            error: None,
        }
    }

    #[test]
    fn one_frame_shows_endpoints_deployments_with_load_and_decisions() {
        let shown = render_text(&model());
        for expected in [
            "penstock top  http://127.0.0.1:7070  2026-10-10T12:00:10.000Z  2 instances ready",
            "blue 100%",
            "Degraded",
            "2 ready, 1 starting",
            "50.0",
            "12.5",
            "▁▁▂▃▅▆▇█",
            "5s ago",
            "2 -> 3",
            "`busy`: 12.4 > 4",
        ] {
            assert!(shown.contains(expected), "no `{expected}` in:\n{shown}");
        }
        assert!(
            !shown.contains("quit"),
            "a key hint in plain text:\n{shown}"
        );
    }

    #[test]
    fn a_small_or_an_empty_frame_is_drawn_too() {
        for (width, height) in [(1, 1), (20, 5), (300, 3)] {
            let area = Rect::new(0, 0, width, height);
            let mut buffer = Buffer::empty(area);
            for model in [model(), Model::default()] {
                View {
                    model: &model,
                    is_live: true,
                }
                .render(area, &mut buffer);
            }
        }
    }

    #[test]
    fn history_is_by_deployment_and_in_order_of_time() {
        let point = |of: &str, second: u32, rate: u32| {
            json!({"time": format!("2026-10-10T12:00:0{second}.000Z"), "endpoint": "iris",
                "deployment": of, "requestsPerSecond": rate})
        };
        let body =
            json!({"items": [point("blue", 2, 2), point("green", 1, 9), point("blue", 1, 1)]});
        let loads = loads(&body);
        let rates = |of: &str| -> Vec<f64> {
            loads[of]
                .iter()
                .map(|load| load.requests_per_second)
                .collect()
        };
        assert_eq!(rates("iris/blue"), [1.0, 2.0]);
        assert_eq!(rates("iris/green"), [9.0]);
    }
}
