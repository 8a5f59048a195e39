//! Starts the services of a round in all ways but one: see `starts_local`.

use std::convert::Infallible;
use std::sync::Arc;

use tenorite::prelude::*;
use tenorite::{Status, StatusWatch};
use tenorite_tests::ledger::Ledger;
use tokio::task::{JoinError, JoinHandle};

use crate::round::{
    Config, Kind, Plan, Worker, WorkerCaller, WorkerRequest, WorkerResponse, WorkerService, builder, policy,
};

/// The same worker behind a queue, as one written by hand.
struct ByReceiver;

impl TenoriteWorker for ByReceiver {
    type Request = WorkerRequest;
    type Response = WorkerResponse;
    type Error = Infallible;
    type Config = Worker;
    type Output = Worker;

    async fn task(
        receiver: Receiver<TenoriteRequest<WorkerRequest, WorkerResponse>>,
        worker: Worker,
    ) -> Worker {
        Worker::task(receiver, worker).await
    }
}

struct ByReceiverService;
impl TenoriteService<ByReceiver, WorkerCaller> for ByReceiverService {}

/// The task of a service.
pub enum Task {
    One(JoinHandle<Worker>),
    Many(JoinHandle<Vec<Worker>>),
    Each(JoinHandle<Vec<Result<Worker, JoinError>>>),
    /// It has no handle: its end is watched.
    Detached(StatusWatch),
}

impl Task {
    pub fn abort(&self) {
        match self {
            Self::One(task) => task.abort(),
            Self::Many(task) => task.abort(),
            Self::Each(task) => task.abort(),
            Self::Detached(_) => unreachable!("there is no handle that would abort it"),
        }
    }

    /// Waits until it has drained, and drops what it hands back.
    pub async fn drained(self) {
        match self {
            Self::One(task) => drop(task.await.expect("it drains")),
            Self::Many(task) => drop(task.await.expect("it drains")),
            Self::Each(task) => {
                task.await.expect("it drains").into_iter().for_each(|end| drop(end.expect("it drains")));
            }
            Self::Detached(mut watch) => drop(watch.wait_for(|status| *status == Status::Stopped).await),
        }
    }
}

pub fn start(plan: &Plan, config: &Config, ledger: &Arc<Ledger>) -> (Task, WorkerCaller) {
    match plan.kind {
        Kind::Shards(shards) => {
            let shards = builder::<Worker, _>(WorkerService, plan, ledger).shards(shards);
            let shards = if plan.restarts { shards.restart(policy()) } else { shards };
            let again = config.clone();
            let (task, caller) = shards.start_with(plan.backlog, move |_| again.make());
            (Task::Each(task), caller)
        }
        Kind::Pool(workers) => {
            let pool = builder::<Worker, _>(WorkerService, plan, ledger).pool(workers);
            let pool = if plan.restarts { pool.restart(policy()) } else { pool };
            let again = config.clone();
            let (task, caller) = pool.start_with(plan.backlog, move || again.make());
            (Task::Many(task), caller)
        }
        Kind::Detached => {
            let derived = builder::<Worker, _>(WorkerService, plan, ledger);
            let caller = derived.start(plan.backlog, config.make());
            (Task::Detached(caller.watch()), caller)
        }
        _ => {
            let (task, caller) = start_one(plan, config, ledger);
            (Task::One(task), caller)
        }
    }
}

fn start_one(plan: &Plan, config: &Config, ledger: &Arc<Ledger>) -> (JoinHandle<Worker>, WorkerCaller) {
    let (policy, again) = (policy(), config.clone());
    let derived = || builder::<Worker, _>(WorkerService, plan, ledger);
    let by_receiver = || builder::<ByReceiver, _>(ByReceiverService, plan, ledger);
    match (plan.kind, plan.restarts) {
        (Kind::Derived(inline), true) => {
            derived().inline(inline).restart(policy).start_with(plan.backlog, move || again.make())
        }
        (Kind::Derived(inline), false) => derived().inline(inline).start_task(plan.backlog, config.make()),
        (Kind::OwnThread, true) => {
            derived().own_thread().restart(policy).start_with(plan.backlog, move || again.make())
        }
        (Kind::OwnThread, false) => derived().own_thread().start_task(plan.backlog, config.make()),
        (Kind::Pool(_) | Kind::Shards(_) | Kind::Detached | Kind::Local, _) => {
            unreachable!("it is started otherwise")
        }
        (Kind::ByReceiver, true) => {
            by_receiver().restart(policy).start_with(plan.backlog, move || again.make())
        }
        (Kind::ByReceiver, false) => by_receiver().start_task(plan.backlog, config.make()),
    }
}
