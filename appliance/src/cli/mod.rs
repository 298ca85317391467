//! The command line: raw flags as clap reads them, and the way from them to a command.
//!
//! `args` holds the flags and their help; nothing beyond this module sees clap.

pub mod args;
mod backup_args;
mod host_args;
mod policy_args;
mod repository_args;
mod restore_args;
mod vm_args;

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;

pub use vm_args::VmArgs;

use crate::context::Context;
use crate::failure::{Failure, Outcome, Status};
use crate::interrupt::survive_file_size_limit;
use crate::policy::notify::{self, Event};
use crate::state::State;
use crate::{commands, daemon, guardian_process, hook, job};
use args::{Cli, Command, Global, HookCommand};

/// What still waits for a disk or a program then is left behind: all that matters has been waited for.
const SHUTDOWN_WAIT: Duration = Duration::from_secs(15);

/// Reads the command line, runs the command and turns its outcome into an exit status.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    if matches!(cli.command, Command::Guardian) {
        return guardian_process::run();
    }
    if matches!(cli.command, Command::Warden) {
        return crate::libvirt::warden::run();
    }
    if let Command::Relay { channel, uri, uuid } = &cli.command {
        return crate::libvirt::relay::run(*channel, uri, uuid);
    }
    // Before anything that could fail or take time: libvirt keeps a domain waiting for it.
    if let Command::Hook(HookCommand::Libvirt { words }) = &cli.command {
        hook::run(&State::new(&cli.global.state_dir), words);
        return ExitCode::SUCCESS;
    }
    // What a daemon does is for its log; what a command does is on the terminal.
    let serves = matches!(cli.command, Command::Serve | Command::Repo(args::RepoCommand::Serve(_)));
    start_log(cli.global.verbose.saturating_add(u8::from(serves)));
    match run_command(cli) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("icecore: {failure}");
            ExitCode::from(failure.status as u8)
        }
    }
}

fn run_command(cli: Cli) -> Outcome<u8> {
    if let Command::Config(command) = &cli.command {
        return commands::config::run(&cli.global, command);
    }
    let context = Context::new(&cli.global)?;
    // The command itself runs on this thread and may wait for a disk; what a guardian waits for (its
    // pulse, its answers) goes on beside it.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|e| Failure::failed("start icecore", e))?;
    let outcome = runtime.block_on(async {
        survive_file_size_limit()?;
        let job = cli.command.job().filter(|_| !context.through_daemon);
        let outcome = dispatch(&context, &cli.global, cli.command).await;
        if let Some(vm) = job {
            tell(&context, vm.as_deref(), &outcome);
        }
        outcome
    });
    if let Err(failure) = &outcome {
        job::end_assigned(&context, failure);
    }
    // A daemon's last look at a repository that hangs would keep it from ending.
    runtime.shutdown_timeout(SHUTDOWN_WAIT);
    outcome
}

/// Tells those whom the configuration names of a job that failed.
fn tell(context: &Context, vm: Option<&str>, outcome: &Outcome<u8>) {
    let notify = context.config.notify.as_ref();
    match outcome {
        // Whoever typed it wrong, or ended it, knows.
        Err(failure) if matches!(failure.status, Status::Usage | Status::Interrupted) => {}
        Err(failure) => {
            let Failure { tried, why, next, .. } = failure;
            notify::tell(notify, &Event::Failed { tried, why, next: next.as_deref() }, vm);
        }
        Ok(DAMAGED) => {
            let (tried, why) = ("vouch for the repository", "the check found damage");
            let next = Some("see 'icecore check'");
            notify::tell(notify, &Event::Failed { tried, why, next }, vm);
        }
        Ok(_) => {}
    }
}

async fn dispatch(context: &Context, global: &Global, command: Command) -> Outcome<u8> {
    match command {
        Command::Repo(command) => commands::repo::run(context, command).await,
        Command::Backup(args) => commands::backup::run(context, args).await,
        Command::Restore(args) => commands::restore::run(context, args).await,
        Command::Rollback(args) => commands::rollback::run(context, args).await,
        Command::Export(args) => commands::export::run(context, args).await,
        Command::Point(command) => commands::point::run(context, command),
        Command::Chain(command) => commands::chain::run(context, command),
        Command::Diff(args) => commands::diff::run(context, args),
        Command::Check(args) => commands::check::run(context, args).await,
        Command::Copy(args) => commands::copy::run(context, args).await,
        Command::Gc(args) => commands::gc::run(context, args).await,
        Command::Catalog(command) => commands::repo::catalog(context, command),
        Command::Vm(command) => commands::vm::run(context, command).await,
        Command::Hook(command) => commands::hook::run(context, command),
        Command::Job(command) => commands::job::run(context, command).await,
        Command::Doctor(args) => commands::doctor::run(context, args).await,
        Command::Completions(args) => commands::generate::completions(args),
        Command::Man(args) => commands::generate::man(&args.dir),
        Command::Prune(args) => commands::prune::run(context, args),
        Command::Record(command) => commands::record::run(context, command),
        Command::Schedule(command) => commands::schedule::run(context, command).await,
        Command::Quota(command) => commands::quota::run(context, command),
        Command::Status { repo } => commands::status::run(context, repo.repo.as_deref()),
        Command::Service(command) => commands::service::run(context, &command),
        Command::Top(args) => commands::top::run(global, &args).await,
        Command::Serve => daemon::serve(global).await.map(|()| OK),
        // They were dealt with before there was a context.
        Command::Guardian | Command::Warden | Command::Relay { .. } | Command::Config(_) => {
            Err(Failure::usage("run a command", "it has a way of its own"))
        }
    }
}

/// Statuses that commands return beside [`Failure`].
pub const OK: u8 = 0;
/// A report was made and it says that there is damage.
pub const DAMAGED: u8 = Status::Damaged as u8;

fn start_log(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    let filter = tracing_subscriber::EnvFilter::try_from_env("ICECORE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(std::io::stderr().is_terminal()).init();
}
