//! The ways to run a worker, besides one handler at a time on a task.

mod concurrent;
mod shards;
mod every;
mod pool;
mod histories;
mod edges;
mod own;
mod blocks;
mod batch;
mod local;
mod programs;
mod suite;
mod layers;
