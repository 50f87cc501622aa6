//! Publishes the stored log to Kafka, byte for byte.
//!
//! Invariant: nobody else publishes meanwhile (the relay's lease is held), and the relay's cursor advances
//! only past what Kafka has confirmed, page by page, and only while the lease is ours. So it never passes
//! an unpublished event, and an interrupted run can be continued.

use std::time::Duration;

use bus::{Bus, BusError};
use contract::ids::{Bucket, Position};
use contract::log::RawRecord;
use runtime::relay::RELAY;
use serde::Serialize;
use store::{Commit, CursorMove, Fence, Store};
use tokio::time::{Instant, sleep};

use super::lease::{LeaseRequest, run_under_lease};
use super::slow_notice::notice_if_slow;
use super::{Progress, RepublishArgs, failed, is_kafka_url, without_options};
use cli::error::CliError;
use cli::output::print_notice;

/// Number of events published per batch.
const PAGE: usize = 2_000;

/// Attempts per page, and how long each waits for the brokers.
const ATTEMPTS: u32 = 3;
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// How long to wait for a broker before publishing.
const BROKER_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// How long to wait before reporting why no broker answers.
const REASON_NOTICE_AFTER: Duration = Duration::from_secs(10);

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Republished {
    published: u64,
    /// The relay continues from here.
    up_to: Position,
}

pub async fn republish(args: &RepublishArgs) -> Result<(), CliError> {
    if !is_kafka_url(&args.to) {
        return Err(CliError::Usage(
            "--to is not a Kafka URL: write kafka://HOST:PORT/PREFIX".to_owned(),
        ));
    }
    let store = args.selector.open().await?;
    let done = with_bus(&store, args).await;
    store.close().await;
    let done = done?;
    let text = format!(
        "{} events published to {}, up to position {}; the relay continues from there",
        done.published,
        without_options(&args.to),
        done.up_to
    );
    args.output.print(&text, &done)
}

async fn with_bus(store: &Store, args: &RepublishArgs) -> Result<Republished, CliError> {
    let deadline = Instant::now() + BROKER_TIMEOUT;
    let notice = || {
        format!(
            "waiting for {}, which has not answered yet: gives up after {} s",
            without_options(&args.to),
            BROKER_TIMEOUT.as_secs()
        )
    };
    let opened = notice_if_slow(bus::open(&args.to), notice).await;
    let bus = opened.map_err(|error| match error {
        BusError::Url {
            url,
            reason,
            source,
        } => {
            let refused = CliError::Usage(format!("--to {url}: {reason}"));
            match source {
                Some(source) => refused.caused_by(source),
                None => refused,
            }
        }
        error => failed(error),
    })?;
    let done = match wait_until_reachable(&*bus, deadline).await {
        Ok(()) => publish_under_lease(store, &*bus, Position(args.after)).await,
        Err(unreachable) => Err(unreachable),
    };
    bus.close().await;
    done
}

/// Waits until the bus is reachable. The problem is reported before the timeout, since an operator may be
/// able to fix it.
async fn wait_until_reachable(bus: &dyn Bus, deadline: Instant) -> Result<(), CliError> {
    let mut is_reported = false;
    while let Some(problem) = bus.problem() {
        // The message names the server's option.
        let problem = problem.replace("--bus", "--to");
        if Instant::now() >= deadline {
            return Err(CliError::NoServer(format!(
                "{problem}. Nothing was published: fix the problem, and run this again"
            )));
        }
        if !is_reported && Instant::now() + BROKER_TIMEOUT >= deadline + REASON_NOTICE_AFTER {
            print_notice(&format!("still waiting: {problem}"));
            is_reported = true;
        }
        sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

async fn publish_under_lease(
    store: &Store,
    bus: &dyn Bus,
    after: Position,
) -> Result<Republished, CliError> {
    let lease = LeaseRequest {
        name: RELAY,
        busy_message: format!(
            "another process publishes this store's log (it holds the lease `{RELAY}`): stop the \
             services that share the store first"
        ),
        lost_message: format!(
            "another process has taken the lease `{RELAY}` and publishes: run this again when no \
             other process does"
        ),
    };
    run_under_lease(store, &lease, async |fence| {
        let relayed = relay_cursor(store).await?;
        check_after(after, relayed)?;
        publish(store, bus, &fence, after).await
    })
    .await
}

/// Refuses to start beyond the relay's cursor: the events between would never be published.
fn check_after(after: Position, relayed: Position) -> Result<(), CliError> {
    if after <= relayed {
        return Ok(());
    }
    Err(CliError::Usage(format!(
        "--after {after}: the relay of this store has published up to position {relayed}, and the \
         events between would never be published; use --after {relayed}, or a lower one"
    )))
}

async fn relay_cursor(store: &Store) -> Result<Position, CliError> {
    store.cursor(RELAY, Bucket::GLOBAL).await.map_err(failed)
}

/// Publishes the current log after a position.
async fn publish(
    store: &Store,
    bus: &dyn Bus,
    fence: &Fence,
    after: Position,
) -> Result<Republished, CliError> {
    let head = store.head().await.map_err(failed)?;
    let mut progress = Progress::new("published up to position");
    let mut done = Republished {
        published: 0,
        up_to: after.min(head),
    };
    while done.up_to < head {
        let page = store.read_raw(done.up_to, PAGE).await;
        let mut page = page.map_err(failed)?;
        page.retain(|event| event.position <= head);
        let Some(last) = page.last().map(|event| event.position) else {
            break;
        };
        publish_page(bus, &page, done.up_to).await?;
        done.published += page.len() as u64;
        done.up_to = last;
        move_cursor(store, fence, last).await?;
        progress.report(last.0, head.0);
    }
    Ok(done)
}

/// Publishes a page, with retries: duplicates are harmless.
async fn publish_page(bus: &dyn Bus, page: &[RawRecord], after: Position) -> Result<(), CliError> {
    let mut attempt = 1;
    loop {
        let notice = || {
            format!(
                "waiting for Kafka to confirm events above position {after}: gives up after about {} s",
                u64::from(ATTEMPTS - attempt + 1) * ATTEMPT_TIMEOUT.as_secs()
            )
        };
        match notice_if_slow(bus.publish_stored(page), notice).await {
            Ok(()) => return Ok(()),
            Err(error @ BusError::NotPublished { .. }) if attempt < ATTEMPTS => {
                print_notice(&format!(
                    "{error}. Retrying (attempt {attempt} of {ATTEMPTS} failed)"
                ));
                attempt += 1;
                sleep(RETRY_DELAY).await;
            }
            Err(error) => {
                let sentence = format!(
                    "{error}. Everything up to position {after} is published: continue with --after {after}"
                );
                return Err(CliError::Failed(sentence).caused_by(error));
            }
        }
    }
}

async fn move_cursor(store: &Store, fence: &Fence, to: Position) -> Result<(), CliError> {
    let from = relay_cursor(store).await?;
    if from >= to {
        return Ok(());
    }
    let commit = Commit {
        cursor: Some(CursorMove {
            consumer: RELAY,
            bucket: Bucket::GLOBAL,
            from,
            to,
        }),
        fence: Some(fence.clone()),
        ..Commit::default()
    };
    store.commit(commit).await.map(|_| ()).map_err(failed)
}
