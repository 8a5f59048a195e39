//! What is promised over NATS, on servers of our own.

#[cfg(feature = "durable")]
mod balance;
#[cfg(feature = "durable")]
mod cluster;
mod crowds;
#[cfg(feature = "durable")]
mod edges;
mod faults;
mod limits;
#[cfg(feature = "durable")]
mod linear;
mod processes;
mod promises;
#[cfg(feature = "durable")]
mod proxy;
#[cfg(feature = "durable")]
mod rollback;
mod server;
#[cfg(feature = "durable")]
mod shards;
mod stopwatch;
mod support;
#[cfg(feature = "durable")]
mod threads;
#[cfg(feature = "opentelemetry")]
mod traces;
