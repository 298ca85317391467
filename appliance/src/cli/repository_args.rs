//! Flags of the commands on a repository and its points.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use icecore_repository::LockMode;
use icecore_repository::rights::Right;

use super::args::RepoArgs;
use crate::names;

#[derive(Debug, Subcommand)]
pub enum RepoCommand {
    /// Make a new repository
    #[command(after_help = "Examples:\n  icecore repo init /backup --compression zstd:3\n  \
head -c 32 /dev/urandom > /root/key && chmod 600 /root/key\n  \
icecore repo init /backup --encrypt --key-file /root/key\n  \
icecore repo init s3://backups/site1 --lock 30d --lock-mode compliance")]
    Init(RepoInitArgs),
    /// Take up a repository on this host: what a new host runs after a disaster
    #[command(after_help = "Example:\n  icecore repo open /backup")]
    Open {
        /// Repository
        #[arg(env = "ICECORE_REPO")]
        repo: String,
    },
    /// Describe a repository
    #[command(after_help = "Example:\n  icecore repo info /backup")]
    Info {
        /// Repository
        #[arg(env = "ICECORE_REPO")]
        repo: String,
    },
    /// List, add and remove the keys of an encrypted repository
    #[command(subcommand)]
    Key(KeyCommand),
    /// Serve the repositories in a directory to other hosts, over HTTPS
    #[command(after_help = "Example:\n  icecore repo serve --directory /srv/icecore \
--listen 0.0.0.0:8443 --tls-cert server.pem --tls-key server.key")]
    Serve(RepoServeArgs),
    /// Who may use the repositories that are served
    #[command(subcommand)]
    Token(RepoTokenCommand),
}

#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List the keys that open it
    #[command(after_help = "Example:\n  icecore repo key list /backup --key-file /root/key")]
    List {
        /// Repository
        repo: String,
    },
    /// Let another key open it, too; no data are rewritten
    #[command(after_help = "Example:\n  icecore repo key add /backup --key-file /root/key \
--new-key-file /root/key2 --label 'second site'")]
    Add(KeyAddArgs),
    /// Take a key away; the last one stays
    #[command(after_help = "Example:\n  icecore repo key remove /backup KEY --key-file /root/key2")]
    Remove {
        /// Repository
        repo: String,
        /// The key's id, or a unique prefix
        key: String,
    },
    /// Write the recovery kit: the master key as text, for paper
    #[command(after_help = "Example:\n  icecore repo key kit /backup --key-file /root/key \
-o /dev/stdout")]
    Kit {
        /// Repository
        repo: String,
        /// A file that is not there yet, or /dev/stdout
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct KeyAddArgs {
    /// Repository
    pub repo: String,
    /// The new key: any bytes, at least 32
    #[arg(long, value_name = "FILE", required_unless_present = "new_passphrase_file")]
    #[arg(conflicts_with = "new_passphrase_file")]
    pub new_key_file: Option<PathBuf>,
    /// A file with the new passphrase; /dev/stdin is one, too
    #[arg(long, value_name = "FILE")]
    pub new_passphrase_file: Option<PathBuf>,
    /// What you call it; whoever sees the repository can read it
    #[arg(long, value_name = "TEXT")]
    pub label: Option<String>,
}

#[derive(Debug, Args)]
pub struct RepoServeArgs {
    /// Where to listen; without TLS a loopback address only
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8443")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub tokens: TokensArgs,
    /// The certificate chain, PEM
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// What each repository may take for which the tokens' file names no quota
    #[arg(long, value_name = "SIZE", value_parser = names::size)]
    pub quota: Option<u64>,
}

/// Where a server keeps what.
#[derive(Debug, Args)]
pub struct TokensArgs {
    /// The directory that holds the repositories
    #[arg(long, value_name = "DIR")]
    pub directory: PathBuf,
    /// The file with the tokens and quotas [default: .tokens.toml in the directory]
    #[arg(long, value_name = "FILE")]
    pub tokens: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum RepoTokenCommand {
    /// Make a token and print it, this once
    #[command(after_help = "Example:\n  icecore repo token add web1 --directory /srv/icecore \
--right append --repository main > web1.token")]
    Add {
        /// Whose it is: a host's name
        name: String,
        /// What it allows
        #[arg(long, value_enum, default_value_t = RightArg::Append)]
        right: RightArg,
        /// The repositories that it is for; '*' is all
        #[arg(long, value_name = "NAME", required = true)]
        repository: Vec<String>,
        #[command(flatten)]
        tokens: TokensArgs,
    },
    /// List the tokens
    #[command(after_help = "Example:\n  icecore repo token list --directory /srv/icecore")]
    List {
        #[command(flatten)]
        tokens: TokensArgs,
    },
    /// Take a token away; a running server refuses it from then on
    #[command(after_help = "Example:\n  icecore repo token remove web1 --directory /srv/icecore")]
    Remove {
        /// Its name
        name: String,
        #[command(flatten)]
        tokens: TokensArgs,
    },
}

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RightArg {
    /// Add points and see those alone; delete nothing
    Own,
    /// See all points: restore, check, list
    Read,
    /// And add points; delete nothing
    Append,
    /// And delete, protect, collect garbage
    Administer,
}

impl From<RightArg> for Right {
    fn from(right: RightArg) -> Self {
        match right {
            RightArg::Own => Self::Own,
            RightArg::Read => Self::Read,
            RightArg::Append => Self::Append,
            RightArg::Administer => Self::Administer,
        }
    }
}

#[derive(Debug, Args)]
pub struct RepoInitArgs {
    /// Where: a directory that is empty or does not exist
    #[arg(env = "ICECORE_REPO")]
    pub repo: String,
    /// Size of a block, a power of two
    #[arg(long, value_name = "SIZE", value_parser = names::size, default_value = "64K")]
    pub block_size: u64,
    /// zstd:LEVEL or none
    #[arg(long, value_name = "CODEC", default_value = "zstd:1")]
    pub compression: String,
    /// Seal all of it with a key that the store never sees: give --key-file or --passphrase-file
    #[arg(long)]
    pub encrypt: bool,
    /// Write the recovery kit into this new file; without this it is shown, on a terminal only
    #[arg(long, value_name = "FILE", requires = "encrypt")]
    pub recovery_kit: Option<PathBuf>,
    /// Lock each point and what it needs for so long, as in 30d: until then nobody deletes it. S3
    /// with object lock only
    #[arg(long, value_name = "DURATION", value_parser = names::long_duration)]
    pub lock: Option<Duration>,
    /// Who may break a lock: whoever the store's owner lets (governance), or nobody (compliance)
    #[arg(long, value_name = "MODE", requires = "lock", default_value = "governance")]
    pub lock_mode: LockMode,
}

#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// The daemons that have a repository in their configuration, and which of them are up
    #[command(
        after_help = "A daemon leaves word every 5 minutes, with the time of its own clock. One \
from which nothing came for 15 minutes of this host's clock is down; one that was told to end is \
stopped.\n\nExample:\n  icecore service list /backup"
    )]
    List {
        /// Repository
        #[arg(env = "ICECORE_REPO")]
        repo: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum PointCommand {
    /// List points
    #[command(after_help = "Example:\n  icecore point list vm1 --repo /backup")]
    List {
        /// Only this VM's
        vm: Option<String>,
        #[command(flatten)]
        repo: RepoArgs,
    },
    /// Everything about one point
    #[command(after_help = "Example:\n  icecore point show latest --repo /backup")]
    Show(PointArgs),
    /// Delete a point; all others stay restorable
    #[command(after_help = "Example:\n  icecore point delete latest~3 --repo /backup")]
    Delete {
        #[command(flatten)]
        point: PointArgs,
        /// Delete what grew from it, too
        #[arg(long)]
        with_descendants: bool,
    },
    /// Keep a point from being deleted
    #[command(after_help = "Example:\n  icecore point protect latest --repo /backup")]
    Protect(PointArgs),
    /// Allow a point to be deleted again
    #[command(after_help = "Example:\n  icecore point unprotect latest --repo /backup")]
    Unprotect(PointArgs),
}

#[derive(Debug, Args)]
pub struct PointArgs {
    /// Point: an id, a unique prefix, latest, latest~N
    pub point: String,
    /// For `latest`: of this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    #[command(flatten)]
    pub repo: RepoArgs,
}

#[derive(Debug, Subcommand)]
pub enum ChainCommand {
    /// List chains
    #[command(after_help = "Example:\n  icecore chain list --repo /backup")]
    List {
        /// Only this VM's
        vm: Option<String>,
        #[command(flatten)]
        repo: RepoArgs,
    },
    /// Delete a chain with all its points
    #[command(after_help = "Example:\n  icecore chain delete CHAIN --repo /backup")]
    Delete {
        /// The chain's id
        chain: String,
        #[command(flatten)]
        repo: RepoArgs,
    },
}

#[derive(Debug, Args)]
pub struct DiffArgs {
    /// The older point
    pub from: String,
    /// The newer point
    pub to: String,
    /// For `latest`: of this VM
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    #[command(flatten)]
    pub repo: RepoArgs,
}

#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Only this point
    pub point: Option<String>,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// Read and decode every block
    #[arg(long, conflicts_with = "sample")]
    pub read_data: bool,
    /// Read and decode so many per cent of the blocks
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub sample: Option<f64>,
    /// Read every object and verify its checksum, which needs no key
    #[arg(long, conflicts_with_all = ["sample", "read_data", "point"])]
    pub scrub: bool,
}

/// Shown below the help of `copy`.
pub const COPY_EXAMPLES: &str = "Examples:
  icecore copy --vm vm1 --repo /backup --to /mnt/offsite
  icecore copy latest --repo /backup --to /mnt/offsite
  icecore copy --all --repo /backup --to /mnt/offsite --json";

#[derive(Debug, Args)]
pub struct CopyArgs {
    /// This point: an id, a unique prefix, latest, latest~N
    #[arg(required_unless_present_any = ["vm", "all"])]
    pub point: Option<String>,
    /// All points of this VM; with `latest`, its latest one
    #[arg(long, value_name = "NAME")]
    pub vm: Option<String>,
    /// All points
    #[arg(long, conflicts_with_all = ["point", "vm"])]
    pub all: bool,
    #[command(flatten)]
    pub repo: RepoArgs,
    /// The repository that they are copied to
    #[arg(long, value_name = "REPO")]
    pub to: String,
}

#[derive(Debug, Args)]
pub struct GcArgs {
    #[command(flatten)]
    pub repo: RepoArgs,
    /// Say what would go, delete nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Subcommand)]
pub enum CatalogCommand {
    /// Make the cache anew from the repository
    #[command(after_help = "Example:\n  icecore catalog rebuild --repo /backup")]
    Rebuild {
        #[command(flatten)]
        repo: RepoArgs,
    },
}

fn percent(text: &str) -> Result<f64, String> {
    match text.trim_end_matches('%').parse::<f64>() {
        Ok(value) if (0.0..=100.0).contains(&value) => Ok(value),
        _ => Err("a percentage is a number from 0 to 100".into()),
    }
}
