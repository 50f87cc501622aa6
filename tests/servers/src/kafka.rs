//! Apache Kafka: one broker, or three with three replicas and two required confirmations.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::Signal;

use crate::process::{
    Server, TempFolder, free_port, must_run, script, start_on_free_ports, succeeds,
};
use crate::secrets::Secrets;

pub struct Kafka {
    brokers: Vec<Broker>,
    /// `HOST:PORT[,…]`.
    addresses: String,
    secured: Option<SecuredListeners>,
    // Dropped after the brokers.
    _folders: Vec<TempFolder>,
}

/// Where a broker runs.
#[derive(Clone, Debug)]
pub struct BrokerPlacement {
    /// The parent of its folder.
    pub folder: PathBuf,
    /// Ports of the proxies in front of it, which forward to [`port_behind`](Kafka::port_behind).
    pub proxies: Vec<u16>,
}

impl Default for BrokerPlacement {
    fn default() -> Self {
        Self {
            folder: std::env::temp_dir(),
            proxies: Vec::new(),
        }
    }
}

/// The listeners of a broker that require authentication.
pub struct SecuredListeners {
    /// `HOST:PORT`: TLS, then a password by PLAIN or SCRAM-SHA-512.
    pub by_password: String,
    /// `HOST:PORT`: mutual TLS.
    pub by_certificate: String,
    pub secrets: Secrets,
}

struct Broker {
    server: Server,
    /// The arguments of `kafka.sh run`.
    arguments: [String; 5],
    port: u16,
    /// Listener ports behind proxies, each with the advertised port.
    proxied_listeners: Vec<(u16, u16)>,
    /// The value of `KAFKA_SECURED`.
    secured: String,
}

impl Kafka {
    /// Private brokers, which the test may kill. `None` only if `PENSTOCK_SKIP` names `kafka`.
    pub fn start(brokers: usize) -> Option<Self> {
        Self::start_on(&vec![BrokerPlacement::default(); brokers])
    }

    /// As [`start`](Self::start), each broker with its own placement.
    pub fn start_on(placements: &[BrokerPlacement]) -> Option<Self> {
        if crate::is_skipped("kafka") {
            return None;
        }
        fetch_jars();
        Some(start_on_free_ports("Kafka", || {
            Self::try_start(placements, false)
        }))
    }

    /// One broker that has [`SecuredListeners`] listeners too.
    pub fn start_secured() -> Option<Self> {
        if crate::is_skipped("kafka") {
            return None;
        }
        fetch_jars();
        Some(start_on_free_ports("Kafka", || {
            Self::try_start(&[BrokerPlacement::default()], true)
        }))
    }

    /// The secured listeners.
    ///
    /// # Panics
    /// If the broker was started without them.
    pub fn secured(&self) -> &SecuredListeners {
        self.secured.as_ref().unwrap()
    }

    /// One broker shared by all tests of this program, which must not kill it, and which use a
    /// [`prefix`](Self::prefix) each. `PENSTOCK_TEST_KAFKA=HOST:PORT` names an external one.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Kafka>> = OnceLock::new();
        let shared = SHARED.get_or_init(|| match std::env::var("PENSTOCK_TEST_KAFKA") {
            Ok(addresses) => Some(Self {
                brokers: Vec::new(),
                addresses,
                secured: None,
                _folders: Vec::new(),
            }),
            Err(_) => Self::start(1),
        });
        shared.as_ref()
    }

    fn try_start(placements: &[BrokerPlacement], is_secured: bool) -> Result<Self, String> {
        let count = placements.len();
        let folder =
            |placement: &BrokerPlacement| TempFolder::create_in(&placement.folder, "kafka");
        let folders: Vec<TempFolder> = placements.iter().map(folder).collect();
        let secured = is_secured.then(|| SecuredListeners {
            by_password: format!("127.0.0.1:{}", free_port()),
            by_certificate: format!("127.0.0.1:{}", free_port()),
            secrets: Secrets::write(&folders[0].path().join("secrets")),
        });
        let ports: Vec<(u16, u16)> = (0..count).map(|_| (free_port(), free_port())).collect();
        let voters: Vec<String> = ports
            .iter()
            .enumerate()
            .map(|(index, (_, controller))| format!("{}@127.0.0.1:{controller}", index + 1))
            .collect();
        let broker = |(index, (port, controller)): (usize, &(u16, u16))| Broker {
            server: Server::default(),
            arguments: [
                folders[index].path().join("broker").display().to_string(),
                (index + 1).to_string(),
                port.to_string(),
                controller.to_string(),
                voters.join(","),
            ],
            port: *port,
            proxied_listeners: placements[index]
                .proxies
                .iter()
                .map(|advertised| (free_port(), *advertised))
                .collect(),
            secured: secured
                .as_ref()
                .map_or(String::new(), SecuredListeners::to_script),
        };
        let kafka = Self {
            brokers: ports.iter().enumerate().map(broker).collect(),
            addresses: ports
                .iter()
                .map(|(port, _)| format!("127.0.0.1:{port}"))
                .collect::<Vec<_>>()
                .join(","),
            secured,
            _folders: folders,
        };
        kafka.brokers.iter().for_each(Broker::launch);
        for broker in &kafka.brokers {
            broker.wait()?;
        }
        Ok(kafka)
    }

    /// `HOST:PORT[,…]`.
    pub fn addresses(&self) -> &str {
        &self.addresses
    }

    /// The value for `--bus`.
    pub fn url(&self, prefix: &str) -> String {
        format!("kafka://{}/{prefix}", self.addresses)
    }

    /// A unique topic prefix.
    pub fn prefix(&self) -> String {
        crate::unique("t")
    }

    pub fn count(&self) -> usize {
        self.brokers.len()
    }

    /// The listener port behind one of a broker's proxies.
    pub fn port_behind(&self, broker: usize, proxy: usize) -> u16 {
        self.brokers[broker].proxied_listeners[proxy].0
    }

    /// The index of the broker with this port, to find the leader of a partition.
    pub fn index_of(&self, port: u16) -> Option<usize> {
        self.brokers.iter().position(|broker| broker.port == port)
    }

    /// SIGKILL. Brokers are counted from 0.
    pub fn kill(&self, broker: usize) {
        self.brokers[broker].server.kill();
    }

    /// Restarts a killed broker in its folder and on its ports; returns when it answers.
    pub fn restart(&self, broker: usize) {
        let broker = &self.brokers[broker];
        broker.server.kill();
        broker.launch();
        if let Err(why) = broker.wait() {
            panic!("a Kafka broker did not restart: {why}");
        }
    }

    /// SIGSTOP: connections stay open and nothing is answered.
    pub fn pause(&self, broker: usize) {
        self.brokers[broker].server.signal(Signal::STOP);
    }

    pub fn resume(&self, broker: usize) {
        self.brokers[broker].server.signal(Signal::CONT);
    }
}

impl SecuredListeners {
    fn to_script(&self) -> String {
        let port = |address: &str| address.rsplit(':').next().unwrap().to_owned();
        format!(
            "{},{},{}",
            port(&self.by_password),
            port(&self.by_certificate),
            self.secrets.folder.display()
        )
    }
}

impl Broker {
    fn launch(&self) {
        let folder = std::path::Path::new(&self.arguments[0]);
        std::fs::create_dir_all(folder).unwrap();
        // The readiness check reads the log, so an old one must go.
        let _ = std::fs::remove_file(folder.join("broker.log"));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        command.arg(script("kafka.sh")).arg("run");
        command.args(&self.arguments);
        let proxied_listeners = self.proxied_listeners.iter();
        let proxied_listeners =
            proxied_listeners.map(|(port, advertised)| format!("{port}:{advertised}"));
        command.env(
            "KAFKA_FRONTS",
            proxied_listeners.collect::<Vec<_>>().join(","),
        );
        command.env("KAFKA_SECURED", &self.secured);
        self.server.start(command, &folder.join("out.log"));
    }

    fn wait(&self) -> Result<(), String> {
        let port = self.port.to_string();
        let answers = || succeeds("kafka.sh", &["answers", &self.arguments[0], &port]);
        if self.server.wait_until(answers) {
            return Ok(());
        }
        let text = |name| {
            let path = std::path::Path::new(&self.arguments[0]).join(name);
            std::fs::read_to_string(path).unwrap_or_default()
        };
        Err(format!("{}{}", text("out.log"), text("broker.log")))
    }
}

/// Fetches the jars before any broker starts, so that a failure gives a clear message.
fn fetch_jars() {
    must_run("kafka.sh", &["jars"]);
}
