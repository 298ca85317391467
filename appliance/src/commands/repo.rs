//! `icecore repo` and `icecore catalog`.

use icecore_repository::store::{Address, CreateOnly, Found};
use icecore_repository::{
    BadLock, BlockSize, Compression, InitOptions, KeyMaterial, LockPolicy, Repository,
};

use super::{key, repo_server};
use crate::cli::OK;
use crate::cli::args::{CatalogCommand, RepoCommand, RepoInitArgs};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::names::human_bytes;
use crate::output;

/// Runs `icecore repo …`.
pub async fn run(context: &Context, command: RepoCommand) -> Outcome<u8> {
    match command {
        RepoCommand::Init(args) => init(context, &args),
        RepoCommand::Open { repo } => super::repo_open::run(context, &repo),
        RepoCommand::Info { repo } => info(context, &repo),
        RepoCommand::Key(command) => key::run(context, command),
        RepoCommand::Serve(args) => repo_server::serve(args).await,
        RepoCommand::Token(command) => repo_server::token(context, command),
    }
}

fn init(context: &Context, args: &RepoInitArgs) -> Outcome<u8> {
    let tried = format!("make a repository at {}", args.repo);
    let address = context.repository_address(&args.repo)?;
    let keys = keys(context, args, &address, &tried)?;
    let options = InitOptions {
        block_size: BlockSize::new(args.block_size).map_err(|e| Failure::usage(&tried, e))?,
        compression: compression(&args.compression).map_err(|e| Failure::usage(&tried, e))?,
        keys: keys.clone(),
        lock: lock(args).map_err(|e| Failure::usage(&tried, e))?,
    };
    // Before there is anything that it would be needed for.
    let kit = args.recovery_kit.as_deref().map(|path| key::new_file(path, &tried)).transpose()?;
    let made = Repository::init_at(&address, options);
    let repository = match made {
        Ok(repository) => repository,
        Err(error) => {
            if let (Some(_), Some(path)) = (&kit, &args.recovery_kit) {
                // It is empty, and no file of anybody else: it was just created.
                let _ = std::fs::remove_file(path);
            }
            return Err(Failure::from_repository(tried, error));
        }
    };
    let to_show = args.encrypt && kit.is_none();
    // Before anything else can fail: without it and the key nobody could read what is written here.
    if let Some(file) = kit {
        key::write_kit(&repository, &keys, file, &tried)?;
    }
    // What init has found to be good enough, for people to see.
    let found = address.probe().map_err(|e| Failure::failed("look at the new repository", e))?;
    describe(context, &repository, &args.repo, found.as_ref())?;
    if to_show {
        key::show_kit(context, &repository, &keys, &tried)?;
    }
    Ok(OK)
}

fn lock(args: &RepoInitArgs) -> Result<Option<LockPolicy>, BadLock> {
    args.lock.map(|period| LockPolicy::new(args.lock_mode, period)).transpose()
}

/// What the new repository is to be opened with; nothing where it is not to be encrypted.
fn keys(
    context: &Context,
    args: &RepoInitArgs,
    address: &Address,
    tried: &str,
) -> Outcome<Vec<KeyMaterial>> {
    if !args.encrypt {
        return match context.key_file_of(address) {
            None => Ok(Vec::new()),
            Some(_) => {
                let why = "the configuration has a key_file for it, which --encrypt would use";
                Err(Failure::usage(tried, why).next("add --encrypt, or take key_file out"))
            }
        };
    }
    let keys = context.keys(address)?;
    if keys.is_empty() {
        return Err(Failure::usage(tried, "--encrypt needs a key, and none is named").next(
            "make one with 'head -c 32 /dev/urandom > FILE' and name it with --key-file, or \
             give --passphrase-file",
        ));
    }
    Ok(keys)
}

fn info(context: &Context, repo: &str) -> Outcome<u8> {
    describe(context, &context.open_read_only(repo)?, repo, None)
}

fn describe(
    context: &Context,
    repository: &Repository,
    name: &str,
    found: Option<&Found>,
) -> Outcome<u8> {
    let info = repository
        .info()
        .map_err(|e| Failure::from_repository(format!("describe the repository {name}"), e))?;
    if context.json {
        let mut report = serde_json::json!({
            "id": info.id, "version": info.version, "block_size": info.block_size,
            "encrypted": info.encrypted, "compression": info.compression.to_string(),
            "points": info.points, "chains": info.chains, "logical_bytes": info.logical_bytes,
            "stored_bytes": info.stored_bytes, "packs": info.packs,
            "lock": info.lock,
        });
        if let Some(found) = found {
            report["place"] = serde_json::json!(found);
        }
        output::json(&report)?;
        return Ok(OK);
    }
    output::print(&format!(
        "repository   {name}\nid           {}\nversion      {}\nblock size   {}\n\
         compression  {}\nencrypted    {}\nlocks        {}\npoints       {} in {} chains\nguest data   {}\n\
         stored       {} in {} packs\n",
        info.id,
        info.version,
        human_bytes(u64::from(info.block_size)),
        info.compression,
        if info.encrypted { "yes" } else { "no" },
        info.lock.map_or_else(|| "no".to_owned(), lock_words),
        info.points,
        info.chains,
        human_bytes(info.logical_bytes),
        human_bytes(info.stored_bytes),
        info.packs,
    ))?;
    found.map_or(Ok(()), print_place)?;
    Ok(OK)
}

fn lock_words(lock: LockPolicy) -> String {
    format!("{}, {} s after each point", lock.mode(), lock.period().as_secs())
}

/// What was found where the repository lies.
fn print_place(found: &Found) -> Outcome<()> {
    let by = match found.create_only {
        CreateOnly::Link => "hard links",
        CreateOnly::Rename => "renames that do not replace",
    };
    let mut text = format!(
        "place        {}{}, {} free; new names by {by}; files and directories are synced\n",
        found.file_system,
        if found.network { " (network)" } else { "" },
        human_bytes(found.free_bytes),
    );
    for note in &found.notes {
        text += &format!("note         {note}\n");
    }
    output::print(&text)
}

fn compression(text: &str) -> Result<Compression, String> {
    let level = match text {
        "none" => return Ok(Compression::None),
        "zstd" => return Ok(Compression::Zstd(1)),
        _ => text.strip_prefix("zstd:").and_then(|level| level.parse::<i32>().ok()),
    };
    match level {
        Some(level) if (1..=19).contains(&level) => Ok(Compression::Zstd(level)),
        _ => Err(format!("'{text}' is no compression: write zstd:1 to zstd:19, or none")),
    }
}

/// Runs `icecore catalog …`.
pub fn catalog(context: &Context, command: CatalogCommand) -> Outcome<u8> {
    let CatalogCommand::Rebuild { repo } = command;
    let repository = context.open(&repo.repo)?;
    let points = repository.rebuild_catalog().map_err(|e| {
        Failure::from_repository(format!("rebuild the catalog of {}", repo.repo), e)
    })?;
    if context.json {
        output::json(&serde_json::json!({ "points": points }))?;
    } else {
        output::print(&format!("catalog rebuilt: {points} points\n"))?;
    }
    Ok(OK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_has_a_grammar() {
        assert_eq!(compression("zstd:3"), Ok(Compression::Zstd(3)));
        assert_eq!(compression("none"), Ok(Compression::None));
        assert!(compression("zstd:0").is_err() && compression("lz4").is_err());
        assert!(compression("zstd:99").is_err() && compression("zstd:").is_err());
    }
}
