//! What was measured, as a table and in files.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::Options;

/// One line of what is printed: events per second of each round, and what they are held against.
pub struct Line {
    pub what: String,
    pub ours: Vec<f64>,
    pub against: Against,
}

pub enum Against {
    /// The limit of the engine in the same rounds, and how much of it must be reached.
    Plain { plain: Vec<f64>, bar: f64 },
    /// Events per second.
    Bar(f64),
}

impl Line {
    fn ratios(&self) -> Vec<f64> {
        match &self.against {
            Against::Plain { plain, .. } => {
                let rounds = self.ours.iter().zip(plain);
                rounds.map(|(ours, plain)| ours / plain).collect()
            }
            Against::Bar(bar) => self.ours.iter().map(|ours| ours / bar).collect(),
        }
    }

    pub fn holds(&self) -> bool {
        let bar = match self.against {
            Against::Plain { bar, .. } => bar,
            Against::Bar(_) => 1.0,
        };
        median(&self.ratios()) >= bar
    }

    fn text(&self) -> String {
        let (plain, ratio, bar) = match &self.against {
            Against::Plain { plain, bar } => (
                format!("{:.0}", median(plain)),
                format!("{:.2}", median(&self.ratios())),
                format!("{bar:.2}"),
            ),
            Against::Bar(bar) => ("-".to_owned(), "-".to_owned(), format!("{bar:.0}")),
        };
        let verdict = if self.holds() { "holds" } else { "MISSED" };
        let ours = median(&self.ours);
        format!(
            "{:<58} {ours:>10.0} {plain:>10} {ratio:>8} {bar:>8}  {verdict}",
            self.what
        )
    }

    fn json(&self) -> Value {
        let mut line = json!({"what": self.what, "ours": self.ours, "median": median(&self.ours)});
        match &self.against {
            Against::Plain { plain, bar } => {
                line["plain"] = json!(plain);
                line["ratio"] = json!(median(&self.ratios()));
                line["bar"] = json!(bar);
            }
            Against::Bar(bar) => line["bar"] = json!(bar),
        }
        line["holds"] = json!(self.holds());
        line
    }
}

fn median(of: &[f64]) -> f64 {
    let mut of = of.to_vec();
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// Prints it, and writes it down.
pub fn show(lines: &[Line], options: &Options, out: &Path) {
    let head = format!(
        "{:<58} {:>10} {:>10} {:>8} {:>8}",
        "events/s, medians", "store", "plain", "ratio", "bar"
    );
    let texts = lines.iter().map(Line::text);
    let table: Vec<String> = std::iter::once(head).chain(texts).collect();
    let table = table.join("\n") + "\n";
    println!("\n{table}");
    let lines: Vec<Value> = lines.iter().map(Line::json).collect();
    let document = json!({"about": about(options), "lines": lines});
    let document = serde_json::to_string_pretty(&document).unwrap() + "\n";
    std::fs::create_dir_all(out).unwrap();
    std::fs::write(out.join("table.txt"), table).unwrap();
    std::fs::write(out.join("results.json"), document).unwrap();
}

fn about(options: &Options) -> Value {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let cpu = cpu.map(|rest| rest.trim_start_matches([' ', '\t', ':']));
    json!({
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "kernel": said_by("uname", &["-r"]),
        "commit": said_by("git", &["rev-parse", "HEAD"]),
        "events": options.events,
        "backlog": options.backlog,
        "replay": options.replay,
    })
}

fn said_by(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

pub fn beside_this_file(name: &str) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/log");
    Path::new(root).join(name)
}
