//! Reads what the windows of a deployment's rules need: its panes and instances, and which seconds of its
//! bucket were measured.

use std::collections::BTreeMap;

use contract::frame::SourceKind;
use contract::ids::{EndpointKey, Name};
use contract::time::Timestamp;
use domain::measure::{InstanceReport, Load, MeasuredSpan, Past, PastOfKind};
use store::sql::Connection;

use super::read::read_coverage;
use super::sql::Sql;
use crate::panes::Pane;

/// Selects the measurements of a deployment.
#[derive(Clone, Debug)]
pub struct PastQuery {
    pub endpoint: EndpointKey,
    pub deployment: Name,
    /// When the deployment was created: what is older is of another incarnation of its name.
    pub created_at: Timestamp,
    /// The first second.
    pub from: Timestamp,
}

/// Length of a second of which only the end is known, in microseconds.
const USUAL_LENGTH_US: u64 = 1_000_000;

pub(super) async fn read(reader: &mut Connection<'_>, query: &PastQuery) -> sqlx::Result<Past> {
    let from = query.from.secs();
    // Nothing was measured before the deployment existed, and in the second of its creation.
    let own_from = from.max(query.created_at.secs() + 1);
    let mut kinds = read_measured(reader, query).await?;
    for kind in [SourceKind::GATEWAY, SourceKind::NODE] {
        kinds.entry(kind).or_default();
    }
    for (kind, past) in &mut kinds {
        past.from = from;
        past.known.push_back(from, own_from);
        match *kind == SourceKind::GATEWAY {
            true => read_requests(reader, query, own_from, past).await?,
            false => read_instances(reader, query, own_from, past).await?,
        }
    }
    Ok(Past { kinds })
}

type MeasuredRow = (String, i64, i64, i64, i64);

async fn read_measured(
    reader: &mut Connection<'_>,
    query: &PastQuery,
) -> sqlx::Result<BTreeMap<SourceKind, PastOfKind>> {
    let (bucket, from) = (query.endpoint.bucket(), query.from.secs());
    let rows: Vec<MeasuredRow> = Sql::new(
        "SELECT kind, start, \"end\", partial, length_us FROM history_measured \
         WHERE bucket = $1 AND \"end\" > $2 ORDER BY start",
    )
    .with([i64::from(bucket.0).into(), from.into()])
    .fetch(reader)
    .await?;
    let mut kinds: BTreeMap<SourceKind, PastOfKind> = BTreeMap::new();
    for (kind, start, end, partial, length_us) in rows {
        let kind: SourceKind = kind
            .parse()
            .map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        let past = kinds.entry(kind).or_default();
        let seconds = u64::try_from(end - start).unwrap_or_default();
        push_span(
            &mut past.measured,
            MeasuredSpan {
                start: start.max(from),
                end,
                is_partial: partial != 0,
                length_us: (length_us as u64).checked_div(seconds).unwrap_or_default(),
            },
        );
    }
    let gateways = kinds.entry(SourceKind::GATEWAY).or_default();
    let first = gateways.measured.first().map(|span| span.start);
    // Releases that did not record what was measured recorded what every gateway had reported.
    let until = first.unwrap_or(i64::MAX);
    let covered = read_coverage(reader, bucket, from, until).await?;
    let earlier = covered.into_iter().map(|(start, end)| MeasuredSpan {
        start,
        end,
        is_partial: false,
        length_us: USUAL_LENGTH_US,
    });
    gateways.measured = earlier
        .chain(std::mem::take(&mut gateways.measured))
        .collect();
    Ok(kinds)
}

/// Adds the part of a span that those before it, which start earlier, do not have: late frames and a former
/// owner may have recorded a second again.
fn push_span(spans: &mut Vec<MeasuredSpan>, span: MeasuredSpan) {
    let end = spans.last().map_or(i64::MIN, |last| last.end);
    let start = span.start.max(end);
    if start < span.end {
        spans.push(MeasuredSpan { start, ..span });
    }
}

async fn read_requests(
    reader: &mut Connection<'_>,
    query: &PastQuery,
    from: i64,
    past: &mut PastOfKind,
) -> sqlx::Result<()> {
    for span in &past.measured {
        past.known.push_back(span.start, span.end);
    }
    let rows: Vec<(i64, String)> = Sql::new(
        "SELECT second, doc FROM history_panes \
         WHERE endpoint = $1 AND deployment = $2 AND second >= $3",
    )
    .with([
        query.endpoint.as_str().into(),
        query.deployment.as_str().into(),
        from.into(),
    ])
    .fetch(reader)
    .await?;
    for (second, doc) in rows {
        let pane: Pane =
            serde_json::from_str(&doc).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        pane.add_to(past.loads.entry(second).or_default());
    }
    Ok(())
}

async fn read_instances(
    reader: &mut Connection<'_>,
    query: &PastQuery,
    from: i64,
    past: &mut PastOfKind,
) -> sqlx::Result<()> {
    let rows: Vec<(i64, i64, String)> = Sql::new(
        "SELECT start, \"end\", doc FROM history_instances \
         WHERE endpoint = $1 AND deployment = $2 AND \"end\" > $3 ORDER BY start",
    )
    .with([
        query.endpoint.as_str().into(),
        query.deployment.as_str().into(),
        from.into(),
    ])
    .fetch(reader)
    .await?;
    // A former owner may have recorded the same seconds.
    let mut next = from;
    for (start, end, doc) in rows {
        let seconds: BTreeMap<i64, Vec<InstanceReport>> =
            serde_json::from_str(&doc).map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
        let start = start.max(next);
        past.known.push_back(start, end);
        past.instances
            .extend(seconds.into_iter().filter(|(second, _)| *second >= start));
        next = next.max(end);
    }
    Ok(())
}

impl Pane {
    /// Adds it to what rules read.
    fn add_to(self, load: &mut Load) {
        load.merge(&Load {
            outcomes: self.outcomes,
            arrivals: self.arrivals,
            in_flight_us: self.in_flight_us,
            queued_us: self.queued_us,
            oldest_in_flight_us: self.oldest_in_flight_us,
            latency: self.latency,
            definitions: Some(self.definitions.unwrap_or(0)),
            ..Load::default()
        });
    }
}
