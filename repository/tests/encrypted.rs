//! The tests of repositories once more, on encrypted ones: see `keys`.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that panics has failed

#[path = "caches.rs"]
mod caches;
#[path = "check_damage.rs"]
mod check_damage;
#[path = "crash.rs"]
mod crash;
#[path = "gc_beside_writers.rs"]
mod gc_beside_writers;
#[path = "model.rs"]
mod model;
#[path = "round_trip.rs"]
mod round_trip;
#[path = "writing.rs"]
mod writing;
