//! Results as a table and in files.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::Options;

/// A row of the results: events per second of each round, and the bar.
pub struct Measurement {
    pub what: String,
    pub ours: Vec<f64>,
    pub against: Bar,
}

pub enum Bar {
    /// The engine's limit in the same rounds, and the required ratio.
    Relative { plain: Vec<f64>, bar: f64 },
    /// Events per second.
    Absolute(f64),
}

impl Measurement {
    fn ratios(&self) -> Vec<f64> {
        match &self.against {
            Bar::Relative { plain, .. } => {
                let rounds = self.ours.iter().zip(plain);
                rounds.map(|(ours, plain)| ours / plain).collect()
            }
            Bar::Absolute(bar) => self.ours.iter().map(|ours| ours / bar).collect(),
        }
    }

    pub fn is_met(&self) -> bool {
        let bar = match self.against {
            Bar::Relative { bar, .. } => bar,
            Bar::Absolute(_) => 1.0,
        };
        median(&self.ratios()) >= bar
    }

    fn text(&self) -> String {
        let (plain, ratio, bar) = match &self.against {
            Bar::Relative { plain, bar } => (
                format!("{:.0}", median(plain)),
                format!("{:.2}", median(&self.ratios())),
                format!("{bar:.2}"),
            ),
            Bar::Absolute(bar) => ("-".to_owned(), "-".to_owned(), format!("{bar:.0}")),
        };
        let verdict = if self.is_met() { "holds" } else { "MISSED" };
        let ours = median(&self.ours);
        format!(
            "{:<58} {ours:>10.0} {plain:>10} {ratio:>8} {bar:>8}  {verdict}",
            self.what
        )
    }

    fn json(&self) -> Value {
        let mut line = json!({"what": self.what, "ours": self.ours, "median": median(&self.ours)});
        match &self.against {
            Bar::Relative { plain, bar } => {
                line["plain"] = json!(plain);
                line["ratio"] = json!(median(&self.ratios()));
                line["bar"] = json!(bar);
            }
            Bar::Absolute(bar) => line["bar"] = json!(bar),
        }
        line["holds"] = json!(self.is_met());
        line
    }
}

fn median(of: &[f64]) -> f64 {
    let mut of = of.to_vec();
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// Prints the results and writes them to files.
pub fn show(lines: &[Measurement], options: &Options, out: &Path) {
    let head = format!(
        "{:<58} {:>10} {:>10} {:>8} {:>8}",
        "events/s, medians", "store", "plain", "ratio", "bar"
    );
    let texts = lines.iter().map(Measurement::text);
    let table: Vec<String> = std::iter::once(head).chain(texts).collect();
    let table = table.join("\n") + "\n";
    println!("\n{table}");
    let lines: Vec<Value> = lines.iter().map(Measurement::json).collect();
    let document = json!({"about": environment(options), "lines": lines});
    let document = serde_json::to_string_pretty(&document).unwrap() + "\n";
    std::fs::create_dir_all(out).unwrap();
    std::fs::write(out.join("table.txt"), table).unwrap();
    std::fs::write(out.join("results.json"), document).unwrap();
}

fn environment(options: &Options) -> Value {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let cpu = cpu.map(|rest| rest.trim_start_matches([' ', '\t', ':']));
    json!({
        "cpu": cpu,
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "kernel": output_of("uname", &["-r"]),
        "commit": output_of("git", &["rev-parse", "HEAD"]),
        "events": options.events,
        "backlog": options.backlog,
        "replay": options.replay,
    })
}

fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

pub fn results_file(name: &str) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/log");
    Path::new(root).join(name)
}
