//! `icecore config`.

use std::path::Path;

use serde::Serialize;

use crate::cli::OK;
use crate::cli::args::{ConfigCommand, Global};
use crate::config::{self, Config, Loaded, Problem};
use crate::failure::{Outcome, Status};
use crate::output;

#[derive(Debug, Serialize)]
struct Report {
    ok: bool,
    files: Vec<std::path::PathBuf>,
    problems: Vec<Problem>,
    repositories: Vec<String>,
    vms: Vec<String>,
    schedules: Vec<String>,
    quotas: Vec<String>,
    libvirt: Option<String>,
    notify: bool,
}

/// Runs `icecore config …`; it has no context, for that needs a configuration without a fault.
pub fn run(global: &Global, command: &ConfigCommand) -> Outcome<u8> {
    match command {
        ConfigCommand::Check => check(global.config.as_deref(), global.json),
    }
}

fn check(path: Option<&Path>, json: bool) -> Outcome<u8> {
    let Loaded { config, files, problems } = config::load(path)?;
    let report = report(&config, files, problems);
    if json {
        output::json(&report)?;
    } else {
        print(&report)?;
    }
    Ok(if report.ok { OK } else { Status::Usage as u8 })
}

fn report(config: &Config, files: Vec<std::path::PathBuf>, problems: Vec<Problem>) -> Report {
    Report {
        ok: problems.is_empty(),
        files,
        problems,
        repositories: config.repository.keys().cloned().collect(),
        vms: config.vm.keys().cloned().collect(),
        schedules: config.schedule.keys().cloned().collect(),
        quotas: config.quota.keys().cloned().collect(),
        libvirt: config.libvirt.as_ref().map(|libvirt| libvirt.uri.clone()),
        notify: config.notify.is_some(),
    }
}

fn print(report: &Report) -> Outcome<()> {
    let mut text = String::new();
    for problem in &report.problems {
        text += &format!("{}\n", output::printable(&problem.to_string()));
    }
    if report.files.is_empty() {
        text += "there is no configuration file; the defaults hold\n";
    }
    for file in &report.files {
        text += &format!("read {}\n", file.display());
    }
    if report.ok {
        for (what, names) in [
            ("repositories", &report.repositories),
            ("VMs", &report.vms),
            ("schedules", &report.schedules),
            ("quotas", &report.quotas),
        ] {
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            text += &format!("{what}: {names}\n");
        }
    }
    output::print(&text)
}
