//! How to connect to Kafka: `kafka://HOST:PORT[,HOST:PORT…]/PREFIX?…`.
//!
//! | option | value |
//! |---|---|
//! | `tls` | `on`: encrypt, and trust the system's certificate authorities |
//! | `ca` | `PATH` of the certificate authorities to trust instead; implies `tls=on` |
//! | `cert`, `key` | `PATH`s of the client certificate and its key |
//! | `sasl` | `plain`, `scram-sha-256` or `scram-sha-512` |
//! | `user`, `password` | `env:NAME` or `file:PATH`, for `sasl` |
//!
//! Invariant: the values that `user` and `password` refer to never appear in messages or logs.

use std::fmt;

use rdkafka::ClientConfig;

use crate::BusError;

const PREFIX_MAX: usize = 100;

/// The brokers, how to connect to them, and the prefix. `Debug` does not show secrets.
#[derive(Clone)]
pub struct KafkaConfig {
    /// `HOST:PORT[,…]`.
    pub brokers: String,
    /// The first part of the name of every topic and group.
    pub prefix: String,
    security: Vec<(&'static str, String)>,
}

impl fmt::Debug for KafkaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "kafka://{}/{}", self.brokers, self.prefix)
    }
}

/// What is wrong with a URL.
struct Invalid {
    reason: String,
    source: Option<std::io::Error>,
}

impl From<String> for Invalid {
    fn from(reason: String) -> Self {
        Self {
            reason,
            source: None,
        }
    }
}

impl Invalid {
    fn unreadable(file: &str, source: std::io::Error) -> Self {
        Self {
            reason: format!("{file}: {source}"),
            source: Some(source),
        }
    }
}

#[derive(Default)]
struct Options {
    tls: bool,
    ca: Option<String>,
    cert: Option<String>,
    key: Option<String>,
    sasl: Option<&'static str>,
    user: Option<String>,
    password: Option<String>,
}

impl KafkaConfig {
    /// Parses `kafka://HOST:PORT[,HOST:PORT]/PREFIX[?OPTIONS]`, the format of `--bus`.
    ///
    /// # Errors
    ///
    /// [`BusError::Url`], which names the invalid part and shows no password.
    pub fn parse(url: &str) -> Result<Self, BusError> {
        Self::read(url).map_err(|Invalid { reason, source }| BusError::Url {
            url: redacted(url),
            reason,
            source,
        })
    }

    fn read(url: &str) -> Result<Self, Invalid> {
        let shape = || "write kafka://HOST:PORT[,HOST:PORT]/PREFIX".to_owned();
        let rest = url.strip_prefix("kafka://").ok_or_else(shape)?;
        let (rest, options) = rest.split_once('?').unwrap_or((rest, ""));
        let (brokers, prefix) = rest.split_once('/').ok_or_else(shape)?;
        for broker in brokers.split(',') {
            check_broker(broker)?;
        }
        check_prefix(prefix)?;
        Ok(Self {
            brokers: brokers.to_owned(),
            prefix: prefix.to_owned(),
            security: Options::read(options)?.security()?,
        })
    }

    pub(super) fn is_encrypted(&self) -> bool {
        let mut settings = self.security.iter();
        settings.any(|(name, value)| *name == "security.protocol" && value.contains("ssl"))
    }

    /// Settings common to all clients.
    pub(super) fn client(&self, role: &str) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", format!("penstock-{role}"))
            .set("socket.nagle.disable", "true")
            .set("socket.keepalive.enable", "true")
            .set("socket.connection.setup.timeout.ms", "5000")
            // Notice a broker that comes back within a second.
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("topic.metadata.refresh.interval.ms", "30000")
            .set("allow.auto.create.topics", "false");
        for (name, value) in &self.security {
            config.set(*name, value);
        }
        config
    }

    pub(super) fn consumer(&self, group: &str) -> ClientConfig {
        let mut config = self.client(group);
        config
            .set("group.id", format!("{}.{group}", self.prefix))
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "latest")
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", "6000")
            .set("heartbeat.interval.ms", "1500")
            .set("fetch.error.backoff.ms", "100")
            .set("fetch.queue.backoff.ms", "20")
            // The limit per fetch and partition. A larger message is still delivered, alone.
            .set("fetch.message.max.bytes", "1048576")
            // One full fetch, with some margin.
            .set("receive.message.max.bytes", "100000000")
            // Shared by 64 partitions.
            .set("queued.max.messages.kbytes", "8192");
        config
    }
}

/// The URL for messages. Options may hold paths that should not be shown, and what precedes an `@`
/// is a password.
fn redacted(url: &str) -> String {
    let plain = url.split('?').next().unwrap_or_default();
    match plain.rsplit_once('@') {
        Some((_, rest)) => format!("kafka://…@{rest}"),
        None => plain.to_owned(),
    }
}

fn check_broker(broker: &str) -> Result<(), String> {
    let port = broker
        .rsplit_once(':')
        .filter(|(host, _)| !host.is_empty() && !host.contains('@'))
        .and_then(|(_, port)| port.parse::<u16>().ok());
    match port {
        Some(_) => Ok(()),
        None => match broker.rsplit_once('@') {
            Some((_, host)) => Err(format!(
                "`…@{host}` is not HOST:PORT; user and password are options"
            )),
            None => Err(format!("`{broker}` is not HOST:PORT")),
        },
    }
}

fn check_prefix(prefix: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if prefix.is_empty() {
        return Err("it must end with the prefix of the topics, such as /penstock".to_owned());
    }
    if prefix.len() > PREFIX_MAX || !prefix.chars().all(allowed) {
        return Err(format!(
            "the prefix `{prefix}` may contain only letters, digits, `.`, `-` and `_`, at most {PREFIX_MAX}"
        ));
    }
    Ok(())
}

impl Options {
    fn read(text: &str) -> Result<Self, Invalid> {
        let mut options = Self::default();
        for (name, value) in form_urlencoded::parse(text.as_bytes()) {
            let value = value.into_owned();
            match &*name {
                "tls" if value == "on" => options.tls = true,
                "tls" => return Err("the only value of tls is on".to_owned().into()),
                "ca" => options.ca = Some(value),
                "cert" => options.cert = Some(value),
                "key" => options.key = Some(value),
                "sasl" => options.sasl = Some(mechanism(&value)?),
                "user" => options.user = Some(secret("user", &value)?),
                "password" => options.password = Some(secret("password", &value)?),
                _ => {
                    return Err(format!(
                        "unknown option `{name}`; the options are tls, ca, cert, key, sasl, user, password"
                    )
                    .into());
                }
            }
        }
        Ok(options)
    }

    fn security(self) -> Result<Vec<(&'static str, String)>, Invalid> {
        let mut settings = Vec::new();
        let tls = self.tls || self.ca.is_some() || self.cert.is_some();
        if self.cert.is_some() != self.key.is_some() {
            return Err("cert and key must be given together".to_owned().into());
        }
        let files = [
            ("ca", "ssl.ca.location", self.ca),
            ("cert", "ssl.certificate.location", self.cert),
            ("key", "ssl.key.location", self.key),
        ];
        for (option, setting, path) in files {
            let Some(path) = path else { continue };
            // Otherwise OpenSSL would report it in its own words, and only when the client is
            // created.
            std::fs::File::open(&path)
                .map_err(|error| Invalid::unreadable(&format!("{option}={path}"), error))?;
            settings.push((setting, path));
        }
        match (self.sasl, self.user, self.password) {
            (None, None, None) => {}
            (Some(mechanism), Some(user), Some(password)) => settings.extend([
                ("sasl.mechanism", mechanism.to_owned()),
                ("sasl.username", user),
                ("sasl.password", password),
            ]),
            _ => {
                return Err("sasl, user and password must be given together"
                    .to_owned()
                    .into());
            }
        }
        let sasl = settings.iter().any(|(name, _)| *name == "sasl.mechanism");
        let protocol = match (tls, sasl) {
            (false, false) => "plaintext",
            (true, false) => "ssl",
            (false, true) => "sasl_plaintext",
            (true, true) => "sasl_ssl",
        };
        settings.push(("security.protocol", protocol.to_owned()));
        Ok(settings)
    }
}

fn mechanism(name: &str) -> Result<&'static str, String> {
    match name {
        "plain" => Ok("PLAIN"),
        "scram-sha-256" => Ok("SCRAM-SHA-256"),
        "scram-sha-512" => Ok("SCRAM-SHA-512"),
        _ => Err(format!(
            "unknown value sasl={name}; use plain, scram-sha-256 or scram-sha-512"
        )),
    }
}

/// Resolves a reference. A literal value is refused: it would appear in process lists and logs.
fn secret(option: &str, reference: &str) -> Result<String, Invalid> {
    if let Some(name) = reference.strip_prefix("env:") {
        return std::env::var(name).map_err(|_| {
            format!("{option}=env:{name}: there is no such environment variable").into()
        });
    }
    if let Some(path) = reference.strip_prefix("file:") {
        return std::fs::read_to_string(path)
            .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
            .map_err(|error| Invalid::unreadable(&format!("{option}=file:{path}"), error));
    }
    Err(format!("{option} must be a reference, env:NAME or file:PATH, not the value itself").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(url: &str) -> String {
        KafkaConfig::parse(url).unwrap_err().to_string()
    }

    fn setting<'a>(config: &'a KafkaConfig, name: &str) -> Option<&'a str> {
        let mut settings = config.security.iter();
        let found = settings.find(|(setting, _)| *setting == name);
        found.map(|(_, value)| value.as_str())
    }

    #[test]
    fn a_file_that_cannot_be_read_is_the_source_of_the_error() {
        for option in ["ca", "password"] {
            let reference = if option == "ca" { "" } else { "file:" };
            let url = format!("kafka://a:9092/p?{option}={reference}/no/such/file");
            let error = KafkaConfig::parse(&url).unwrap_err();
            let source = std::error::Error::source(&error).unwrap();
            assert!(source.is::<std::io::Error>(), "{option}: {source:?}");
        }
    }

    #[test]
    fn a_url_names_brokers_and_a_prefix() {
        let config = KafkaConfig::parse("kafka://a:9092,b:9093/penstock").unwrap();
        assert_eq!(config.brokers, "a:9092,b:9093");
        assert_eq!(config.prefix, "penstock");
        assert_eq!(setting(&config, "security.protocol"), Some("plaintext"));
    }

    #[test]
    fn credentials_are_read_from_references_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let (user, password) = (folder.path().join("user"), folder.path().join("password"));
        std::fs::write(&user, "alice\n").unwrap();
        std::fs::write(&password, "secret\n").unwrap();
        let url = format!(
            "kafka://a:9092/p?tls=on&sasl=scram-sha-512&user=file:{}&password=file:{}",
            user.display(),
            password.display()
        );
        let config = KafkaConfig::parse(&url).unwrap();
        assert_eq!(setting(&config, "sasl.username"), Some("alice"));
        assert_eq!(setting(&config, "sasl.password"), Some("secret"));
        assert_eq!(setting(&config, "security.protocol"), Some("sasl_ssl"));
        assert_eq!(format!("{config:?}"), "kafka://a:9092/p");
    }

    #[test]
    fn the_client_was_built_with_tls_and_sasl() {
        use rdkafka::producer::BaseProducer;
        for options in [
            "",
            "?tls=on",
            "?sasl=scram-sha-512&user=env:PATH&password=env:PATH",
        ] {
            let config = KafkaConfig::parse(&format!("kafka://a:9092/p{options}")).unwrap();
            let client: Result<BaseProducer, _> = config.client("test").create();
            assert!(client.is_ok(), "{options}: {:?}", client.err());
        }
    }

    #[test]
    fn an_invalid_url_is_refused_with_a_reason() {
        for (url, text) in [
            ("kafka://a:9092", "HOST:PORT"),
            ("kafka://a/p", "HOST:PORT"),
            ("kafka://me:secret@a:9092/p", "HOST:PORT"),
            ("kafka://a:9092/", "prefix"),
            ("kafka://a:9092/a/b", "prefix"),
            ("kafka://a:9092/p?tls=maybe", "on"),
            ("kafka://a:9092/p?tsl=on", "tsl"),
            ("kafka://a:9092/p?cert=x", "key"),
            (
                "kafka://a:9092/p?ca=/no/such/file",
                "ca=/no/such/file: No such",
            ),
            ("kafka://a:9092/p?sasl=kerberos", "kerberos"),
            ("kafka://a:9092/p?sasl=plain", "password"),
            (
                "kafka://a:9092/p?sasl=plain&user=env:PATH&password=hunter2",
                "reference",
            ),
            (
                "kafka://a:9092/p?sasl=plain&user=env:NO_SUCH_NAME&password=env:PATH",
                "variable",
            ),
        ] {
            let reason = reason(url);
            assert!(reason.contains(text), "{url}: {reason}");
            assert!(!reason.contains("hunter2"), "{reason}");
            assert!(!reason.contains("me:secret"), "{reason}");
        }
    }
}
