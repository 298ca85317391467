//! Project commands: `cargo xtask demo`, `test`, `bench`, `deb`, `ci`, `fuzz-smoke`, `setup`.

mod apt;
mod bench;
mod ci;
mod deb;
mod debian;
mod demo;
mod fuzz;
mod object_stores;
mod qemus;
mod setup;
mod step;
mod suite;

use clap::{Parser, Subcommand};

use crate::step::Result;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "What this project can do for its builders")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Boot a real guest, back it up while it writes, destroy its data, roll it back
    Demo(demo::Demo),
    /// Install what is needed and run every test, those on real QEMU included
    Test(suite::Suite),
    Bench(bench::Options),
    #[command(hide = true)]
    BenchMap(bench::MapClient),
    Deb(deb::Deb),
    /// Format, lints, licences, tests
    Ci,
    /// Run every fuzz target over its checked-in inputs
    FuzzSmoke,
    /// Only install and build what tests and demo need
    Setup {
        /// Also what `cargo xtask test --long` needs
        #[arg(long)]
        long: bool,
    },
}

fn main() -> std::process::ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Demo(demo) => demo.run(),
        Task::Test(suite) => suite.run(),
        Task::Bench(bench) => bench.run(),
        Task::BenchMap(client) => client.run(),
        Task::Deb(deb) => deb.run(),
        Task::Ci => ci::run(),
        Task::FuzzSmoke => fuzz::smoke(),
        Task::Setup { long } => setup::run(long),
    }
}
