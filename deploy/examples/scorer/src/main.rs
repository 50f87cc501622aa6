//! A small example model server without any dependency on Penstock: listens on a given port, answers
//! `GET /` when it is ready, and scores `POST /score`.
//!
//! Invariant: SIGTERM stops it without dropping an accepted request.

mod model;
mod server;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use model::Model;
use server::{Log, Server};

/// Scores iris flowers over HTTP
#[derive(Parser)]
#[command(name = "penstock-scorer", version)]
struct Args {
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 picks a free one and prints it
    #[arg(long)]
    port: u16,
    /// Neurons in each hidden layer: the variant of the model
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    hidden: u16,
    /// Networks in the ensemble; each flower costs all of them
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    work: u32,
    /// Wait before listening, to simulate loading a large model: 500ms, 2s
    #[arg(long, default_value = "0s", value_parser = duration)]
    startup_delay: Duration,
    /// Wait in each request, without using the processor: 500ms, 2s
    #[arg(long, default_value = "0s", value_parser = duration)]
    delay: Duration,
    /// Log level: 0 nothing, 1 start and stop, 2 also each request
    #[arg(long, env = "LEVEL", default_value_t = 1)]
    level: u8,
}

fn duration(text: &str) -> Result<Duration, String> {
    let parse = |number: &str| number.parse::<u64>().ok();
    let found = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => parse(number).map(Duration::from_millis),
        (None, Some(number)) => parse(number).map(Duration::from_secs),
        (None, None) => None,
    };
    found.ok_or_else(|| "write a whole number with its unit: 500ms or 2s".to_owned())
}

#[tokio::main(worker_threads = 2)]
async fn main() -> ExitCode {
    let args = Args::parse();
    match serve(args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-scorer: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: Args) -> io::Result<()> {
    // Before anything else, so that a signal during startup does not kill the process.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let log = Log::new(args.level);
    let model = Arc::new(Model::new(args.hidden.into(), args.work as usize));
    tokio::select! {
        () = tokio::time::sleep(args.startup_delay) => {}
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }

    let listener = TcpListener::bind((args.host, args.port))
        .await
        .map_err(|error| {
            io::Error::new(
                error.kind(),
                format!(
                    "cannot listen on {}: {error}",
                    SocketAddr::new(args.host, args.port)
                ),
            )
        })?;
    log.line(
        1,
        &format!(
            "listening on {}, hidden {}, work {}",
            listener.local_addr()?,
            args.hidden,
            args.work
        ),
    );
    let server = Server::new(model, args.delay, log);
    let stopped = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    server.run(listener, stopped).await;
    log.line(1, "stopped");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("2s"), Ok(Duration::from_secs(2)));
        for wrong in ["", "2", "s", "-1s", "1.5s", "1m"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn arguments_are_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }
}
