//! Tests of the servers: they start, end with their owner, and can be killed and restarted.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use servers::{Kafka, Postgres};

/// Whether a broker answers an ApiVersions request.
fn answers(address: &str) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return false;
    };
    let request = [0, 0, 0, 10, 0, 18, 0, 0, 0, 0, 0, 1, 0xff, 0xff];
    stream
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    stream.write_all(&request).is_ok() && stream.read_exact(&mut [0; 8]).is_ok()
}

#[test]
fn a_killed_broker_restarts_at_the_same_address() {
    let Some(kafka) = Kafka::start(1) else { return };
    let address = kafka.addresses().to_owned();
    assert!(answers(&address));
    kafka.kill(0);
    assert!(!answers(&address));
    kafka.restart(0);
    assert!(answers(&address));
    kafka.pause(0);
    assert!(!answers(&address));
    kafka.resume(0);
    assert!(answers(&address));
    drop(kafka);
    assert!(!answers(&address));
}

#[test]
fn a_database_survives_the_kill_of_its_server() {
    let Some(postgres) = Postgres::start() else {
        return;
    };
    let first = postgres.database();
    assert_ne!(first, postgres.database());
    postgres.kill();
    postgres.restart();
    postgres.stop();
    postgres.restart();
    let taken = std::panic::catch_unwind(|| postgres.database());
    assert!(taken.is_ok());
}
