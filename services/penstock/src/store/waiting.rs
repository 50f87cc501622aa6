//! Says what a command waits for, when it takes longer than a moment.

use std::pin::pin;
use std::time::Duration;

use tokio::time::sleep;

use cli::output::remark;

/// Nobody wonders before.
const MOMENT: Duration = Duration::from_secs(2);

/// The outcome of `work`. `what` is said once if that is not there within a moment.
pub async fn told<T>(work: impl Future<Output = T>, what: impl FnOnce() -> String) -> T {
    let mut work = pin!(work);
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = sleep(MOMENT) => remark(&what()),
    }
    work.await
}
