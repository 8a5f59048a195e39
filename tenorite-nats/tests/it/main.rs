//! What is promised over NATS, on servers of our own.

mod faults;
mod limits;
mod promises;
mod server;
mod support;
