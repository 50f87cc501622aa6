//! A decision for a person: a short narrative, then rules and stages as tables of plain text.

use contract::decision::Decision;

pub fn text(decision: &Decision) -> String {
    format!(
        "{}: {} -> {}\n",
        decision.deployment, decision.from, decision.granted
    )
}
