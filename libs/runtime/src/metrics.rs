//! The metrics behind `/metrics`, shared by all services of a process.

use std::collections::BTreeMap;
use std::panic::Location;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::{HeaderMap, header};
use prometheus_client::encoding::text::{encode_eof, encode_registry};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

/// Registries by the code location that registered them.
type Registries = BTreeMap<(&'static str, u32), Registry>;

/// The metrics of a process, registered by its services and exposed at `/metrics`. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics {
    registries: Arc<Mutex<Registries>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let metrics = Self {
            registries: Arc::default(),
        };
        metrics.register(|registry| {
            let labels = [("version".into(), env!("CARGO_PKG_VERSION").into())];
            registry
                .sub_registry_with_labels(labels.into_iter())
                .register(
                    "penstock_build_info",
                    "The version of this process",
                    ConstGauge::new(1i64),
                );
        });
        #[cfg(feature = "log")]
        metrics.register(|registry| {
            registry.register(
                "penstock_parked_endpoints",
                "Endpoints that a consumer has parked because it cannot process one of their events",
                crate::parking::PARKED_ENDPOINTS.clone(),
            );
            registry.register(
                "penstock_unprocessed_events",
                "Events that belong to no endpoint and that a consumer has skipped because it cannot process them",
                crate::parking::UNPROCESSED_EVENTS.clone(),
            );
        });
        metrics
    }
}

impl Metrics {
    /// Registers metrics; names are written in full, with `penstock_` and the unit. A restarted
    /// service registers from the same location, and its new metrics replace the old ones.
    #[track_caller]
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        let location = Location::caller();
        let mut registry = Registry::default();
        add(&mut registry);
        self.registries()
            .insert((location.file(), location.line()), registry);
    }

    /// Encodes all metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        for registry in self.registries().values() {
            if let Err(error) = encode_registry(&mut text, registry) {
                tracing::error!(%error, "failed to encode some metrics");
            }
        }
        // Writing to a string does not fail.
        let _ = encode_eof(&mut text);
        text
    }

    /// Encodes all metrics in the format that the `Accept` of a request prefers: returns the content type, and
    /// the text.
    pub fn encode_for(&self, headers: &HeaderMap) -> (&'static str, String) {
        let format = Format::accepted(headers);
        let text = self.encode();
        match format {
            Format::OpenMetrics => (OPEN_METRICS, text),
            Format::Text => (TEXT, to_text_format(&text)),
        }
    }

    fn registries(&self) -> MutexGuard<'_, Registries> {
        self.registries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The content type of OpenMetrics text.
pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// The content type of the text format of Prometheus.
pub const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    OpenMetrics,
    /// The text format 0.0.4 of Prometheus, which every scraper reads.
    Text,
}

impl Format {
    /// The format with the higher quality in `Accept`; [`Format::Text`] unless OpenMetrics is asked for by name.
    fn accepted(headers: &HeaderMap) -> Self {
        let values = headers.get_all(header::ACCEPT).into_iter();
        let ranges: Vec<MediaRange> = values
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(MediaRange::parse)
            .collect();
        let open_metrics = quality(
            &ranges,
            "application",
            "openmetrics-text",
            &["1.0.0", "0.0.1"],
        );
        let text = quality(&ranges, "text", "plain", &["0.0.4"]);
        let is_named = open_metrics.is_some_and(|(specificity, _)| specificity == NAMED);
        let milli = |found: Option<(u8, u16)>| found.map_or(0, |(_, milli)| milli);
        match is_named && milli(open_metrics) > 0 && milli(open_metrics) >= milli(text) {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }
}

/// The specificity of a range that names type and subtype.
const NAMED: u8 = 2;

/// The most specific range that includes the type in one of these versions: its specificity and quality.
fn quality(ranges: &[MediaRange], main: &str, sub: &str, versions: &[&str]) -> Option<(u8, u16)> {
    let matching = ranges.iter().filter_map(|range| {
        let specificity = range.specificity(main, sub)?;
        let is_known = range
            .version
            .is_none_or(|version| versions.contains(&version));
        is_known.then_some((specificity, range.milli))
    });
    matching.max()
}

/// An element of `Accept`.
struct MediaRange<'a> {
    main: &'a str,
    sub: &'a str,
    version: Option<&'a str>,
    /// The quality in thousandths.
    milli: u16,
}

impl<'a> MediaRange<'a> {
    /// None for what is no media range.
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let (main, sub) = parts.next()?.split_once('/')?;
        let mut range = Self {
            main,
            sub,
            version: None,
            milli: 1000,
        };
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            match name.trim() {
                name if name.eq_ignore_ascii_case("q") => {
                    let quality: f64 = value.trim().parse().ok()?;
                    range.milli = (quality.clamp(0.0, 1.0) * 1000.0).round() as u16;
                }
                name if name.eq_ignore_ascii_case("version") => {
                    range.version = Some(value.trim().trim_matches('"'));
                }
                _ => {}
            }
        }
        Some(range)
    }

    /// How specifically the range includes a type; None if it does not.
    fn specificity(&self, main: &str, sub: &str) -> Option<u8> {
        let is_main = self.main.eq_ignore_ascii_case(main);
        match (self.main, self.sub) {
            ("*", "*") => Some(0),
            (_, "*") if is_main => Some(1),
            (_, own) if is_main && own.eq_ignore_ascii_case(sub) => Some(NAMED),
            _ => None,
        }
    }
}

/// Converts OpenMetrics text to the format 0.0.4: there, the metadata of a counter name its samples (`_total`),
/// and units and the end are not marked.
fn to_text_format(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line
            .strip_prefix("# TYPE ")
            .and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                kind => ("", kind),
            };
            if let Some((_, help)) = help.take().filter(|(of, _)| *of == name) {
                text.extend(["# HELP ", name, suffix, " ", help, "\n"]);
            }
            text.extend(["# TYPE ", name, suffix, " ", kind, "\n"]);
        } else if !line.starts_with('#') {
            text.extend([line, "\n"]);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::counter::Counter;

    use super::*;

    #[test]
    fn a_restarted_service_replaces_its_metrics() {
        let metrics = Metrics::default();
        for _ in 0..2 {
            metrics.register(|registry| {
                registry.register("penstock_tests", "Tests", Counter::<u64>::default());
            });
        }
        let text = metrics.encode();
        assert_eq!(text.matches("penstock_tests_total 0").count(), 1, "{text}");
        assert_eq!(text.matches("# EOF").count(), 1, "{text}");
    }

    fn content_type_for(accept: &'static str) -> &'static str {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, http::HeaderValue::from_static(accept));
        Metrics::default().encode_for(&headers).0
    }

    #[test]
    fn the_format_is_the_one_that_the_scraper_prefers() {
        assert_eq!(Metrics::default().encode_for(&HeaderMap::new()).0, TEXT);
        for (accept, wanted) in [
            ("*/*", TEXT),
            ("text/plain", TEXT),
            ("application/*", TEXT),
            ("application/json", TEXT),
            ("application/openmetrics-text", OPEN_METRICS),
            (
                "Application/OpenMetrics-Text; Version=\"1.0.0\"",
                OPEN_METRICS,
            ),
            ("application/openmetrics-text;version=2.0.0", TEXT),
            // As Prometheus asks, with protocol buffers turned on.
            (
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
                OPEN_METRICS,
            ),
            ("application/openmetrics-text;q=0.3, text/plain;q=0.7", TEXT),
            ("application/openmetrics-text;q=0, */*;q=0.1", TEXT),
            (
                "text/plain;q=0, application/openmetrics-text;q=0.001",
                OPEN_METRICS,
            ),
        ] {
            assert_eq!(content_type_for(accept), wanted, "{accept}");
        }
    }

    #[test]
    fn in_the_text_format_metadata_name_the_samples() {
        let metrics = Metrics::default();
        metrics.register(|registry| {
            registry.register("penstock_tests", "Tests, # 1", Counter::<u64>::default());
        });
        let (_, text) = metrics.encode_for(&HeaderMap::new());
        let counter = "# HELP penstock_tests_total Tests, # 1.\n# TYPE penstock_tests_total counter\npenstock_tests_total 0\n";
        assert!(text.contains(counter), "{text}");
        assert!(
            text.contains("# TYPE penstock_build_info gauge\n"),
            "{text}"
        );
        assert!(!text.contains("# EOF"), "{text}");
    }
}
