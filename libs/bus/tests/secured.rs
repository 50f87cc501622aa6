//! Kafka behind TLS, passwords and certificates, on a real broker: who may come in comes in, and whoever
//! may not is told what to change, without a password in the telling.

#![allow(clippy::unwrap_used)]

mod support;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bus::kafka::{KafkaBus, KafkaConfig, read_log};
use bus::{Bus, BusError, Subscription};
use servers::{Kafka, Secured, USER};
use support::{PATIENCE, Reader, log};
use tracing_subscriber::fmt::MakeWriter;

/// One broker for all tests of this file.
fn secured() -> Option<(&'static Kafka, &'static Secured)> {
    static SHARED: OnceLock<Option<Kafka>> = OnceLock::new();
    let kafka = SHARED.get_or_init(Kafka::start_secured).as_ref()?;
    Some((kafka, kafka.secured()))
}

/// A file with a secret for as long as the test runs, and the reference to it.
struct Given(tempfile::NamedTempFile);

impl Given {
    fn new(text: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("{text}\n")).unwrap();
        Self(file)
    }

    fn reference(&self) -> String {
        format!("file:{}", self.0.path().display())
    }
}

fn by_password(at: &str, prefix: &str, sasl: &str, ca: Option<&Path>, password: &Given) -> String {
    static NAME: OnceLock<Given> = OnceLock::new();
    let user = NAME.get_or_init(|| Given::new(USER));
    let tls = ca.map_or(String::new(), |ca| format!("&ca={}", ca.display()));
    format!(
        "kafka://{at}/{prefix}?sasl={sasl}&user={}&password={}{tls}",
        user.reference(),
        password.reference()
    )
}

/// The bus opens, and what is published comes back.
async fn carries(url: &str) {
    let bus = KafkaBus::open(KafkaConfig::parse(url).unwrap())
        .await
        .unwrap();
    let mut reader = Reader::joined(&*bus, Subscription::Whole).await;
    let records = log(20);
    let published = async {
        while let Err(error) = bus.publish_records(&records).await {
            assert!(matches!(error, BusError::NotPublished { .. }), "{error}");
        }
    };
    tokio::time::timeout(PATIENCE, published).await.unwrap();
    reader.until(20).await;
    assert_eq!(bus.trouble(), None);
    bus.close().await;
}

/// What readiness says of a bus that cannot come in.
async fn trouble(url: &str) -> String {
    let bus = KafkaBus::open(KafkaConfig::parse(url).unwrap())
        .await
        .unwrap();
    let said = async {
        loop {
            match bus.trouble() {
                Some(why) if why.contains("--bus") => return why,
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let said = tokio::time::timeout(PATIENCE, said).await;
    let said = said.unwrap_or_else(|_| panic!("no remedy is named: {:?}", bus.trouble()));
    bus.close().await;
    said
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_right_password_over_tls_carries_the_log_by_either_mechanism() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let password = Given::new(&secured.secrets.password);
    for sasl in ["scram-sha-512", "plain"] {
        let ca = Some(&*secured.secrets.ca);
        carries(&by_password(
            &secured.by_password,
            &kafka.prefix(),
            sasl,
            ca,
            &password,
        ))
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_ones_own_lets_in_where_it_is_asked_for() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let secrets = &secured.secrets;
    let url = format!(
        "kafka://{}/{}?ca={}&cert={}&key={}",
        secured.by_certificate,
        kafka.prefix(),
        secrets.ca.display(),
        secrets.certificate.display(),
        secrets.key.display()
    );
    carries(&url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_certificate_where_one_is_asked_for_cert_and_key_are_named() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let ca = secured.secrets.ca.display();
    let said = trouble(&format!(
        "kafka://{}/{}?ca={ca}",
        secured.by_certificate,
        kafka.prefix()
    ))
    .await;
    assert!(said.contains("cert= and key="), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_authority_is_told_with_the_option_that_names_it() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let password = Given::new(&secured.secrets.password);
    let other = Some(&*secured.secrets.other_ca);
    let said = trouble(&by_password(
        &secured.by_password,
        &kafka.prefix(),
        "plain",
        other,
        &password,
    ))
    .await;
    assert!(said.contains("authority's file with ca="), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_with_tls_that_is_spoken_to_in_clear_is_told_apart_from_one_that_is_away() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let password = Given::new(&secured.secrets.password);
    let said = trouble(&by_password(
        &secured.by_password,
        &kafka.prefix(),
        "plain",
        None,
        &password,
    ))
    .await;
    assert!(said.contains("add tls=on"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_on_a_port_without_it_is_told_too() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let said = trouble(&format!(
        "kafka://{}/{}?ca={}",
        kafka.addresses(),
        kafka.prefix(),
        secured.secrets.ca.display()
    ))
    .await;
    assert!(said.contains("does not speak TLS"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_the_whole_log_with_a_wrong_password_gives_up_and_says_why() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let wrong = Given::new("not-the-password");
    let url = by_password(
        &secured.by_password,
        &kafka.prefix(),
        "scram-sha-512",
        Some(&*secured.secrets.ca),
        &wrong,
    );
    let refused = read_log(&KafkaConfig::parse(&url).unwrap()).collect().await;
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.contains("check what user= and password="),
        "{refused}"
    );
    assert!(!refused.contains("not-the-password"), "{refused}");
}

/// Everything that is logged in this process.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_told_as_such_and_stands_in_no_log() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let lines = Lines::default();
    // The only test of this program that sets it: threads of librdkafka log too.
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(lines.clone())
        .init();
    for (sasl, password) in [
        ("plain", "wrong-in-plain"),
        ("scram-sha-512", "wrong-in-scram"),
    ] {
        let given = Given::new(password);
        let said = trouble(&by_password(
            &secured.by_password,
            &kafka.prefix(),
            sasl,
            Some(&*secured.secrets.ca),
            &given,
        ))
        .await;
        assert!(said.contains("check what user= and password="), "{said}");
        assert!(!said.contains(password), "{said}");
    }
    let logged = String::from_utf8_lossy(&lines.0.lock().unwrap()).into_owned();
    // It is there at all, with what librdkafka says.
    assert!(
        logged.contains("refuses the user or the password"),
        "{logged}"
    );
    assert!(logged.contains("librdkafka"), "{logged}");
    for secret in [
        "wrong-in-plain",
        "wrong-in-scram",
        &secured.secrets.password,
    ] {
        assert!(!logged.contains(secret), "{logged}");
    }
}
