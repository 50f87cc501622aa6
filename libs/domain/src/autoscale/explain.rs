//! Explains a decision to a person: a short narrative, then rules and stages as plain-text tables.

use std::fmt::Write;

use contract::decision::{Decision, Evidence, LastChange, Verdict};
use contract::resources::Direction;

use super::cause;
pub use super::cause::sentence;
use super::describe::{self, instances};

/// Returns the full explanation, ending in a newline.
pub fn text(decision: &Decision) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{}", headline(decision));
    let _ = writeln!(text, "{}", reason(decision));
    let _ = writeln!(text);
    for (name, value) in facts(decision) {
        let _ = writeln!(text, "{name:<12} {value}");
    }
    if !decision.rules.is_empty() {
        text.push_str("\nRules\n");
        text.push_str(&rules(decision));
    }
    if !decision.stages.is_empty() {
        text.push_str("\nStages\n");
        text.push_str(&stages(decision));
    }
    text
}

fn headline(decision: &Decision) -> String {
    let change = match decision.from.cmp(&decision.granted) {
        std::cmp::Ordering::Equal => format!("stays at {}", instances(decision.granted)),
        std::cmp::Ordering::Less => {
            format!(
                "grows from {} to {}",
                decision.from,
                instances(decision.granted)
            )
        }
        std::cmp::Ordering::Greater => {
            format!(
                "shrinks from {} to {}",
                decision.from,
                instances(decision.granted)
            )
        }
    };
    format!("{} {change} at {}.", decision.deployment, decision.at)
}

/// What changed the count or keeps it, as one sentence.
fn reason(decision: &Decision) -> String {
    let sentence = cause::sentence(decision);
    let mut rest = sentence.chars();
    let first = rest.next().map(|first| first.to_uppercase().to_string());
    format!("{}{}.", first.unwrap_or_default(), rest.as_str())
}

fn facts(decision: &Decision) -> Vec<(&'static str, String)> {
    let inputs = &decision.inputs;
    let mut facts = Vec::new();
    if let Some(profile) = decision.stages.iter().find(|stage| stage.name == "profile") {
        facts.push(("profile", profile.detail.clone()));
    }
    let counts = inputs.instances;
    facts.push((
        "instances",
        format!("{} ready, {} pending", counts.ready, counts.pending),
    ));
    if let Some(failed) = &inputs.failed_starts {
        facts.push(("starts", describe::starts(failed)));
    }
    let change = |change: &LastChange| {
        let by = change
            .rule
            .as_deref()
            .map_or(String::new(), |rule| format!(" by `{rule}`"));
        let ago = decision.at.since(change.at);
        format!("{}{by}, {} s before", change.at, ago.secs())
    };
    if let Some(last) = &inputs.carried.last_out {
        facts.push(("last out", change(last)));
    }
    if let Some(last) = &inputs.carried.last_in {
        facts.push(("last in", change(last)));
    }
    if inputs.policy.is_some() {
        facts.push(("policy", format!("revision {}", inputs.policy_revision)));
    }
    facts.push((
        "engine",
        format!("{} {}", decision.engine, decision.engine_version),
    ));
    facts
}

fn rules(decision: &Decision) -> String {
    let header = [
        "rule",
        "direction",
        "verdict",
        "wants",
        "evidence",
        "because",
    ];
    let mut rows = vec![header.map(String::from)];
    for rule in &decision.rules {
        let direction = match rule.direction {
            Some(Direction::Out) => "out",
            Some(Direction::In) => "in",
            None => "both",
        };
        let verdict = match rule.verdict {
            Verdict::Triggered => "triggered",
            Verdict::NotTriggered => "not triggered",
            Verdict::Unknown => "unknown",
            Verdict::Suppressed => "suppressed",
        };
        let wanted = rule.wanted.map_or("-".into(), |count| count.to_string());
        rows.push([
            rule.name.clone(),
            direction.into(),
            verdict.into(),
            wanted,
            rule.evidence.as_ref().map_or("-".into(), evidence),
            rule.because.clone(),
        ]);
    }
    table(&rows)
}

/// `65 answered, 1335 refused, 3 ready`.
fn evidence(evidence: &Evidence) -> String {
    let mut parts = Vec::new();
    if let Some(answered) = evidence.answered {
        parts.push(format!("{answered} answered"));
    }
    if evidence.refused > 0 {
        parts.push(format!("{} refused", evidence.refused));
    }
    if let Some(measured) = evidence.measured {
        let measured = format!("{measured:.1}");
        let measured = measured.trim_end_matches(".0");
        parts.push(format!("{measured} measured"));
    }
    parts.push(format!("{} ready", evidence.ready));
    parts.join(", ")
}

fn stages(decision: &Decision) -> String {
    let mut rows = vec![["stage", "before", "after", "detail"].map(String::from)];
    for stage in &decision.stages {
        rows.push([
            stage.name.clone(),
            stage.before.to_string(),
            stage.after.to_string(),
            stage.detail.clone(),
        ]);
    }
    table(&rows)
}

/// Formats a table with columns as wide as their widest cell, except for the last.
fn table<const COLUMNS: usize>(rows: &[[String; COLUMNS]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: [usize; COLUMNS] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let mut line = String::from("  ");
        for (cell, width) in row.iter().zip(widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}
