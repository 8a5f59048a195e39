//! Starts the services of a round whose workers stay on their thread.

use std::sync::Arc;

use tenorite::LocalConfig;
use tenorite_tests::ledger::Ledger;
use tokio::task::JoinHandle;

use crate::round::{Config, Plan, Worker, WorkerCaller, WorkerService, builder, policy};

/// The task of a service.
pub struct Task(JoinHandle<()>);

impl Task {
    pub fn abort(&self) {
        self.0.abort();
    }

    /// Waits until it has drained.
    pub async fn drained(self) {
        self.0.await.expect("it drains");
    }
}

pub fn start(plan: &Plan, config: &Config, ledger: &Arc<Ledger>) -> (Task, WorkerCaller) {
    let builder = builder::<Worker, _>(WorkerService, plan, ledger);
    let config = config.clone();
    let (task, caller) = if plan.restarts {
        let again = move || {
            let config = config.clone();
            LocalConfig::new(move || config.make())
        };
        builder.restart(policy()).start_with(plan.backlog, again)
    } else {
        builder.start_with(plan.backlog, move || config.make())
    };
    (Task(task), caller)
}
