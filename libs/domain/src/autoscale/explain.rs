//! Explains a decision to a person: a short narrative, then rules and stages as plain-text tables.

use std::fmt::Write;

use contract::decision::{Decision, DecisionOutcome, LastChange, Verdict};
use contract::resources::Direction;

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

fn instances(count: u32) -> String {
    let noun = if count == 1 { "instance" } else { "instances" };
    format!("{count} {noun}")
}

fn reason(decision: &Decision) -> String {
    let rule = decision
        .decided_by
        .as_deref()
        .map(|name| format!("`{name}`"));
    let by = |text: &str| match &rule {
        Some(rule) => format!("{rule} {text}"),
        None => format!("The policy {text}"),
    };
    let last_stage = |name: &str| {
        let stage = decision.stages.iter().rfind(|stage| stage.name == name);
        stage.map_or(String::new(), |stage| format!(": {}", stage.detail))
    };
    match decision.outcome {
        DecisionOutcome::Applied => match &rule {
            Some(rule) => format!("{rule} decided{}.", because(decision)),
            None => format!("No rule decided{}.", applied_without_rule(decision)),
        },
        DecisionOutcome::Steady => "Nothing asks for another count.".into(),
        DecisionOutcome::HeldByCooldown => {
            format!(
                "{}{}.",
                by("would change it, but a cooldown holds"),
                last_stage("cooldown")
            )
        }
        DecisionOutcome::HeldByStabilization => format!(
            "{}{}.",
            by("would change it, but not for long enough yet"),
            last_stage("stabilization")
        ),
        DecisionOutcome::HeldByRefusals => {
            format!("{}{}.", by("would scale in"), last_stage("refusals"))
        }
        DecisionOutcome::HeldByProjection => {
            format!("{}{}.", by("would scale in"), last_stage("projection"))
        }
        DecisionOutcome::HeldByPause => format!("Scaling is paused{}.", last_stage("pause")),
        DecisionOutcome::Clamped => {
            format!(
                "{}{}.",
                by(
                    if wanted_by_rule(decision).is_some_and(|wanted| wanted < decision.granted) {
                        "asks for fewer than the minimum"
                    } else {
                        "asks for more than the maximum"
                    }
                ),
                because(decision)
            )
        }
        DecisionOutcome::Unknown => format!(
            "Some data is incomplete, so nothing scales in{}.",
            unknown(decision)
        ),
        DecisionOutcome::Pinned => format!("A person decided{}.", last_stage("pin")),
        DecisionOutcome::Fixed => "No Autoscale applies: the deployment's own count stands.".into(),
        DecisionOutcome::Shadow => format!(
            "A policy in shadow mode would have {}; the deployment's own count stands.",
            instances(decision.wanted)
        ),
    }
}

/// The count that the deciding rule asked for.
fn wanted_by_rule(decision: &Decision) -> Option<u32> {
    let name = decision.decided_by.as_ref()?;
    decision
        .rules
        .iter()
        .find(|rule| rule.name == *name)?
        .wanted
}

fn because(decision: &Decision) -> String {
    let rule = decision
        .rules
        .iter()
        .find(|rule| Some(&rule.name) == decision.decided_by.as_ref());
    rule.map_or(String::new(), |rule| format!(": {}", rule.because))
}

/// The detail of the first stage that changed the count.
fn applied_without_rule(decision: &Decision) -> String {
    let stage = decision
        .stages
        .iter()
        .find(|stage| stage.before != stage.after);
    stage.map_or(String::new(), |stage| format!(": {}", stage.detail))
}

fn unknown(decision: &Decision) -> String {
    let rule = decision
        .rules
        .iter()
        .find(|rule| rule.verdict == Verdict::Unknown);
    rule.map_or(String::new(), |rule| {
        format!(": `{}`, {}", rule.name, rule.because)
    })
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
    let mut rows = vec![["rule", "direction", "verdict", "wants", "because"].map(String::from)];
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
            rule.because.clone(),
        ]);
    }
    table(&rows)
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
