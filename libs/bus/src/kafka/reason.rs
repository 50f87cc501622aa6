//! Why no broker talks to us. A request that failed tells little more than "transport failure"; what the
//! matter is, librdkafka says beside, and to producers only. So a producer that sends nothing connects
//! once more and listens, and what it hears becomes a sentence that says what to do.
//!
//! Invariant: what is said comes from the broker and from librdkafka, which repeat no passwords.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::config::{FromClientConfigAndContext, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, DeliveryResult, ProducerContext};

use super::{KafkaConfig, Quiet, lock};

/// How long is listened.
const PATIENCE: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(50);

/// Of what a broker or librdkafka says, no more is shown.
const SHOWN_MAX: usize = 300;

/// What to tell people about a request that failed.
pub(super) enum Reason {
    /// A broker or we refuse the connection, for what only people can change.
    Refused(String),
    Away(String),
}

/// Connects, and so takes a moment.
pub(super) fn of(config: &KafkaConfig, error: &KafkaError) -> Reason {
    let heard = listen(config);
    match heard.refusal {
        Some(refusal) => Reason::Refused(refusal),
        None => {
            let why = heard.last.unwrap_or_else(|| error.to_string());
            Reason::Away(format!("no broker answers ({why})"))
        }
    }
}

/// The same where it makes no difference.
pub(super) fn why(config: &KafkaConfig, error: &KafkaError) -> String {
    match of(config, error) {
        Reason::Refused(why) | Reason::Away(why) => why,
    }
}

fn listen(config: &KafkaConfig) -> Words {
    let heard = Heard::default();
    lock(&heard.0).is_encrypted = config.is_encrypted();
    let mut client = config.client("reason");
    // A connection that is closed by the other side is worth no more to it than this.
    client.set_log_level(RDKafkaLogLevel::Info);
    let producer: Result<BaseProducer<Heard>, _> =
        BaseProducer::from_config_and_context(&client, heard.clone());
    let Ok(producer) = producer else {
        return Words::default();
    };
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        producer.poll(POLL);
        let heard = lock(&heard.0);
        if heard.refusal.is_some() || heard.is_over {
            break;
        }
    }
    lock(&heard.0).clone()
}

#[derive(Clone, Default)]
struct Words {
    refusal: Option<String>,
    last: Option<String>,
    /// We speak TLS.
    is_encrypted: bool,
    /// Every broker has been tried.
    is_over: bool,
}

#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Words>>);

impl Heard {
    fn hear(&self, reason: &str) {
        let mut words = lock(&self.0);
        words.last = Some(shown(reason));
        if words.refusal.is_none() {
            words.refusal = refusal(reason, words.is_encrypted);
        }
    }
}

impl ClientContext for Heard {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        if facility == "FAIL" {
            self.hear(message);
        }
        Quiet.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            Some(RDKafkaErrorCode::AllBrokersDown) => lock(&self.0).is_over = true,
            _ => self.hear(reason),
        }
        Quiet.error(error, reason);
    }
}

impl ProducerContext for Heard {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

/// By what librdkafka says; the first that fits.
const REFUSALS: &[(&str, &str)] = &[
    (
        "Unsupported SASL mechanism",
        "the broker does not take this kind of password; choose another with sasl= in --bus",
    ),
    (
        "mechanism handshake failed",
        "the broker does not take this kind of password; choose another with sasl= in --bus",
    ),
    (
        "SASL authentication error",
        "the broker refuses the user or the password; check what user= and password= of --bus refer to, and sasl=",
    ),
    (
        "Authentication failed",
        "the broker refuses the user or the password; check what user= and password= of --bus refer to, and sasl=",
    ),
    (
        "mismatch",
        "the broker's certificate is for another name; use the name that stands in it in --bus, and in what the broker advertises",
    ),
    (
        "certificate verify failed",
        "the broker's certificate is not signed by an authority that is known here; name the authority's file with ca= in --bus",
    ),
    (
        "connecting to a PLAINTEXT broker listener",
        "the broker does not speak TLS on this port; leave out tls= and ca= in --bus, or use its port with TLS",
    ),
    (
        "SSL handshake failed",
        "TLS could not be agreed upon with the broker; if it demands a certificate, name one with cert= and key= in --bus",
    ),
    (
        "might require SASL authentication",
        "the broker closes the connection: it probably demands a password; name one with sasl=, user= and password= in --bus",
    ),
    (
        "might be caused by broker version",
        "the broker closes the connection once TLS is agreed upon; if it demands a certificate, name one with cert= and key= in --bus",
    ),
    (
        "alert bad certificate",
        "the broker refuses our certificate, or demands one; name it with cert= and key= in --bus",
    ),
    (
        "alert certificate required",
        "the broker demands a certificate; name one with cert= and key= in --bus",
    ),
    (
        // A TLS alert, read as a length.
        "Invalid frame size",
        "the broker does not answer as Kafka does: its port is probably one with TLS; add tls=on, or ca=, to --bus, and sasl= if it demands a password",
    ),
];

/// What a broker does that is spoken to in clear and expects TLS. One that is just ending does it
/// too, but not for long.
const CLOSED_AT_ONCE: &str = "in state APIVERSION_QUERY";

const WANTS_TLS: &str = "the broker closes the connection at once, so its port is probably one with TLS; add tls=on, or ca=, to --bus, and sasl= if it demands a password";

fn refusal(message: &str, is_encrypted: bool) -> Option<String> {
    let known = REFUSALS.iter().find(|(said, _)| message.contains(said));
    let sentence = match known {
        Some((_, sentence)) => sentence,
        None if !is_encrypted && message.contains(CLOSED_AT_ONCE) => WANTS_TLS,
        None => return None,
    };
    Some(format!("{sentence} ({})", shown(message)))
}

/// Without the name of the thread and the address, which the sentence around it has.
fn shown(message: &str) -> String {
    let message = match message.strip_prefix("[thrd:") {
        Some(rest) => rest.split_once("]: ").map_or(rest, |(_, rest)| rest),
        None => message,
    };
    let text = match message.split_once(": ") {
        Some((address, rest)) if address.contains('/') => rest,
        _ => message,
    };
    text.chars().take(SHOWN_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_apart_from_a_broker_that_is_away() {
        let away = "a:1/bootstrap: Connect to ipv4#127.0.0.1:1 failed: Connection refused";
        assert_eq!(refusal(away, false), None);
        let said = refusal(
            "sasl_ssl://a:1/bootstrap: SASL authentication error: Authentication failed (after 5ms)",
            true,
        );
        let said = said.unwrap();
        let told = "(SASL authentication error: Authentication failed (after 5ms))";
        assert!(said.ends_with(told), "{said}");
    }

    #[test]
    fn a_connection_closed_at_once_speaks_for_tls_only_where_we_have_none() {
        let closed = "a:1/bootstrap: Disconnected: connection closed by peer: receive 0 after POLLIN \
             (after 1ms in state APIVERSION_QUERY)";
        assert!(refusal(closed, false).unwrap().contains("add tls=on"));
        assert_eq!(refusal(closed, true), None);
    }
}
