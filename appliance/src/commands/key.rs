//! `icecore repo key`, and the recovery kit.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use icecore_repository::{Damage, KeyId, KeyInfo, KeyMaterial, KeyMethod, Repository};
use jiff::Timestamp;

use crate::cli::OK;
use crate::cli::args::{KeyAddArgs, KeyCommand};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Rows, when};

const STANDARD_OUTPUT: &str = "/dev/stdout";

/// Runs `icecore repo key …`.
pub fn run(context: &Context, command: KeyCommand) -> Outcome<u8> {
    match command {
        KeyCommand::List { repo } => list(context, &repo),
        KeyCommand::Add(args) => add(context, &args),
        KeyCommand::Remove { repo, key } => remove(context, &repo, &key),
        KeyCommand::Kit { repo, output } => kit(context, &repo, &output),
    }
}

fn list(context: &Context, repo: &str) -> Outcome<u8> {
    let tried = format!("list the keys of {repo}");
    let repository = context.open_read_only(repo)?;
    let keys = known(&repository, &tried)?;
    let damaged = damaged(&repository, &tried)?;
    if context.json {
        let sound = keys.iter().map(described);
        let all: Vec<_> = sound.chain(damaged.iter().map(described_damage)).collect();
        output::json(&all)?;
        return Ok(OK);
    }
    let mut table = Rows::new(&["key", "given as", "added", "label"]);
    for key in keys {
        let label = key.label.map(|label| output::printable(&label)).unwrap_or_default();
        table.add(vec![key.id.to_string(), method(key.method).into(), when(key.created_at), label]);
    }
    for (id, damage) in damaged {
        let what = format!("opens nothing: {}", output::printable(&damage.to_string()));
        table.add(vec![id.to_string(), "-".into(), "-".into(), what]);
    }
    table.print("it is not encrypted and has no keys")?;
    Ok(OK)
}

fn add(context: &Context, args: &KeyAddArgs) -> Outcome<u8> {
    let tried = format!("add a key to {}", args.repo);
    let bad = |e| Failure::usage(&tried, e);
    let new = match (&args.new_key_file, &args.new_passphrase_file) {
        (Some(file), _) => KeyMaterial::read_key_file(file).map_err(bad)?,
        (None, Some(file)) => KeyMaterial::read_passphrase_file(file).map_err(bad)?,
        (None, None) => return Err(Failure::usage(tried, "no new key is named")),
    };
    let repository = context.open(&args.repo)?;
    let current = context.keys(&context.repository_address(&args.repo)?)?;
    let added = repository
        .add_key(&current, &new, args.label.clone(), Timestamp::now())
        .map_err(|e| Failure::from_repository(&tried, e))?;
    if context.json {
        output::json(&described(&added))?;
    } else {
        output::print(&format!("key {} added\n", added.id))?;
    }
    Ok(OK)
}

fn remove(context: &Context, repo: &str, key: &str) -> Outcome<u8> {
    let tried = format!("remove key {key} from {repo}");
    let repository = context.open(repo)?;
    let sound = known(&repository, &tried)?.into_iter().map(|key| key.id);
    let all = sound.chain(damaged(&repository, &tried)?.into_iter().map(|(id, _)| id));
    let mut fitting = all.filter(|known| known.as_str().starts_with(key));
    let found: KeyId = match (fitting.next(), fitting.next()) {
        (Some(only), None) if !key.is_empty() => only,
        (Some(_), _) => {
            return Err(Failure::usage(tried, "it fits several keys").next("write more of the id"));
        }
        (None, _) => {
            return Err(
                Failure::missing(tried, "it has no such key").next("see 'icecore repo key list'")
            );
        }
    };
    repository.remove_key(&found).map_err(|e| Failure::from_repository(&tried, e))?;
    if context.json {
        output::json(&serde_json::json!({ "key": found }))?;
    } else {
        output::print(&format!(
            "key {found} removed; whoever has opened the repository with it may have kept what it \
             protects\n"
        ))?;
    }
    Ok(OK)
}

fn kit(context: &Context, repo: &str, path: &Path) -> Outcome<u8> {
    let tried = format!("write the recovery kit of {repo}");
    let repository = context.open_read_only(repo)?;
    let current = context.keys(&context.repository_address(repo)?)?;
    let failed = |e| Failure::from_repository(&tried, e);
    let kit = repository.recovery_kit(&current).map_err(failed)?;
    if path == Path::new(STANDARD_OUTPUT) {
        let printed = match context.json {
            true => output::json(&serde_json::json!({ "kit": *kit.text() })),
            false => output::print(&kit.text()),
        };
        return printed.map(|()| OK);
    }
    let mut file = new_file(path, &tried)?;
    write(&mut file, kit.text().as_bytes(), &tried)?;
    if context.json {
        output::json(&serde_json::json!({ "file": path.to_string_lossy() }))?;
    } else {
        output::print(&format!("recovery kit written to {}\n", path.display()))?;
    }
    Ok(OK)
}

/// After `repo init`: the kit goes into the file that was asked for.
pub fn write_kit(
    repository: &Repository,
    keys: &[KeyMaterial],
    mut file: File,
    tried: &str,
) -> Outcome<()> {
    let kit = repository.recovery_kit(keys).map_err(|e| Failure::from_repository(tried, e))?;
    write(&mut file, kit.text().as_bytes(), tried)
}

/// Where no file was asked for: onto a terminal, and nowhere else: what a script prints ends in a log.
pub fn show_kit(
    context: &Context,
    repository: &Repository,
    keys: &[KeyMaterial],
    tried: &str,
) -> Outcome<()> {
    if context.json || !std::io::stdout().is_terminal() {
        return Ok(());
    }
    let kit = repository.recovery_kit(keys).map_err(|e| Failure::from_repository(tried, e))?;
    output::print(&format!(
        "\n{}\nPrint this, keep it apart from all computers, and clear the screen: it opens the \
         repository when every key is lost. It is not shown again ('icecore repo key kit' writes it \
         for whoever has a key).\n",
        *kit.text()
    ))
}

/// A file of the caller's alone that was not there before.
pub fn new_file(path: &Path, tried: &str) -> Outcome<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600).open(path).map_err(|e| {
        let why = format!("{}: {e}", path.display());
        match e.kind() {
            std::io::ErrorKind::AlreadyExists => Failure::refused(tried, why),
            _ => Failure::usage(tried, why),
        }
    })
}

fn write(file: &mut File, text: &[u8], tried: &str) -> Outcome<()> {
    let written = file.write_all(text).and_then(|()| file.sync_all());
    written.map_err(|e| {
        Failure::failed(tried, format!("the recovery kit: {e}"))
            .next("write it again with 'icecore repo key kit'")
    })
}

fn known(repository: &Repository, tried: &str) -> Outcome<Vec<KeyInfo>> {
    repository.keys().map_err(|e| Failure::from_repository(tried, e))
}

fn damaged(repository: &Repository, tried: &str) -> Outcome<Vec<(KeyId, Damage)>> {
    repository.damaged_keys().map_err(|e| Failure::from_repository(tried, e))
}

fn described_damage((id, damage): &(KeyId, Damage)) -> serde_json::Value {
    serde_json::json!({ "key": id, "damage": damage.to_string() })
}

fn described(key: &KeyInfo) -> serde_json::Value {
    serde_json::json!({
        "key": key.id, "method": method(key.method), "created_at": key.created_at,
        "label": key.label,
    })
}

fn method(method: KeyMethod) -> &'static str {
    match method {
        KeyMethod::File => "file",
        KeyMethod::Passphrase => "passphrase",
    }
}
