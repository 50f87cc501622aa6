//! Output for people: tables, YAML, ages, shares. Plain text without borders or colours if standard
//! output is not a terminal.

use std::io::{IsTerminal, Write};

use comfy_table::{Attribute, Cell, ContentArrangement, Table as Grid, presets};
use contract::time::Timestamp;
use documents::to_yaml;
use serde_json::Value;

use super::error::CliError;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Table,
    /// The API's body, unchanged
    Json,
    /// The same as YAML
    Yaml,
}

/// The properties of standard output that commands depend on.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    pub tty: bool,
    pub now: Timestamp,
}

impl Screen {
    #[expect(
        clippy::disallowed_methods,
        reason = "the clock of the command line client"
    )]
    pub fn of_process() -> Self {
        Self {
            tty: std::io::stdout().is_terminal(),
            now: Timestamp::from(chrono::Utc::now()),
        }
    }
}

/// Writes to standard output. A closed pipe (`| head`) ends the command without an error message.
pub fn print(text: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    let newline = if text.is_empty() || text.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    let written = out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(newline.as_bytes()))
        .and_then(|()| out.flush());
    match written {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Err(CliError::Quiet(0)),
        Err(error) => Err(
            CliError::Failed(format!("standard output cannot be written: {error}"))
                .caused_by(error),
        ),
    }
}

/// Writes a notice to standard error, where it does not mix with the result.
pub fn print_notice(text: &str) {
    let mut err = std::io::stderr().lock();
    // If standard error is closed there is nobody to report to.
    let _ = writeln!(err, "{text}");
}

/// Rows under a header.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub header: Vec<&'static str>,
    pub rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(header: &[&'static str]) -> Self {
        Self {
            header: header.to_vec(),
            rows: Vec::new(),
        }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn render(&self, tty: bool) -> String {
        let mut grid = Grid::new();
        grid.load_style(presets::NOTHING);
        let arrangement = if tty {
            ContentArrangement::Dynamic
        } else {
            ContentArrangement::Disabled
        };
        grid.set_content_arrangement(arrangement);
        if !tty {
            grid.force_no_tty();
        }
        let bold = |text: &&str| {
            if tty {
                Cell::new(text).add_attribute(Attribute::Bold)
            } else {
                Cell::new(text)
            }
        };
        grid.set_header(self.header.iter().map(bold).collect::<Vec<_>>());
        for row in &self.rows {
            let cells = row
                .iter()
                .map(|cell| if cell.is_empty() { "-" } else { cell });
            grid.add_row(cells.collect::<Vec<_>>());
        }
        for column in grid.column_iter_mut() {
            column.set_padding((0, 2));
        }
        let lines: Vec<String> = grid
            .lines()
            .map(|line| line.trim_end().to_owned())
            .collect();
        lines.join("\n") + "\n"
    }
}

/// The text at a JSON Pointer; empty if there is none.
pub fn text(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    }
}

/// The items of a list body, or the body itself as the only item.
pub fn items(body: &Value) -> Vec<Value> {
    match body.get("items") {
        Some(Value::Array(items)) => items.clone(),
        _ => vec![body.clone()],
    }
}

/// `{"blue": 90, "green": 10}` as `blue 90%, green 10%`.
pub fn shares(value: Option<&Value>) -> String {
    let Some(Value::Object(shares)) = value else {
        return String::new();
    };
    let each = shares
        .iter()
        .map(|(name, share)| format!("{name} {share}%"));
    each.collect::<Vec<_>>().join(", ")
}

/// Time since an RFC 3339 instant, in the largest useful unit: `45s`, `12m`, `3h`, `8d`.
pub fn age(instant: &str, now: Timestamp) -> String {
    let Ok(instant) = instant.parse::<Timestamp>() else {
        return String::new();
    };
    let seconds = now.since(instant).secs();
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// JSON as a YAML document, with the order of members kept.
pub fn yaml(value: &Value) -> String {
    to_yaml(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_that_is_not_for_a_terminal_is_plain_text_in_columns() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["iris".into(), "Succeeded".into()]);
        table.row(vec!["a-longer-name".into(), String::new()]);
        assert_eq!(
            table.render(false),
            "NAME           STATE\niris           Succeeded\na-longer-name  -\n"
        );
    }

    #[test]
    fn ages_are_in_the_largest_useful_unit() {
        let now: Timestamp = "2026-10-10T12:00:00.000Z".parse().unwrap();
        for (instant, expected) in [
            ("2026-10-10T11:59:15.000Z", "45s"),
            ("2026-10-10T11:48:00.000Z", "12m"),
            ("2026-10-10T09:00:00.000Z", "3h"),
            ("2026-10-02T12:00:00.000Z", "8d"),
            ("2026-10-10T12:00:05.000Z", "0s"),
            ("", ""),
        ] {
            assert_eq!(age(instant, now), expected);
        }
    }

    #[test]
    fn yaml_keeps_texts_that_look_like_numbers_as_texts() {
        let text = yaml(&json!({"env": {"LEVEL": "2"}, "instances": 3, "list": ["a", true]}));
        assert!(text.contains("LEVEL: \"2\""), "{text}");
        assert!(text.contains("instances: 3"), "{text}");
        assert!(!text.starts_with("---"), "{text}");
    }
}
