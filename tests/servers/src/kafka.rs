//! Apache Kafka: one broker, or three that keep three copies and want two confirmations.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::Signal;

use crate::process::{Folder, Server, free_port, must_run, script, start_on_free_ports, succeeds};
use crate::secrets::Secrets;

pub struct Kafka {
    brokers: Vec<Broker>,
    /// `HOST:PORT[,…]`.
    addresses: String,
    secured: Option<Secured>,
    // Dropped after the brokers.
    _folders: Vec<Folder>,
}

/// What a broker stands on.
#[derive(Clone, Debug)]
pub struct Ground {
    /// Where its folder is made.
    pub folder: PathBuf,
    /// Ports of the proxies before it, which lead to [`port_behind`](Kafka::port_behind).
    pub proxies: Vec<u16>,
}

impl Default for Ground {
    fn default() -> Self {
        Self {
            folder: std::env::temp_dir(),
            proxies: Vec::new(),
        }
    }
}

/// Listeners of a broker that let in only who may come.
pub struct Secured {
    /// `HOST:PORT`: TLS, then a password by PLAIN or SCRAM-SHA-512.
    pub by_password: String,
    /// `HOST:PORT`: TLS on both sides.
    pub by_certificate: String,
    pub secrets: Secrets,
}

struct Broker {
    server: Server,
    /// What `kafka.sh run` is told.
    arguments: [String; 5],
    port: u16,
    /// Ports behind proxies, each with the port that clients are told.
    fronts: Vec<(u16, u16)>,
    /// What `KAFKA_SECURED` says.
    secured: String,
}

impl Kafka {
    /// Brokers of this test's own, which it may kill. `None` only if `PENSTOCK_SKIP` names `kafka`.
    pub fn start(brokers: usize) -> Option<Self> {
        Self::start_on(&vec![Ground::default(); brokers])
    }

    /// The same, each broker on ground of its own.
    pub fn start_on(grounds: &[Ground]) -> Option<Self> {
        if crate::skipped("kafka") {
            return None;
        }
        fetch_jars();
        Some(start_on_free_ports("Kafka", || {
            Self::try_start(grounds, false)
        }))
    }

    /// One broker that has [`Secured`] listeners too.
    pub fn start_secured() -> Option<Self> {
        if crate::skipped("kafka") {
            return None;
        }
        fetch_jars();
        Some(start_on_free_ports("Kafka", || {
            Self::try_start(&[Ground::default()], true)
        }))
    }

    /// Of a broker that was started with them.
    pub fn secured(&self) -> &Secured {
        self.secured.as_ref().unwrap()
    }

    /// One broker that all tests of this program share: nobody kills it, and everybody takes a
    /// [`prefix`](Self::prefix) of their own. `PENSTOCK_TEST_KAFKA=HOST:PORT` names one to be used
    /// instead.
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

    fn try_start(grounds: &[Ground], is_secured: bool) -> Result<Self, String> {
        let count = grounds.len();
        let folder = |ground: &Ground| Folder::below(&ground.folder, "kafka");
        let folders: Vec<Folder> = grounds.iter().map(folder).collect();
        let secured = is_secured.then(|| Secured {
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
            fronts: grounds[index]
                .proxies
                .iter()
                .map(|known| (free_port(), *known))
                .collect(),
            secured: secured.as_ref().map_or(String::new(), Secured::to_script),
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

    /// What `--bus` takes.
    pub fn url(&self, prefix: &str) -> String {
        format!("kafka://{}/{prefix}", self.addresses)
    }

    /// A prefix for topics that no other test has.
    pub fn prefix(&self) -> String {
        crate::unique("t")
    }

    pub fn count(&self) -> usize {
        self.brokers.len()
    }

    /// The port of a broker that one of its proxies leads to.
    pub fn port_behind(&self, broker: usize, proxy: usize) -> u16 {
        self.brokers[broker].fronts[proxy].0
    }

    /// The broker whose port this is: how a test finds the leader of a partition.
    pub fn index_of(&self, port: u16) -> Option<usize> {
        self.brokers.iter().position(|broker| broker.port == port)
    }

    /// SIGKILL. Brokers are counted from 0.
    pub fn kill(&self, broker: usize) {
        self.brokers[broker].server.kill();
    }

    /// Starts a broker that was killed, in its folder and on its ports; returns when it answers.
    pub fn restart(&self, broker: usize) {
        let broker = &self.brokers[broker];
        broker.server.kill();
        broker.launch();
        if let Err(why) = broker.wait() {
            panic!("a Kafka broker did not start again: {why}");
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

impl Secured {
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
        // An old log would say that it has started.
        let _ = std::fs::remove_file(folder.join("broker.log"));
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]);
        command.arg(script("kafka.sh")).arg("run");
        command.args(&self.arguments);
        let fronts = self.fronts.iter();
        let fronts = fronts.map(|(port, known)| format!("{port}:{known}"));
        command.env("KAFKA_FRONTS", fronts.collect::<Vec<_>>().join(","));
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

/// Before any broker starts, so that a machine without them hears of it in a sentence.
fn fetch_jars() {
    must_run("kafka.sh", &["jars"]);
}
