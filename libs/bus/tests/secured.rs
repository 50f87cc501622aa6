//! Kafka with TLS, passwords and certificates, on a real broker: valid credentials connect, and
//! invalid ones are reported with what to change, without revealing a password.

#![allow(clippy::unwrap_used)]

mod support;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bus::kafka::{KafkaBus, KafkaConfig, read_log};
use bus::{Bus, BusError, Subscription};
use servers::{Kafka, SecuredListeners, USER};
use support::{Reader, TIMEOUT, record_log};
use tracing_subscriber::fmt::MakeWriter;

/// One broker for all tests of this file.
fn secured() -> Option<(&'static Kafka, &'static SecuredListeners)> {
    static SHARED: OnceLock<Option<Kafka>> = OnceLock::new();
    let kafka = SHARED.get_or_init(Kafka::start_secured).as_ref()?;
    Some((kafka, kafka.secured()))
}

/// A temporary file with a secret, and the reference to it.
struct SecretFile(tempfile::NamedTempFile);

impl SecretFile {
    fn new(text: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), format!("{text}\n")).unwrap();
        Self(file)
    }

    fn reference(&self) -> String {
        format!("file:{}", self.0.path().display())
    }
}

fn by_password(
    at: &str,
    prefix: &str,
    sasl: &str,
    ca: Option<&Path>,
    password: &SecretFile,
) -> String {
    static NAME: OnceLock<SecretFile> = OnceLock::new();
    let user = NAME.get_or_init(|| SecretFile::new(USER));
    let tls = ca.map_or(String::new(), |ca| format!("&ca={}", ca.display()));
    format!(
        "kafka://{at}/{prefix}?sasl={sasl}&user={}&password={}{tls}",
        user.reference(),
        password.reference()
    )
}

/// Asserts that the bus opens and delivers what is published.
async fn assert_roundtrip(url: &str) {
    let bus = KafkaBus::open(KafkaConfig::parse(url).unwrap())
        .await
        .unwrap();
    let mut reader = Reader::join(&*bus, Subscription::All).await;
    let records = record_log(20);
    let published = async {
        while let Err(error) = bus.publish_records(&records).await {
            assert!(matches!(error, BusError::NotPublished { .. }), "{error}");
        }
    };
    tokio::time::timeout(TIMEOUT, published).await.unwrap();
    reader.wait_for_records(20).await;
    assert_eq!(bus.problem(), None);
    bus.close().await;
}

/// Returns what readiness says of a bus that cannot connect.
async fn connection_problem(url: &str) -> String {
    let bus = KafkaBus::open(KafkaConfig::parse(url).unwrap())
        .await
        .unwrap();
    let problem = async {
        loop {
            match bus.problem() {
                Some(why) if why.contains("--bus") => return why,
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    let problem = tokio::time::timeout(TIMEOUT, problem).await;
    let problem = problem.unwrap_or_else(|_| panic!("no advice is given: {:?}", bus.problem()));
    bus.close().await;
    problem
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_right_password_over_tls_connects_with_either_mechanism() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let password = SecretFile::new(&secured.secrets.password);
    for sasl in ["scram-sha-512", "plain"] {
        let ca = Some(&*secured.secrets.ca);
        assert_roundtrip(&by_password(
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
async fn a_client_certificate_connects_where_it_is_required() {
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
    assert_roundtrip(&url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_client_certificate_is_reported_with_its_options() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let ca = secured.secrets.ca.display();
    let problem = connection_problem(&format!(
        "kafka://{}/{}?ca={ca}",
        secured.by_certificate,
        kafka.prefix()
    ))
    .await;
    assert!(problem.contains("cert= and key="), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_authority_is_reported_with_its_option() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let password = SecretFile::new(&secured.secrets.password);
    let other = Some(&*secured.secrets.other_ca);
    let problem = connection_problem(&by_password(
        &secured.by_password,
        &kafka.prefix(),
        "plain",
        other,
        &password,
    ))
    .await;
    assert!(problem.contains("authority's file with ca="), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plaintext_on_a_tls_port_is_distinguished_from_an_unreachable_broker() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let password = SecretFile::new(&secured.secrets.password);
    let problem = connection_problem(&by_password(
        &secured.by_password,
        &kafka.prefix(),
        "plain",
        None,
        &password,
    ))
    .await;
    assert!(problem.contains("add tls=on"), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_on_a_plaintext_port_is_reported() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let problem = connection_problem(&format!(
        "kafka://{}/{}?ca={}",
        kafka.addresses(),
        kafka.prefix(),
        secured.secrets.ca.display()
    ))
    .await;
    assert!(problem.contains("does not speak TLS"), "{problem}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reading_the_log_with_a_wrong_password_fails_with_the_reason() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let wrong = SecretFile::new("not-the-password");
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

/// Captures everything logged in this process.
#[derive(Clone, Default)]
struct CapturedLog(Arc<Mutex<Vec<u8>>>);

impl io::Write for CapturedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for CapturedLog {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_password_is_reported_as_such_and_never_logged() {
    let Some((kafka, secured)) = secured() else {
        return;
    };
    let captured = CapturedLog::default();
    // The only test in this binary that installs a subscriber: threads of librdkafka log too.
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(captured.clone())
        .init();
    for (sasl, password) in [
        ("plain", "wrong-in-plain"),
        ("scram-sha-512", "wrong-in-scram"),
    ] {
        let file = SecretFile::new(password);
        let problem = connection_problem(&by_password(
            &secured.by_password,
            &kafka.prefix(),
            sasl,
            Some(&*secured.secrets.ca),
            &file,
        ))
        .await;
        assert!(
            problem.contains("check what user= and password="),
            "{problem}"
        );
        assert!(!problem.contains(password), "{problem}");
    }
    let logged = String::from_utf8_lossy(&captured.0.lock().unwrap()).into_owned();
    // The log does contain the failure, and what librdkafka says.
    assert!(
        logged.contains("rejects the user or the password"),
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
