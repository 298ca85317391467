//! What every command has at hand: configuration, state directory, and how to speak to the user.

use std::path::PathBuf;
use std::sync::OnceLock;

use icecore_io_engine::EngineChoice;
use icecore_repository::store::{Address, TransferMemory};
use icecore_repository::{BadKey, KeyMaterial, OpenOptions, Repository};

use crate::cli::args::{Global, IoEngine};
use crate::config::Config;
use crate::data;
use crate::failure::{Failure, Outcome};
use crate::progress::Board;
use crate::state::{JobId, State};

/// The least `--memory` with which the pipeline moves at all.
const MEMORY_MIN: u64 = 32 << 20;
/// The same with a repository on a server: what is under way takes as much again.
const MEMORY_MIN_OF_SERVERS: u64 = 80 << 20;

/// Files with keys of encrypted repositories.
#[derive(Debug, Clone, Default)]
pub struct KeyFiles {
    pub key_file: Option<PathBuf>,
    pub passphrase_file: Option<PathBuf>,
}

impl KeyFiles {
    fn read(&self) -> Result<Vec<KeyMaterial>, BadKey> {
        let file = self.key_file.iter().map(|file| KeyMaterial::read_key_file(file));
        let phrase = self.passphrase_file.iter();
        file.chain(phrase.map(|file| KeyMaterial::read_passphrase_file(file))).collect()
    }

    /// Hands them on to a process of this program.
    pub fn variables(&self) -> impl Iterator<Item = (&'static str, &PathBuf)> {
        let key = self.key_file.as_ref().map(|file| ("ICECORE_KEY_FILE", file));
        let phrase = self.passphrase_file.as_ref().map(|file| ("ICECORE_PASSPHRASE_FILE", file));
        key.into_iter().chain(phrase)
    }
}

/// The environment of a command.
#[derive(Debug)]
pub struct Context {
    pub config: Config,
    /// The configuration file that the command names.
    pub config_path: Option<PathBuf>,
    pub state: State,
    pub cache_dir: PathBuf,
    pub json: bool,
    pub quiet: bool,
    pub engine: EngineChoice,
    pub memory: u64,
    /// The keys that the command line names, for whatever repository is opened.
    pub keys: KeyFiles,
    /// The same as they were read: a pipe can be read once.
    given_keys: OnceLock<Vec<KeyMaterial>>,
    /// Where progress is shown to others.
    pub board: Board,
    /// Whether the daemon of this host does the work.
    pub through_daemon: bool,
    /// Whether only the job's id is waited for.
    pub detach: bool,
    /// The job that a daemon has started this process for.
    pub assigned: Option<JobId>,
}

impl Context {
    /// Validates the global flags.
    pub fn new(global: &Global) -> Outcome<Self> {
        if global.memory < MEMORY_MIN {
            let why =
                format!("--memory {} is less than the 32M that moving data takes", global.memory);
            return Err(Failure::usage("start", why));
        }
        // Not clap's to judge: it does not see --daemon before the subcommand.
        if global.detach && !global.daemon {
            let why = "--detach is for what the daemon does";
            return Err(Failure::usage("start", why).next("add --daemon, or leave out --detach"));
        }
        let cache = global.cache_dir.clone().unwrap_or_else(|| global.state_dir.join("cache"));
        Ok(Self {
            config: Config::load(global.config.as_deref())?,
            config_path: global.config.clone(),
            state: State::new(&global.state_dir),
            cache_dir: cache,
            json: global.json,
            quiet: global.quiet,
            engine: match global.io_engine {
                IoEngine::Auto => EngineChoice::Auto,
                IoEngine::Uring => EngineChoice::Uring,
                IoEngine::Threads => EngineChoice::Threads,
            },
            memory: global.memory,
            keys: KeyFiles {
                key_file: global.key_file.clone(),
                passphrase_file: global.passphrase_file.clone(),
            },
            given_keys: OnceLock::new(),
            board: Board::default(),
            through_daemon: global.daemon,
            detach: global.detach,
            assigned: global.as_job.clone(),
        })
    }

    /// Where the repository `repo` is: the configured one of that name, or an address itself.
    pub fn repository_address(&self, repo: &str) -> Outcome<Address> {
        // A job remembers a repository by its address, so that is looked for, too.
        let all = &self.config.repository;
        let known = all.get(repo).or_else(|| all.values().find(|known| known.url == repo));
        let url = known.map_or(repo, |known| known.url.as_str());
        let address: Result<Address, _> = url.parse();
        let files = known.map(|known| (known.token_file.clone(), known.ca_file.clone()));
        let (token_file, ca_file) = files.unwrap_or_default();
        address.map(|address| address.with_files(token_file, ca_file)).map_err(|e| {
            Failure::usage(format!("open the repository {url:?}"), e).next(
                "name a directory, s3://BUCKET/PREFIX, sftp://USER@HOST/PATH or https://HOST/NAME",
            )
        })
    }

    /// The name under which a job remembers a repository: one that stays right in another working
    /// directory and after a change of the configuration.
    pub fn repository_name(&self, repo: &str) -> Outcome<String> {
        let absolute = self.repository_address(repo)?.absolute();
        let absolute =
            absolute.map_err(|e| Failure::usage(format!("open the repository {repo}"), e))?;
        Ok(absolute.to_string())
    }

    /// Opens a repository for reading and writing.
    pub fn open(&self, repo: &str) -> Outcome<Repository> {
        self.open_with(repo, false)
    }

    /// Opens a repository for reading only.
    pub fn open_read_only(&self, repo: &str) -> Outcome<Repository> {
        self.open_with(repo, true)
    }

    fn open_with(&self, repo: &str, read_only: bool) -> Outcome<Repository> {
        let tried = format!("open the repository {repo}");
        let address = self.repository_address(repo)?;
        let keys = self.keys(&address)?;
        let transfer = self.transfer_memory(&address)?;
        let cache_dir = Some(self.cache_dir.clone());
        let options = OpenOptions { cache_dir, read_only, keys, transfer };
        let repository = Repository::open_at(&address, options)
            .map_err(|e| Failure::from_repository(&tried, e))?;
        // Else whoever may write to the store could put a repository in clear in its place, and the
        // next backup would be readable.
        if self.key_file_of(&address).is_some() && !repository.is_encrypted() {
            let why = "the configuration has a key_file for it, and it is not encrypted";
            return Err(Failure::usage(tried, why)
                .next("find out who made it; if it is yours, take key_file out"));
        }
        Ok(repository)
    }

    /// The part of `--memory` for what is under way to and from a repository's server.
    pub fn transfer_memory(&self, address: &Address) -> Outcome<TransferMemory> {
        let is_near = matches!(address, Address::Directory(_));
        if !is_near && self.memory < MEMORY_MIN_OF_SERVERS {
            let why = format!(
                "--memory {} is less than the 80M that a repository on a server takes",
                self.memory
            );
            return Err(Failure::usage(format!("open the repository {address}"), why));
        }
        let beside = data::OVERHEAD_BYTES + data::SERVER_OVERHEAD_BYTES;
        Ok(TransferMemory::new(self.memory.saturating_sub(beside) / 2))
    }

    /// The keys to try on a repository: the configuration's for it, and those of the command line.
    pub fn keys(&self, address: &Address) -> Outcome<Vec<KeyMaterial>> {
        let bad = |e| Failure::usage("use the given key", e);
        let given = match self.given_keys.get() {
            Some(given) => given.clone(),
            None => {
                let read = self.keys.read().map_err(bad)?;
                self.given_keys.get_or_init(|| read).clone()
            }
        };
        match self.key_file_of(address).map(|file| KeyMaterial::read_key_file(file)) {
            None => Ok(given),
            Some(Ok(configured)) => Ok([vec![configured], given].concat()),
            // A recovery kit is for the day on which the key is lost.
            Some(Err(lost)) if !given.is_empty() => {
                tracing::warn!("the key_file of the configuration is not used: {lost}");
                Ok(given)
            }
            Some(Err(lost)) => Err(bad(lost)),
        }
    }

    /// The key file that the configuration has for the repository at this address. With it, the
    /// configuration says that the repository is encrypted.
    pub fn key_file_of(&self, address: &Address) -> Option<&PathBuf> {
        let wanted = address.clone().absolute().ok()?;
        let is_it = |url: &str| {
            let configured = url.parse::<Address>().ok().and_then(|a| a.absolute().ok());
            configured.is_some_and(|configured| configured == wanted)
        };
        let known = self.config.repository.values();
        known.filter(|known| is_it(&known.url)).find_map(|known| known.key_file.as_ref())
    }
}
