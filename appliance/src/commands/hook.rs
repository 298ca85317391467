//! `icecore hook`.

use crate::cli::OK;
use crate::cli::args::HookCommand;
use crate::context::Context;
use crate::failure::Outcome;
use crate::{hook, output};

/// Runs `icecore hook …`.
pub fn run(context: &Context, command: HookCommand) -> Outcome<u8> {
    match command {
        // It is run before there is a context; this is for whoever calls it otherwise.
        HookCommand::Libvirt { words } => hook::run(&context.state, &words),
        HookCommand::Install { dir } => {
            let path = hook::install(&context.state, &dir)?;
            if context.json {
                output::json(&serde_json::json!({ "path": path.to_string_lossy() }))?;
            } else {
                output::print(&format!(
                    "installed {}; a libvirtd that found no hooks at its start sees it after a \
                     restart\n",
                    path.display()
                ))?;
            }
        }
    }
    Ok(OK)
}
