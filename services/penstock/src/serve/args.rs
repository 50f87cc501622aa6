//! The flags of `penstock serve`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use cli::client::config::default_data_dir;
use contract::time::Span;

use super::services::SERVICES;

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
      ca=FILE names other certificate authorities than the system's, cert=FILE and key=FILE a certificate of ours
  --store 'postgres://penstock@db/penstock?sslmode=verify-full&sslrootcert=FILE'
      the password comes from the file that PGPASSFILE names

The server's address and an admin's token are written to DATA/client.json, where the other commands
find them (PENSTOCK_CONFIG names another file).")]
pub struct ServeArgs {
    /// A configuration file
    #[arg(long, value_name = "FILE", env = "PENSTOCK_SERVE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Where everything is kept
    #[arg(long, value_name = "DIR", env = "PENSTOCK_DATA", default_value_os_t = default_data_dir())]
    pub data: PathBuf,
    /// sqlite:PATH or postgres://USER:PASSWORD@HOST/DATABASE; in the data directory unless given
    #[arg(
        long,
        value_name = "URL",
        env = "PENSTOCK_STORE",
        hide_env_values = true
    )]
    pub store: Option<String>,
    /// Where archives of the log are, and are made: a folder that every process with the store reaches. With
    /// a store in a file, `archive` beside it unless given
    #[arg(long, value_name = "DIR", env = "PENSTOCK_ARCHIVE")]
    pub archive: Option<PathBuf>,
    /// Once a day, move what is older than this from the store into archives; never unless given. One process
    /// at a time does it
    #[arg(long, value_name = "AGE", env = "PENSTOCK_ARCHIVE_AFTER")]
    pub archive_after: Option<Span>,
    /// How services hear of each other: local (one process), or kafka://HOST:PORT[,…]/PREFIX
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
        help = format!("Which services to run: all, or some of {}", names()),
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
    /// Where a process without control serves health and metrics, and an actuator the output of its instances
    #[arg(
        long,
        value_name = "ADDR",
        env = "PENSTOCK_ADMIN_ADDR",
        default_value = "127.0.0.1:0"
    )]
    pub admin_addr: SocketAddr,
    /// The host under which gateways reach the instances that this process starts: a name or an address. They
    /// are told to listen on it, by {host} in their command and by PENSTOCK_HOST in their environment
    #[arg(
        long,
        value_name = "HOST",
        env = "PENSTOCK_ADVERTISE_HOST",
        default_value = "127.0.0.1",
        value_parser = host
    )]
    pub advertise_host: String,
    /// The gateway's address as clients see it; what it listens on unless given
    #[arg(long, value_name = "URL", env = "PENSTOCK_GATEWAY_URL")]
    pub gateway_url: Option<String>,
    /// The admin address as other processes see it; what it listens on unless given
    #[arg(long, value_name = "URL", env = "PENSTOCK_ADMIN_URL")]
    pub admin_url: Option<String>,
    /// Where the key is that seals stored secrets: env:NAME or file:PATH with 32 bytes in hexadecimal, the
    /// same for every replica of control; in the data directory unless given
    #[arg(
        long,
        value_name = "REF",
        env = "PENSTOCK_SEAL_KEY",
        hide_env_values = true
    )]
    pub seal_key: Option<String>,
    /// Where the token is by which the processes of one installation trust each other: env:NAME or file:PATH
    #[arg(
        long,
        value_name = "REF",
        env = "PENSTOCK_INTERNAL_TOKEN",
        hide_env_values = true
    )]
    pub internal_token: Option<String>,
    /// A folder with the time zones that schedules go by (/usr/share/zoneinfo); those that came with this
    /// program unless given. Give every replica of control and autoscaler the same
    #[arg(long, value_name = "DIR", env = "PENSTOCK_ZONEINFO")]
    pub zoneinfo: Option<PathBuf>,
    /// A file with milliseconds by which this process's clock is off; for fault tests
    #[arg(long, value_name = "PATH", hide = true)]
    pub clock_offset_file: Option<PathBuf>,
    /// A file that receives {"control","gateway","admin"} once this process is ready
    #[arg(long, value_name = "PATH", env = "PENSTOCK_READY_FILE")]
    pub ready_file: Option<PathBuf>,
}

/// Where others reach this machine: something that a connection can be made to.
fn host(text: &str) -> Result<String, String> {
    let found = match text.parse::<IpAddr>() {
        Ok(ip) => !ip.is_unspecified() && !ip.is_multicast(),
        // Digits and dots that are no address would be asked of the name service.
        Err(_) => domain(text).is_ok() && text.bytes().any(|b| b.is_ascii_alphabetic()),
    };
    if found {
        return Ok(text.to_owned());
    }
    Err(format!(
        "`{text}` is not a host that others can reach; write a name or an address without scheme and port, such as 10.0.0.7 or node-1.example.com"
    ))
}

/// A domain as it stands in a Host header after the endpoint's name and a dot.
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

/// Of all services, in the order in which they are started.
fn names() -> String {
    let names: Vec<&str> = SERVICES.iter().map(|entry| entry.name.0).collect();
    names.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_something_that_others_can_connect_to() {
        for sound in [
            "127.0.0.1",
            "10.0.0.7",
            "::1",
            "actuator",
            "node-1.example.com",
        ] {
            assert_eq!(host(sound), Ok(sound.to_owned()));
        }
        for wrong in [
            "",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "10.0.0.7:80",
            "http://a",
            "300.1.1.1",
            "a b",
        ] {
            let refused = host(wrong).unwrap_err();
            assert!(refused.contains("such as 10.0.0.7"), "{refused}");
        }
    }

    #[test]
    fn a_domain_is_taken_as_it_stands_in_a_host_header() {
        for sound in ["localhost", "models.example.com", "a-1.b"] {
            assert_eq!(domain(sound), Ok(sound.to_owned()));
        }
        let long = "a".repeat(64);
        for wrong in [
            "",
            ".example.com",
            "example.com.",
            "http://a.b",
            "a.b:80",
            "a b",
            "-a.b",
            &long,
        ] {
            let refused = domain(wrong).unwrap_err();
            assert!(refused.contains("such as models.example.com"), "{refused}");
        }
    }
}
