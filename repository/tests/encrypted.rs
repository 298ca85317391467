//! The tests of repositories once more, on encrypted ones: see `keys`.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that panics has failed
#![allow(clippy::duplicate_mod, reason = "each of these files brings what it shares with others")]

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
