//! The host under which instances of this node are reached, and the address that they listen on.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};

use serde::{Deserialize, Serialize};

/// A host name or address, as used by gateways.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    /// The name in routes.
    name: String,
    /// The address that instances listen on.
    listen: IpAddr,
}

impl Default for Host {
    /// Loopback: reachable from this machine only.
    fn default() -> Self {
        Self {
            name: Ipv4Addr::LOCALHOST.to_string(),
            listen: Ipv4Addr::LOCALHOST.into(),
        }
    }
}

/// A host name that cannot be resolved.
#[derive(Debug, thiserror::Error)]
#[error("the host `{name}` cannot be found ({source})")]
pub struct UnknownHost {
    name: String,
    source: io::Error,
}

impl Host {
    /// Resolves the name, which may block. Instances listen on the resulting address only. If this machine
    /// does not have that address, it is assumed to be translated (NAT), and they listen on all addresses.
    ///
    /// # Errors
    ///
    /// [`UnknownHost`] if the name cannot be resolved.
    pub fn advertised(name: &str) -> Result<Self, UnknownHost> {
        let resolved = match name.parse::<IpAddr>() {
            Ok(ip) => Some(ip),
            Err(_) => resolve(name)?,
        };
        let own = resolved.filter(|ip| TcpListener::bind((*ip, 0)).is_ok());
        if own.is_none() {
            tracing::warn!(
                host = name,
                listen = "all addresses",
                "advertised address is not of this machine"
            );
        }
        Ok(Self {
            name: name.to_owned(),
            listen: own.unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
        })
    }

    pub(super) fn listen(&self) -> IpAddr {
        self.listen
    }

    /// The address in routes.
    pub(super) fn address(&self, port: u16) -> String {
        match self.name.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, port).to_string(),
            Err(_) => format!("{}:{port}", self.name),
        }
    }

    /// The address at which this node probes an instance.
    pub(super) fn probe_address(&self, port: u16) -> SocketAddr {
        let ip = match self.listen.is_unspecified() {
            true => Ipv4Addr::LOCALHOST.into(),
            false => self.listen,
        };
        SocketAddr::new(ip, port)
    }
}

/// Prefers IPv4: many model servers support nothing else.
fn resolve(name: &str) -> Result<Option<IpAddr>, UnknownHost> {
    let addresses = (name, 0).to_socket_addrs().map_err(|source| UnknownHost {
        name: name.to_owned(),
        source,
    })?;
    let mut addresses: Vec<IpAddr> = addresses.map(|address| address.ip()).collect();
    addresses.sort_by_key(IpAddr::is_ipv6);
    Ok(addresses.first().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_listen_on_the_advertised_address_if_this_machine_has_it() {
        let host = Host::advertised("127.0.0.2").unwrap();
        assert_eq!(host.listen().to_string(), "127.0.0.2");
        assert_eq!(host.address(80), "127.0.0.2:80");
        assert_eq!(host.probe_address(80).to_string(), "127.0.0.2:80");
    }

    #[test]
    fn behind_a_translated_address_instances_listen_on_all_and_are_probed_on_loopback() {
        // Reserved for documentation: no machine has it.
        let host = Host::advertised("192.0.2.1").unwrap();
        assert_eq!(host.listen().to_string(), "0.0.0.0");
        assert_eq!(host.address(80), "192.0.2.1:80");
        assert_eq!(host.probe_address(80).to_string(), "127.0.0.1:80");
    }

    #[test]
    fn a_name_stays_a_name_in_the_routes() {
        let host = Host::advertised("localhost").unwrap();
        assert_eq!(host.address(80), "localhost:80");
        assert!(host.listen().is_loopback());
    }

    #[test]
    fn an_ipv6_address_is_written_in_brackets() {
        let host = Host {
            name: "::1".to_owned(),
            ..Host::default()
        };
        assert_eq!(host.address(80), "[::1]:80");
    }

    #[test]
    fn a_name_that_cannot_be_resolved_is_refused() {
        let refused = Host::advertised("no-such-host.invalid").unwrap_err();
        assert!(
            refused.to_string().contains("no-such-host.invalid"),
            "{refused}"
        );
    }
}
