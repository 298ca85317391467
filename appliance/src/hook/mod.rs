//! libvirt's hook: libvirt runs it, and waits for it, whenever a domain starts, stops or migrates.
//!
//! It notes what happened in the register of domains and nothing else: it asks libvirt nothing (that
//! would hang both), never fails, and is gone in milliseconds whatever its disk does.

mod event;
mod install;
mod register;

use std::io::Read as _;
use std::time::Duration;

use jiff::Timestamp;

pub use event::Event;
pub use install::{guards, install};
pub use register::{Known, all};

use crate::state::State;

/// Where libvirt looks for hooks beside its own.
pub const FOLDER: &str = "/etc/libvirt/hooks/qemu.d";
/// After this it is gone, done or not: libvirt keeps the domain waiting meanwhile.
const DEADLINE: Duration = Duration::from_millis(300);
/// A domain's XML has some tens of KiB.
const XML_BYTES_MAX: u64 = 4 << 20;

/// Body of `icecore hook libvirt NAME OPERATION SUBOPERATION …` with the domain's XML on stdin.
/// Whatever happens, it ends well.
pub fn run(state: &State, words: &[String]) {
    let (state, words) = (state.clone(), words.to_vec());
    let (done, ended) = std::sync::mpsc::channel();
    let noted = std::thread::Builder::new().spawn(move || {
        note(&state, &words);
        // Nobody waits any more when the deadline has passed.
        let _ = done.send(());
    });
    if noted.is_ok() {
        let _ = ended.recv_timeout(DEADLINE);
    }
}

fn note(state: &State, words: &[String]) {
    let mut xml = String::new();
    // One that cannot be read tells less; the name is in the words.
    let _ = std::io::stdin().take(XML_BYTES_MAX).read_to_string(&mut xml);
    let Some(event) = Event::read(words, &xml) else { return };
    let known = register::get(state, &event.uuid);
    let next = event::follow(known, event, Timestamp::now());
    // libvirt's log is where an operator would look.
    if let Err(e) = register::put(state, &next) {
        eprintln!("icecore: the domain {} was not noted: {e}", next.name);
    }
}
