//! `icecore repo serve` and `icecore repo token`.

use std::path::{Path, PathBuf};

use crate::cli::OK;
use crate::cli::args::{RepoServeArgs, RepoTokenCommand, TokensArgs};
use crate::context::Context;
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::repo_server::tokens::Tokens;
use crate::repo_server::{self, Settings};
use crate::tls;

/// The tokens' file where none is named. No repository has such a name.
const TOKENS_FILE: &str = ".tokens.toml";

/// Runs `icecore repo serve`.
pub async fn serve(args: RepoServeArgs) -> Outcome<u8> {
    let tried = format!("serve repositories on {}", args.listen);
    let tls = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Some(tls::acceptor(certificate, key)?),
        _ if args.listen.ip().is_loopback() => None,
        _ => {
            let why = "tokens and guests' data would cross the network in clear";
            return Err(Failure::usage(tried, why)
                .next("add --tls-cert and --tls-key, or listen on 127.0.0.1 behind a proxy"));
        }
    };
    let tokens = tokens_file(&args.tokens);
    if Tokens::load(&tokens)?.all().next().is_none() {
        tracing::warn!("nobody can come in yet: add a token with 'icecore repo token add'");
    }
    let directory = args.tokens.directory;
    repo_server::serve(Settings { listen: args.listen, directory, tokens, quota: args.quota, tls })
        .await?;
    Ok(OK)
}

fn tokens_file(args: &TokensArgs) -> PathBuf {
    args.tokens.clone().unwrap_or_else(|| args.directory.join(TOKENS_FILE))
}

/// Runs `icecore repo token …`.
pub fn token(context: &Context, command: RepoTokenCommand) -> Outcome<u8> {
    match command {
        RepoTokenCommand::Add { name, right, repository, tokens } => {
            let path = tokens_file(&tokens);
            let mut tokens = Tokens::load(&path)?;
            let text = tokens.add(&name, right.into(), repository)?;
            tokens.save(&path)?;
            // The only time that it is shown; the file has its hash.
            output::print(&format!("{text}\n"))?;
        }
        RepoTokenCommand::List { tokens } => list(context, &tokens_file(&tokens))?,
        RepoTokenCommand::Remove { name, tokens } => {
            let path = tokens_file(&tokens);
            let mut tokens = Tokens::load(&path)?;
            if !tokens.remove(&name) {
                let tried = format!("remove the token {name}");
                return Err(Failure::missing(tried, "there is none of that name"));
            }
            tokens.save(&path)?;
        }
    }
    Ok(OK)
}

fn list(context: &Context, path: &Path) -> Outcome<()> {
    let tokens = Tokens::load(path)?;
    if context.json {
        let all = tokens.all().map(|(name, token)| {
            serde_json::json!({
                "name": name, "right": token.right, "repositories": token.repositories,
            })
        });
        return output::json(&all.collect::<Vec<_>>());
    }
    let mut rows = output::Rows::new(&["name", "right", "repositories"]);
    for (name, token) in tokens.all() {
        let right = format!("{:?}", token.right).to_lowercase();
        rows.add(vec![name.clone(), right, token.repositories.join(" ")]);
    }
    rows.print("no tokens")
}
