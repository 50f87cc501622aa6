//! Sockets that listen, and the processes that have them.
//!
//! What cannot be inspected because of a resource shortage is an error, never an empty result.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};

use procfs::net::TcpState;
use procfs::process::{FDTarget, Process};

use super::os::live_processes;
use super::shortage::proc_unless_shortage;

/// What some processes listen on.
#[derive(Clone, Debug, Default)]
pub(super) struct Listening {
    /// The processes, with the address of each of their sockets.
    pub sockets: Vec<(i32, SocketAddr)>,
    /// Whether all their sockets are known: descriptors of a process that changed its user cannot be read.
    pub is_complete: bool,
}

impl Listening {
    /// Whether one of them listens on the port. Unknown counts as yes.
    pub(super) fn has_port(&self, port: u16) -> bool {
        !self.is_complete || self.on(port).next().is_some()
    }

    /// The processes that listen on the port, as far as that is known.
    pub(super) fn on(&self, port: u16) -> impl Iterator<Item = i32> {
        let on_port = move |(_, address): &&(i32, SocketAddr)| address.port() == port;
        self.sockets.iter().filter(on_port).map(|(pid, _)| *pid)
    }

    /// The sockets that others on the network reach although they were to listen on `told`, a loopback
    /// address.
    pub(super) fn exposed(&self, told: IpAddr) -> BTreeSet<SocketAddr> {
        let is_exposed =
            |address: &SocketAddr| told.is_loopback() && !address.ip().to_canonical().is_loopback();
        let addresses = self.sockets.iter().map(|(_, address)| *address);
        addresses.filter(is_exposed).collect()
    }
}

/// What the processes listen on.
pub(super) fn listening(pids: &[i32]) -> io::Result<Listening> {
    let Some(sockets) = listening_sockets()? else {
        return Ok(Listening::default());
    };
    let mut listening = Listening {
        sockets: Vec::new(),
        is_complete: true,
    };
    for pid in pids {
        match inodes(*pid)? {
            Some(inodes) => {
                let own = inodes.iter().filter_map(|inode| sockets.get(inode));
                listening
                    .sockets
                    .extend(own.map(|address| (*pid, *address)));
            }
            None => listening.is_complete = false,
        }
    }
    Ok(listening)
}

/// The processes that listen on the port, as far as that can be seen, by id with their names.
pub(super) fn listeners(port: u16) -> io::Result<BTreeMap<i32, String>> {
    let mut listeners = BTreeMap::new();
    let mut sockets = listening_sockets()?.unwrap_or_default();
    sockets.retain(|_, address| address.port() == port);
    if sockets.is_empty() {
        return Ok(listeners);
    }
    for stat in live_processes()? {
        let inodes = inodes(stat.pid)?.unwrap_or_default();
        if inodes.iter().any(|inode| sockets.contains_key(inode)) {
            listeners.insert(stat.pid, stat.comm);
        }
    }
    Ok(listeners)
}

/// The sockets that listen, by inode; `None` if they cannot be read.
fn listening_sockets() -> io::Result<Option<BTreeMap<u64, SocketAddr>>> {
    let Some(mut sockets) = proc_unless_shortage(procfs::net::tcp())? else {
        return Ok(None);
    };
    sockets.extend(proc_unless_shortage(procfs::net::tcp6())?.unwrap_or_default());
    let listening = sockets
        .into_iter()
        .filter(|socket| socket.state == TcpState::Listen);
    Ok(Some(
        listening
            .map(|socket| (socket.inode, socket.local_address))
            .collect(),
    ))
}

/// The sockets of a process; `None` if its descriptors cannot be read.
fn inodes(pid: i32) -> io::Result<Option<BTreeSet<u64>>> {
    let descriptors = Process::new(pid).and_then(|process| process.fd());
    let socket = |fd: procfs::process::FDInfo| match fd.target {
        FDTarget::Socket(inode) => Some(inode),
        _ => None,
    };
    Ok(proc_unless_shortage(descriptors)?
        .map(|descriptors| descriptors.flatten().filter_map(socket).collect()))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn only_sockets_beyond_loopback_are_exposed_and_only_if_loopback_was_told() {
        let loopback: IpAddr = "127.0.0.1".parse().unwrap();
        let bound = ["127.0.0.1:0", "0.0.0.0:0", "[::ffff:127.0.0.2]:0"];
        let bound = bound.map(|address| TcpListener::bind(address).unwrap());
        let [own, open, mapped] = bound.map(|socket| (socket.local_addr().unwrap(), socket));
        let found = listening(&[std::process::id() as i32]).unwrap();
        assert!(found.has_port(own.0.port()) && found.has_port(mapped.0.port()));
        let exposed = found.exposed(loopback);
        assert!(exposed.contains(&open.0), "{exposed:?}");
        assert!(!exposed.contains(&own.0) && !exposed.contains(&mapped.0));
        assert!(found.exposed("0.0.0.0".parse().unwrap()).is_empty());
    }
}
