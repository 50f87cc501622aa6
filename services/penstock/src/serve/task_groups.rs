//! Groups of tasks that stop together, and the order in which the groups stop.

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// In stop order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskGroupName {
    /// What clients connect to.
    Listeners,
    /// What makes decisions: the autoscaler and the planner.
    Controllers,
    /// What starts and stops instances.
    NodeAgent,
    /// The relay, the archiver and the meter, and what the other groups rely on.
    Log,
}

/// All task groups of a process.
#[derive(Default)]
pub struct TaskGroups {
    listeners: TaskGroup,
    controllers: TaskGroup,
    node_agent: TaskGroup,
    log: TaskGroup,
}

impl TaskGroups {
    pub fn of(&mut self, name: TaskGroupName) -> &mut TaskGroup {
        match name {
            TaskGroupName::Listeners => &mut self.listeners,
            TaskGroupName::Controllers => &mut self.controllers,
            TaskGroupName::NodeAgent => &mut self.node_agent,
            TaskGroupName::Log => &mut self.log,
        }
    }

    /// Stops the groups one after the other; each has finished before the next is cancelled.
    pub async fn shutdown(self) {
        let Self {
            listeners,
            controllers,
            node_agent,
            log,
        } = self;
        for group in [listeners, controllers, node_agent, log] {
            group.shutdown().await;
        }
    }
}

/// Tasks that stop together.
#[derive(Default)]
pub struct TaskGroup {
    pub stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl TaskGroup {
    pub fn spawn(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(task));
    }

    async fn shutdown(self) {
        self.stop.cancel();
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "task panicked");
            }
        }
    }
}
