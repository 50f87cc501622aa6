//! Reports what a command is waiting for, if that takes a while.

use std::pin::pin;
use std::time::Duration;

use tokio::time::sleep;

use cli::output::print_notice;

/// How long to wait before printing the notice.
const NOTICE_AFTER: Duration = Duration::from_secs(2);

/// Returns the result of `work`; prints `notice` once if that takes longer than [`NOTICE_AFTER`].
pub async fn notice_if_slow<T>(
    work: impl Future<Output = T>,
    notice: impl FnOnce() -> String,
) -> T {
    let mut work = pin!(work);
    tokio::select! {
        biased;
        done = &mut work => return done,
        () = sleep(NOTICE_AFTER) => print_notice(&notice()),
    }
    work.await
}
