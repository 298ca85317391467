//! `icecore`: backup, restore and rollback of QEMU/KVM guests, from the command line.
//!
//! This package is the only one that knows the command line, configuration, tables and exit
//! statuses. It joins the four libraries: `qmp` fixes an instant, `nbd-client` speaks to its
//! exports, `io-engine` moves the bytes, `repository` keeps them.

mod backup;
mod capture;
mod cli;
mod commands;
mod config;
mod context;
mod daemon;
mod data;
mod export;
mod failure;
mod governor;
mod guardian_process;
mod hook;
mod image;
mod interrupt;
mod job;
mod job_view;
mod libvirt;
mod names;
mod nbd;
mod output;
mod points;
mod policy;
mod progress;
mod recovery;
mod repo_server;
mod report;
mod restore;
mod rollback;
mod state;
mod target;
mod tls;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
