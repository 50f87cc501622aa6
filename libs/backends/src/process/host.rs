//! Under which host the instances of this node are reached, and where they listen for that.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, ToSocketAddrs};

use serde::{Deserialize, Serialize};

/// A name or an address, as gateways use it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    /// What stands in the routes.
    name: String,
    /// What instances are told to listen on.
    listen: IpAddr,
}

impl Default for Host {
    /// Reachable from this machine only.
    fn default() -> Self {
        Self {
            name: Ipv4Addr::LOCALHOST.to_string(),
            listen: Ipv4Addr::LOCALHOST.into(),
        }
    }
}

/// A name without an address.
#[derive(Debug, thiserror::Error)]
#[error("the host `{name}` cannot be found ({source})")]
pub struct UnknownHost {
    name: String,
    source: io::Error,
}

impl Host {
    /// Instances listen on the address that the name has here, so that they are reached by it and by
    /// no other. One that this machine does not have is translated on the way: then they listen on
    /// all. Asks for the address, which may take its time.
    ///
    /// # Errors
    ///
    /// [`UnknownHost`], for who wrote the name: it has no address.
    pub fn advertised(name: &str) -> Result<Self, UnknownHost> {
        let resolved = match name.parse::<IpAddr>() {
            Ok(ip) => Some(ip),
            Err(_) => resolve(name)?,
        };
        let own = resolved.filter(|ip| TcpListener::bind((*ip, 0)).is_ok());
        if own.is_none() {
            tracing::warn!(
                host = name,
                "this machine has no such address: instances listen on all of its addresses"
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

    /// For the routes.
    pub(super) fn address(&self, port: u16) -> String {
        match self.name.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, port).to_string(),
            Err(_) => format!("{}:{port}", self.name),
        }
    }

    /// Where this machine itself asks an instance.
    pub(super) fn probed(&self, port: u16) -> SocketAddr {
        let ip = match self.listen.is_unspecified() {
            true => Ipv4Addr::LOCALHOST.into(),
            false => self.listen,
        };
        SocketAddr::new(ip, port)
    }
}

/// IPv4 first: many a model server knows nothing else.
fn resolve(name: &str) -> Result<Option<IpAddr>, UnknownHost> {
    let found = (name, 0).to_socket_addrs().map_err(|source| UnknownHost {
        name: name.to_owned(),
        source,
    })?;
    let mut found: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    found.sort_by_key(IpAddr::is_ipv6);
    Ok(found.first().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_listen_on_the_address_that_is_advertised_where_this_machine_has_it() {
        let host = Host::advertised("127.0.0.2").unwrap();
        assert_eq!(host.listen().to_string(), "127.0.0.2");
        assert_eq!(host.address(80), "127.0.0.2:80");
        assert_eq!(host.probed(80).to_string(), "127.0.0.2:80");
    }

    #[test]
    fn behind_a_translated_address_they_listen_on_all_and_are_asked_on_loopback() {
        // For documentation: no machine has it.
        let host = Host::advertised("192.0.2.1").unwrap();
        assert_eq!(host.listen().to_string(), "0.0.0.0");
        assert_eq!(host.address(80), "192.0.2.1:80");
        assert_eq!(host.probed(80).to_string(), "127.0.0.1:80");
    }

    #[test]
    fn a_name_stays_a_name_in_the_routes() {
        let host = Host::advertised("localhost").unwrap();
        assert_eq!(host.address(80), "localhost:80");
        assert!(host.listen().is_loopback());
    }

    #[test]
    fn an_address_of_version_six_is_written_in_brackets() {
        let host = Host {
            name: "::1".to_owned(),
            ..Host::default()
        };
        assert_eq!(host.address(80), "[::1]:80");
    }

    #[test]
    fn a_name_that_nobody_knows_is_refused() {
        let refused = Host::advertised("no-such-host.invalid").unwrap_err();
        assert!(
            refused.to_string().contains("no-such-host.invalid"),
            "{refused}"
        );
    }
}
