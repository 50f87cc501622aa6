//! Tasks that stop together, and in which order.

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// In the order in which they are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StageName {
    /// What clients speak to.
    Doors,
    /// What decides.
    Engines,
    /// What acts on instances.
    Hands,
    /// What carries and counts the log.
    Log,
}

/// All stages of a process.
#[derive(Default)]
pub struct Stages {
    doors: Stage,
    engines: Stage,
    hands: Stage,
    log: Stage,
}

impl Stages {
    pub fn of(&mut self, name: StageName) -> &mut Stage {
        match name {
            StageName::Doors => &mut self.doors,
            StageName::Engines => &mut self.engines,
            StageName::Hands => &mut self.hands,
            StageName::Log => &mut self.log,
        }
    }

    /// Stops one after the other; each has ended before the next is told to.
    pub async fn end(self) {
        let Self {
            doors,
            engines,
            hands,
            log,
        } = self;
        for stage in [doors, engines, hands, log] {
            stage.end().await;
        }
    }
}

/// Tasks that stop together.
#[derive(Default)]
pub struct Stage {
    pub stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Stage {
    pub fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(task));
    }

    async fn end(self) {
        self.stop.cancel();
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task ended badly");
            }
        }
    }
}
