//! Shell completions and man pages, from the same definition as the command line.

use std::path::Path;

use clap::CommandFactory as _;

use crate::cli::OK;
use crate::cli::args::{Cli, CompletionsArgs};
use crate::failure::{Failure, Outcome};
use crate::output;

/// Prints completions for a shell.
pub fn completions(args: CompletionsArgs) -> Outcome<u8> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "icecore", &mut text);
    output::print(&String::from_utf8_lossy(&text))?;
    Ok(OK)
}

/// Writes a page for the command and for each of its subcommands.
pub fn man(dir: &Path) -> Outcome<u8> {
    let tried = format!("write man pages into {}", dir.display());
    std::fs::create_dir_all(dir)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), dir))
        .map_err(|e| Failure::failed(tried, e))?;
    Ok(OK)
}
