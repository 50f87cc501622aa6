//! Fills Kafka from the store, with events as they are stored.
//!
//! Invariant: nobody else publishes meanwhile (the lease of the relay is held), and the relay's cursor
//! passes only what Kafka has confirmed, page by page, and only while the lease is ours. So it never
//! passes an event that nobody has published, and what was cut off can be gone on with.

use std::time::Duration;

use bus::{Bus, BusError};
use contract::ids::{Bucket, Position};
use contract::log::RawRecord;
use runtime::relay::RELAY;
use serde::Serialize;
use store::{Commit, CursorMove, Fence, Store};
use tokio::time::{Instant, sleep};

use super::lease::{Lease, holding};
use super::waiting::told;
use super::{Progress, RepublishArgs, failed, is_kafka, shown};
use cli::error::CliError;
use cli::output::remark;

/// Events that wait for Kafka's word at once.
const PAGE: usize = 2_000;

/// Tries of a page, each of which waits for the brokers itself for so long.
const TRIES: u32 = 3;
const TRY: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_secs(1);

/// How long is waited for a broker before anything is published.
const BROKER_PATIENCE: Duration = Duration::from_secs(30);
const ASK_EVERY: Duration = Duration::from_millis(200);

/// By then it is known why none answers.
const REASON_AFTER: Duration = Duration::from_secs(10);

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Republished {
    published: u64,
    /// The relay goes on from here.
    up_to: Position,
}

pub async fn republish(args: &RepublishArgs) -> Result<(), CliError> {
    if !is_kafka(&args.to) {
        return Err(CliError::Usage(
            "--to names no Kafka: write kafka://HOST:PORT/PREFIX".to_owned(),
        ));
    }
    let store = args.which.open().await?;
    let done = with_bus(&store, args).await;
    store.close().await;
    let done = done?;
    let text = format!(
        "{} events published to {}, up to position {}; the relay goes on from there",
        done.published,
        shown(&args.to),
        done.up_to
    );
    args.output.show(&text, &done)
}

async fn with_bus(store: &Store, args: &RepublishArgs) -> Result<Republished, CliError> {
    let until = Instant::now() + BROKER_PATIENCE;
    let waiting = || {
        format!(
            "waiting for {}, which has not answered yet: gives up after {} s",
            shown(&args.to),
            BROKER_PATIENCE.as_secs()
        )
    };
    let opened = told(bus::open(&args.to), waiting).await;
    let bus = opened.map_err(|error| match error {
        BusError::Url { url, reason } => CliError::Usage(format!("--to {url}: {reason}")),
        error => failed(error),
    })?;
    let done = match answers(&*bus, until).await {
        Ok(()) => with_lease(store, &*bus, Position(args.after)).await,
        Err(away) => Err(away),
    };
    bus.close().await;
    done
}

/// Waits until the bus works. What the matter is, is said before the end: it may be for people to mend.
async fn answers(bus: &dyn Bus, until: Instant) -> Result<(), CliError> {
    let mut said = false;
    while let Some(trouble) = bus.trouble() {
        // A server's option has the same settings.
        let trouble = trouble.replace("--bus", "--to");
        if Instant::now() >= until {
            return Err(CliError::NoServer(format!(
                "{trouble}. Nothing is published: see to it, and start this again"
            )));
        }
        if !said && Instant::now() + BROKER_PATIENCE >= until + REASON_AFTER {
            remark(&format!("still waiting: {trouble}"));
            said = true;
        }
        sleep(ASK_EVERY).await;
    }
    Ok(())
}

async fn with_lease(
    store: &Store,
    bus: &dyn Bus,
    after: Position,
) -> Result<Republished, CliError> {
    let lease = Lease {
        name: RELAY,
        taken: format!(
            "another process publishes this store's log (it holds the lease `{RELAY}`): stop the \
             services that share the store first"
        ),
        lost: format!(
            "another process has taken the lease `{RELAY}` and publishes: start this again when no \
             other does"
        ),
    };
    holding(store, &lease, async |fence| {
        let carried = relayed(store).await?;
        check_after(after, carried)?;
        publish(store, bus, &fence, after).await
    })
    .await
}

/// What stands between the cursor and a position above it, nobody would ever publish.
fn check_after(after: Position, carried: Position) -> Result<(), CliError> {
    if after <= carried {
        return Ok(());
    }
    Err(CliError::Usage(format!(
        "--after {after}: the relay of this store has published up to position {carried}, and the \
         events between would never be; use --after {carried}, or a lower one"
    )))
}

async fn relayed(store: &Store) -> Result<Position, CliError> {
    store.cursor(RELAY, Bucket::GLOBAL).await.map_err(failed)
}

/// Publishes what is in the log now, above a position.
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
        hand_over(bus, &page, done.up_to).await?;
        done.published += page.len() as u64;
        done.up_to = last;
        move_cursor(store, fence, last).await?;
        progress.say(last.0, head.0);
    }
    Ok(done)
}

/// The same again after an error: what is there twice does no harm.
async fn hand_over(bus: &dyn Bus, page: &[RawRecord], after: Position) -> Result<(), CliError> {
    let mut tries = 1;
    loop {
        let waiting = || {
            format!(
                "waiting for Kafka's word on events above position {after}: gives up after about {} s",
                u64::from(TRIES - tries + 1) * TRY.as_secs()
            )
        };
        match told(bus.publish_stored(page), waiting).await {
            Ok(()) => return Ok(()),
            Err(error @ BusError::NotPublished { .. }) if tries < TRIES => {
                remark(&format!(
                    "{error}. Tries again ({tries} of {TRIES} times failed)"
                ));
                tries += 1;
                sleep(PAUSE).await;
            }
            Err(error) => {
                return Err(failed(format!(
                    "{error}. Everything up to position {after} is published: go on with --after {after}"
                )));
            }
        }
    }
}

async fn move_cursor(store: &Store, fence: &Fence, to: Position) -> Result<(), CliError> {
    let from = relayed(store).await?;
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
