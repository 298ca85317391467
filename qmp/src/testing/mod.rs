//! Peers for tests: a scripted monitor, a scripted guest agent, and real QEMU processes.
//!
//! Not part of the product: compiled for tests and with the feature `testing`.

mod fake;
mod process;

pub use fake::{Act, Fake, GREETING, Request};
pub use process::{Process, binary_under_test, daemon_command, is_listening, qemu_command};
