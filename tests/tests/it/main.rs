//! The promises, kept: one binary, a module for each behaviour.

mod support;

mod auto_traits;
mod blocking;
mod bounded;
mod calls;
mod cancel;
mod context;
mod corners;
mod cycles;
mod deadlines;
mod derive;
mod drop_order;
mod errors;
mod function;
mod generics;
mod hazards;
mod hostile;
mod hygiene;
mod later;
mod layout;
mod lifecycle;
mod mended;
mod panic;
mod permits;
mod receiver;
mod restarts;
mod results;
mod stop;
mod story;
mod stress;
mod supervisor;
mod surprises;
mod surroundings;
mod threads;
mod ui;
