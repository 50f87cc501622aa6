//! The flags of `penstock serve`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use cli::client::config::default_data_dir;
use contract::time::Span;
use ipnet::IpNet;

use super::service::Service;

/// Run Penstock: all services in this process, or those named
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "Examples:
  penstock serve
  penstock serve --data ./data --control-addr 127.0.0.1:0 --gateway-addr 127.0.0.1:0 --ready-file ready.json
  penstock serve --gateway-domain models.example.com
  penstock serve --keep-instances
  penstock serve --archive-after 30d
  penstock serve --services gateway --bus kafka://kafka-1:9092,kafka-2:9092/penstock
  penstock serve --services control,autoscaler,meter --bus kafka://kafka-1:9092/penstock --store postgres://penstock@db/penstock
  penstock serve --services actuator --advertise-host 10.0.0.7 --bus … --store …

With TLS and passwords:
  --bus 'kafka://kafka-1:9093/penstock?tls=on&sasl=scram-sha-512&user=env:KAFKA_USER&password=file:/etc/penstock/secrets/kafka'
      ca=FILE replaces the system's certificate authorities; cert=FILE and key=FILE set a client certificate
  --store 'postgres://penstock@db/penstock?sslmode=verify-full&sslrootcert=FILE'
      the password comes from the file that PGPASSFILE names

The server's address and an admin's token are written to DATA/client.json, where the other commands
find them (PENSTOCK_CONFIG overrides the path).")]
pub struct ServeArgs {
    /// A configuration file
    #[arg(long, value_name = "FILE", env = "PENSTOCK_SERVE_CONFIG")]
    pub config: Option<PathBuf>,
    /// The data folder
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA", default_value_os_t = default_data_dir())]
    pub data: PathBuf,
    /// sqlite:PATH or postgres://USER:PASSWORD@HOST/DATABASE; in the data folder by default
    #[arg(
        long,
        value_name = "URL",
        env = "PENSTOCK_STORE",
        hide_env_values = true
    )]
    pub store: Option<String>,
    /// The folder for archives of the log, which every process with the store must be able to reach. With a
    /// store in a file, `archive` next to it by default
    #[arg(long, value_name = "DIR", env = "PENSTOCK_ARCHIVE")]
    pub archive: Option<PathBuf>,
    /// Once a day, move events older than this from the store into archives; off by default. One process at a
    /// time does it
    #[arg(long, value_name = "AGE", env = "PENSTOCK_ARCHIVE_AFTER")]
    pub archive_after: Option<Span>,
    /// Fewer events than this are left in the store, so that a quiet installation does not get a file a day
    #[arg(
        long,
        value_name = "EVENTS",
        env = "PENSTOCK_ARCHIVE_MIN_EVENTS",
        default_value_t = 10_000
    )]
    pub archive_min_events: u64,
    /// The bus between services: local (one process), or kafka://HOST:PORT[,…]/PREFIX
    #[arg(
        long,
        value_name = "URL",
        env = "PENSTOCK_BUS",
        hide_env_values = true,
        default_value = "local"
    )]
    pub bus: String,
    #[arg(
        long,
        help = format!("Which services to run: all, or some of {}", service_names()),
        value_name = "LIST",
        env = "PENSTOCK_SERVICES",
        value_delimiter = ',',
        default_value = "all"
    )]
    pub services: Vec<String>,
    /// Leave instances running when this process ends
    #[arg(long, env = "PENSTOCK_KEEP_INSTANCES")]
    pub keep_instances: bool,
    /// Where the control API listens; port 0 picks a free one
    #[arg(
        long,
        value_name = "ADDR",
        env = "PENSTOCK_CONTROL_ADDR",
        default_value = "127.0.0.1:7070"
    )]
    pub control_addr: SocketAddr,
    /// Where the gateway listens; port 0 picks a free one
    #[arg(
        long,
        value_name = "ADDR",
        env = "PENSTOCK_GATEWAY_ADDR",
        default_value = "127.0.0.1:8080"
    )]
    pub gateway_addr: SocketAddr,
    /// Find endpoints by host name too: `{endpoint}.DOMAIN/score` is `/endpoints/{endpoint}/score`
    #[arg(long, value_name = "DOMAIN", env = "PENSTOCK_GATEWAY_DOMAIN", value_parser = domain)]
    pub gateway_domain: Option<String>,
    /// Proxies before the gateway, as CIDR,…: what they say in x-forwarded-* and forwarded is passed on, and
    /// their address added. Of other clients it is dropped
    #[arg(
        long,
        value_name = "CIDR,…",
        env = "PENSTOCK_TRUSTED_PROXIES",
        value_parser = networks,
        default_value = "",
        hide_default_value = true
    )]
    pub trusted_proxies: Networks,
    /// How much of a request's body arrives before it takes an instance: a shorter one whole. 0: bodies above
    /// 64KiB, and those of unknown length, are streamed from the start
    #[arg(
        long,
        value_name = "SIZE",
        env = "PENSTOCK_UPLOAD_BUFFER",
        default_value = "1MiB",
        value_parser = size
    )]
    pub upload_buffer: u64,
    /// Where a process without control serves health and metrics, and an actuator its instances' logs
    #[arg(
        long,
        value_name = "ADDR",
        env = "PENSTOCK_ADMIN_ADDR",
        default_value = "127.0.0.1:0"
    )]
    pub admin_addr: SocketAddr,
    /// The host name or address at which gateways reach the instances that this process starts. Instances must
    /// listen on it; they get it as {host} in their command and as PENSTOCK_HOST in their environment
    #[arg(
        long,
        value_name = "HOST",
        env = "PENSTOCK_ADVERTISE_HOST",
        default_value = "127.0.0.1",
        value_parser = host
    )]
    pub advertise_host: String,
    /// The gateway's address as clients see it; the listen address by default
    #[arg(long, value_name = "URL", env = "PENSTOCK_GATEWAY_URL")]
    pub gateway_url: Option<String>,
    /// The admin address as other processes see it; the listen address by default
    #[arg(long, value_name = "URL", env = "PENSTOCK_ADMIN_URL")]
    pub admin_url: Option<String>,
    /// The key that seals stored secrets: env:NAME or file:PATH with 32 bytes in hexadecimal, the same for
    /// every replica of control; a key in the data folder by default
    #[arg(
        long,
        value_name = "REF",
        env = "PENSTOCK_SEAL_KEY",
        hide_env_values = true
    )]
    pub seal_key: Option<String>,
    /// The token by which the processes of one installation authenticate each other: env:NAME or file:PATH
    #[arg(
        long,
        value_name = "REF",
        env = "PENSTOCK_INTERNAL_TOKEN",
        hide_env_values = true
    )]
    pub internal_token: Option<String>,
    /// A folder with the time zones for schedules, such as /usr/share/zoneinfo; the bundled ones by default.
    /// Use the same for every replica of control and autoscaler
    #[arg(long, value_name = "DIR", env = "PENSTOCK_ZONEINFO")]
    pub zoneinfo: Option<PathBuf>,
    /// A file with milliseconds by which this process's clock is off; for fault tests
    #[arg(long, value_name = "PATH", hide = true)]
    pub clock_offset_file: Option<PathBuf>,
    /// A file that receives {"control","gateway","admin"} once this process is ready
    #[arg(long, value_name = "PATH", env = "PENSTOCK_READY_FILE")]
    pub ready_file: Option<PathBuf>,
}

/// Parses the host under which others reach this machine.
fn host(text: &str) -> Result<String, String> {
    let is_valid = match text.parse::<IpAddr>() {
        Ok(ip) => !ip.is_unspecified() && !ip.is_multicast(),
        // Digits and dots that are not an address would be looked up in DNS.
        Err(_) => domain(text).is_ok() && text.bytes().any(|b| b.is_ascii_alphabetic()),
    };
    if is_valid {
        return Ok(text.to_owned());
    }
    Err(format!(
        "`{text}` is not a host that others can reach; write a name or an address without scheme and port, such as 10.0.0.7 or node-1.example.com"
    ))
}

/// The networks of a list.
#[derive(Clone, Debug, Default)]
pub struct Networks(pub Vec<IpNet>);

/// Parses networks, separated by commas; an empty text has none.
fn networks(text: &str) -> Result<Networks, String> {
    let listed = text.split(',').filter(|_| !text.trim().is_empty());
    let parsed = listed.map(|text| network(text.trim()));
    parsed.collect::<Result<_, _>>().map(Networks)
}

/// Parses a network; an address alone is one.
fn network(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().map(IpNet::from).ok();
    text.parse::<IpNet>().ok().or_else(address).ok_or_else(|| {
        format!("`{text}` is not a network; write an address and the length of its prefix, such as 10.0.0.0/8")
    })
}

/// Parses a size in bytes, up to 64MiB.
fn size(text: &str) -> Result<u64, String> {
    let (number, shift) = match text.split_once(['K', 'M']) {
        Some((number, "iB")) if text.contains('K') => (number, 10),
        Some((number, "iB")) => (number, 20),
        _ => (text, 0),
    };
    number
        .parse::<u32>()
        .ok()
        .map(|number| u64::from(number) << shift)
        .filter(|bytes| *bytes <= 64 << 20)
        .ok_or_else(|| {
            format!("`{text}` is not a size up to 64MiB; write one such as 256KiB or 1MiB")
        })
}

/// Parses a domain: what follows the endpoint's name and a dot in a Host header.
fn domain(text: &str) -> Result<String, String> {
    let label = |label: &str| {
        let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(inner)
    };
    if text.len() <= 253 && text.split('.').all(label) {
        return Ok(text.to_owned());
    }
    Err(format!(
        "`{text}` is not a domain; write it without scheme, port and dots at the ends, such as models.example.com"
    ))
}

/// Names of all services, in start order.
fn service_names() -> String {
    let service_names: Vec<&str> = Service::ALL.iter().map(|service| service.0).collect();
    service_names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_something_that_others_can_connect_to() {
        for valid in [
            "127.0.0.1",
            "10.0.0.7",
            "::1",
            "actuator",
            "node-1.example.com",
        ] {
            assert_eq!(host(valid), Ok(valid.to_owned()));
        }
        for invalid in [
            "",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "10.0.0.7:80",
            "http://a",
            "300.1.1.1",
            "a b",
        ] {
            let refused = host(invalid).unwrap_err();
            assert!(refused.contains("such as 10.0.0.7"), "{refused}");
        }
    }

    #[test]
    fn an_empty_list_of_networks_has_none() {
        assert!(networks("").unwrap().0.is_empty());
        assert_eq!(networks("10.0.0.0/8, ::1").unwrap().0.len(), 2);
        assert!(networks("10.0.0.0/8,").is_err());
    }

    #[test]
    fn a_network_is_a_prefix_or_an_address() {
        for (text, network_of) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.0.0.7", "10.0.0.7/32"),
            ("fd00::/8", "fd00::/8"),
            ("::1", "::1/128"),
        ] {
            assert_eq!(network(text).unwrap().to_string(), network_of);
        }
        for invalid in ["", "10.0.0.0/33", "10.0.0.0/8/8", "proxy.example.com"] {
            let refused = network(invalid).unwrap_err();
            assert!(refused.contains("such as 10.0.0.0/8"), "{refused}");
        }
    }

    #[test]
    fn a_size_has_a_binary_unit_and_a_limit() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("256KiB", 256 << 10),
            ("64MiB", 64 << 20),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for invalid in ["", "MiB", "1MB", "1 MiB", "-1", "65MiB", "1.5MiB", "1KMiB"] {
            let refused = size(invalid).unwrap_err();
            assert!(refused.contains("such as 256KiB"), "{refused}");
        }
    }

    #[test]
    fn a_domain_is_taken_as_it_stands_in_a_host_header() {
        for valid in ["localhost", "models.example.com", "a-1.b"] {
            assert_eq!(domain(valid), Ok(valid.to_owned()));
        }
        let long = "a".repeat(64);
        for invalid in [
            "",
            ".example.com",
            "example.com.",
            "http://a.b",
            "a.b:80",
            "a b",
            "-a.b",
            &long,
        ] {
            let refused = domain(invalid).unwrap_err();
            assert!(refused.contains("such as models.example.com"), "{refused}");
        }
    }
}
