//! Diagnoses why no broker answers. A failed request reports little more than "transport failure";
//! librdkafka gives the details separately, and only to producers. So an idle producer connects
//! once more, and the messages it logs are turned into a sentence that says what to do.
//!
//! Invariant: the text comes from the broker and from librdkafka, neither of which repeats
//! passwords.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, DeliveryResult, ProducerContext};

use super::{KafkaConfig, LogContext, lock};

/// How long the probe waits for messages.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
const POLL_TIMEOUT: Duration = Duration::from_millis(50);

/// The most characters shown of a message from a broker or librdkafka.
const MESSAGE_CHARS_MAX: usize = 300;

/// Why a request failed, as a sentence.
pub(super) enum Diagnosis {
    /// The broker or this client rejects the connection, and only an operator can change that.
    Refused(String),
    Unreachable(String),
}

/// Diagnoses a failed request. Blocks while it connects.
pub(super) fn diagnose(config: &KafkaConfig, error: &KafkaError) -> Diagnosis {
    let context = probe(config);
    match context.refusal {
        Some(refusal) => Diagnosis::Refused(refusal),
        None => {
            let why = context.last_message.unwrap_or_else(|| error.to_string());
            Diagnosis::Unreachable(format!("no broker answers ({why})"))
        }
    }
}

/// Like [`diagnose`], where the kind of failure does not matter.
pub(super) fn describe(config: &KafkaConfig, error: &KafkaError) -> String {
    match diagnose(config, error) {
        Diagnosis::Refused(why) | Diagnosis::Unreachable(why) => why,
    }
}

fn probe(config: &KafkaConfig) -> Findings {
    let context = ProbeContext::default();
    lock(&context.0).is_encrypted = config.is_encrypted();
    let mut client = config.client("reason");
    // librdkafka logs a connection closed by the peer only at this level.
    client.set_log_level(RDKafkaLogLevel::Info);
    let producer: Result<BaseProducer<ProbeContext>, _> =
        BaseProducer::from_config_and_context(&client, context.clone());
    let Ok(producer) = producer else {
        return Findings::default();
    };
    let started = Instant::now();
    while started.elapsed() < PROBE_TIMEOUT {
        producer.poll(POLL_TIMEOUT);
        let context = lock(&context.0);
        if context.refusal.is_some() || context.is_exhausted {
            break;
        }
    }
    lock(&context.0).clone()
}

#[derive(Clone, Default)]
struct Findings {
    refusal: Option<String>,
    last_message: Option<String>,
    /// The client uses TLS.
    is_encrypted: bool,
    /// Every broker has been tried.
    is_exhausted: bool,
}

#[derive(Clone, Default)]
struct ProbeContext(Arc<Mutex<Findings>>);

impl ProbeContext {
    fn record(&self, reason: &str) {
        let mut findings = lock(&self.0);
        findings.last_message = Some(trimmed(reason));
        if findings.refusal.is_none() {
            findings.refusal = refusal(reason, findings.is_encrypted);
        }
    }
}

impl ClientContext for ProbeContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        if facility == "FAIL" {
            self.record(message);
        }
        LogContext.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => lock(&self.0).is_exhausted = true,
            _ => self.record(reason),
        }
        LogContext.error(error, reason);
    }
}

impl ProducerContext for ProbeContext {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

/// Message patterns of librdkafka, with advice; the first match applies.
const REFUSALS: &[(&str, &str)] = &[
    (
        "Unsupported SASL mechanism",
        "the broker does not support this SASL mechanism; choose another with sasl= in --bus",
    ),
    (
        "mechanism handshake failed",
        "the broker does not support this SASL mechanism; choose another with sasl= in --bus",
    ),
    (
        "SASL authentication error",
        "the broker rejects the user or the password; check what user= and password= in --bus refer to, and sasl=",
    ),
    (
        "Authentication failed",
        "the broker rejects the user or the password; check what user= and password= in --bus refer to, and sasl=",
    ),
    (
        "mismatch",
        "the broker's certificate is for another host name; use the name in the certificate in --bus, and as the broker's advertised listener",
    ),
    (
        "certificate verify failed",
        "the broker's certificate is not signed by a trusted authority; set the authority's file with ca= in --bus",
    ),
    (
        "connecting to a PLAINTEXT broker listener",
        "the broker does not speak TLS on this port; remove tls= and ca= from --bus, or use its TLS port",
    ),
    (
        "SSL handshake failed",
        "the TLS handshake with the broker failed; if it requires a client certificate, set one with cert= and key= in --bus",
    ),
    (
        "might require SASL authentication",
        "the broker closes the connection: it probably requires a password; set one with sasl=, user= and password= in --bus",
    ),
    (
        "might be caused by broker version",
        "the broker closes the connection after the TLS handshake; if it requires a client certificate, set one with cert= and key= in --bus",
    ),
    (
        "alert bad certificate",
        "the broker rejects the client certificate, or requires one; set it with cert= and key= in --bus",
    ),
    (
        "alert certificate required",
        "the broker requires a client certificate; set one with cert= and key= in --bus",
    ),
    (
        // A TLS alert, parsed as a length.
        "Invalid frame size",
        "the broker does not answer with the Kafka protocol: this is probably a TLS port; add tls=on, or ca=, to --bus, and sasl= if it requires a password",
    ),
];

/// Logged when a broker that expects TLS is contacted in plaintext. A broker that is shutting down
/// causes it too, but only briefly.
const CLOSED_DURING_API_QUERY: &str = "in state APIVERSION_QUERY";

const TLS_EXPECTED: &str = "the broker closes the connection at once, so this is probably a TLS port; add tls=on, or ca=, to --bus, and sasl= if it requires a password";

fn refusal(message: &str, is_encrypted: bool) -> Option<String> {
    let known = REFUSALS
        .iter()
        .find(|(pattern, _)| message.contains(pattern));
    let sentence = match known {
        Some((_, sentence)) => sentence,
        None if !is_encrypted && message.contains(CLOSED_DURING_API_QUERY) => TLS_EXPECTED,
        None => return None,
    };
    Some(format!("{sentence} ({})", trimmed(message)))
}

/// Strips the thread name and the address, which the surrounding sentence has.
fn trimmed(message: &str) -> String {
    let message = match message.strip_prefix("[thrd:") {
        Some(rest) => rest.split_once("]: ").map_or(rest, |(_, rest)| rest),
        None => message,
    };
    let text = match message.split_once(": ") {
        Some((address, rest)) if address.contains('/') => rest,
        _ => message,
    };
    text.chars().take(MESSAGE_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_distinguished_from_an_unreachable_broker() {
        let away = "a:1/bootstrap: Connect to ipv4#127.0.0.1:1 failed: Connection refused";
        assert_eq!(refusal(away, false), None);
        let sentence = refusal(
            "sasl_ssl://a:1/bootstrap: SASL authentication error: Authentication failed (after 5ms)",
            true,
        );
        let sentence = sentence.unwrap();
        let message = "(SASL authentication error: Authentication failed (after 5ms))";
        assert!(sentence.ends_with(message), "{sentence}");
    }

    #[test]
    fn a_connection_closed_at_once_suggests_tls_only_without_tls() {
        let closed = "a:1/bootstrap: Disconnected: connection closed by peer: receive 0 after POLLIN \
             (after 1ms in state APIVERSION_QUERY)";
        assert!(refusal(closed, false).unwrap().contains("add tls=on"));
        assert_eq!(refusal(closed, true), None);
    }
}
