//! The configuration: what an operator writes in `icecore.toml` and in `conf.d/*.toml` beside it.
//!
//! Unknown keys, values that are none and names that lead nowhere are refused with their file and
//! line. A file named by `--config` must exist; the default one need not. Every default is written
//! beside its key here and in `packaging/icecore.toml`.
//!
//! Consequences of a configuration (which run is due, which point goes) are decided in
//! [`policy`](crate::policy); this module only reads.

mod load;
mod value;
mod verify;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use load::{Loaded, Problem, load};
pub use value::{Pattern, Reference, Zone};

use crate::failure::{Failure, Outcome};
use crate::libvirt::CaptureForm;
use crate::policy::calendar::Calendar;
use crate::policy::retention::Keep;
use crate::policy::window::TimeRange;

/// Read when `--config` is not given and it exists.
pub const DEFAULT_PATH: &str = "/etc/icecore/icecore.toml";
/// The API's socket where `[api]` names no other.
pub const DEFAULT_SOCKET: &str = "/run/icecore/api.sock";

/// The whole configuration, merged and checked.
#[derive(Debug, Default)]
pub struct Config {
    /// `[repository.NAME]`
    pub repository: BTreeMap<String, RepositoryConfig>,
    /// `[vm.NAME]`
    pub vm: BTreeMap<String, VmConfig>,
    /// `[libvirt]`
    pub libvirt: Option<LibvirtConfig>,
    /// `[schedule.NAME]`
    pub schedule: BTreeMap<String, ScheduleConfig>,
    /// `[limits]`
    pub limits: Limits,
    /// `[quota.PROJECT]`
    pub quota: BTreeMap<String, QuotaConfig>,
    /// `[notify]`
    pub notify: Option<NotifyConfig>,
    /// `[api]`
    pub api: ApiConfig,
}

impl Config {
    /// Reads `path`, or the default file where there is one, and what lies in `conf.d` beside it.
    pub fn load(path: Option<&std::path::Path>) -> Outcome<Self> {
        let loaded = load(path)?;
        if loaded.problems.is_empty() {
            return Ok(loaded.config);
        }
        let why: Vec<String> = loaded.problems.iter().map(ToString::to_string).collect();
        Err(Failure::usage("read the configuration", why.join("\n  "))
            .next("correct it, then try 'icecore config check'"))
    }

    /// The names of all VMs that a schedule's patterns mean, among `known` ones.
    pub fn vms_of<'a>(schedule: &ScheduleConfig, known: &'a [String]) -> Vec<&'a str> {
        let meant = |name: &&String| schedule.vms.iter().any(|p| Pattern::of(p).matches(name));
        known.iter().filter(meant).map(String::as_str).collect()
    }
}

/// A repository under a name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryConfig {
    /// A directory's path.
    pub url: String,
    /// The file with its key. With it, a repository that is not encrypted is refused.
    pub key_file: Option<PathBuf>,
    /// The file with this host's token, for a repository server.
    pub token_file: Option<PathBuf>,
    /// The file with the certificates that a repository server's is checked against.
    pub ca_file: Option<PathBuf>,
}

/// A VM under a name: a running QEMU's sockets, or a powered-off VM's images.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// QMP socket.
    pub qmp: Option<PathBuf>,
    /// Guest agent socket.
    pub qga: Option<PathBuf>,
    /// `[ID=]FILE` of each disk of a powered-off VM.
    #[serde(default)]
    pub image: Vec<String>,
    /// The disks to back up; all when empty.
    #[serde(default)]
    pub disks: Vec<String>,
    /// Program and arguments that start the VM after a rollback, in place of a reset; no shell.
    #[serde(default)]
    pub restart: Vec<String>,
    /// How a domain of the libvirt is captured while it runs: `job` (the default) or `direct`.
    #[serde(default)]
    pub capture: CaptureForm,
    /// The project whose quota its points count against; none when left out.
    pub project: Option<String>,
}

/// The domains of a libvirt.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LibvirtConfig {
    /// Its URI.
    #[serde(default = "default_uri")]
    pub uri: String,
    /// Domains that are ours, by name, `*` standing for anything; all when left out.
    #[serde(default = "everything")]
    pub include: Vec<Pattern>,
    /// Domains of these that are not.
    #[serde(default)]
    pub exclude: Vec<Pattern>,
}

impl LibvirtConfig {
    /// Whether a domain of this name is ours.
    pub fn has(&self, name: &str) -> bool {
        let any = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.matches(name));
        any(&self.include) && !any(&self.exclude)
    }
}

fn default_uri() -> String {
    "qemu:///system".into()
}

fn everything() -> Vec<Pattern> {
    vec![Pattern::of("*")]
}

/// How much a scheduled backup reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScheduledLevel {
    /// Incremental where it can be trusted.
    #[default]
    Auto,
    /// A new chain each time.
    Full,
    /// Never a new chain.
    Incremental,
}

impl ScheduledLevel {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// What becomes of a run whose time passed while nobody could start it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Missed {
    /// It is made up for, once.
    #[default]
    Run,
    /// It is left out; the next one comes at its time.
    Skip,
}

/// When which VMs are backed up where, and which points stay.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Five cron fields or `@daily` and the like.
    #[serde(default, deserialize_with = "value::cron")]
    pub cron: Option<Calendar>,
    /// A calendar expression as systemd writes them.
    #[serde(default, deserialize_with = "value::calendar")]
    pub calendar: Option<Calendar>,
    /// VMs, `*` standing for anything.
    pub vms: Vec<Reference>,
    /// Where to: a configured repository.
    pub repository: Reference,
    /// How much is read.
    #[serde(default)]
    pub level: ScheduledLevel,
    /// Which points stay after a run; all when left out.
    pub retention: Option<Keep>,
    /// Runs begin only within these; at any time when left out.
    #[serde(default)]
    pub window: Vec<TimeRange>,
    /// Runs never begin within these.
    #[serde(default)]
    pub blackout: Vec<TimeRange>,
    /// VMs are spread over so long a time after the moment; 0 when left out.
    #[serde(default, deserialize_with = "value::duration")]
    pub jitter: Duration,
    /// Runs of this schedule at once; 1 when left out.
    #[serde(default = "one")]
    pub concurrency: u32,
    /// The zone of all its times; the host's when left out.
    pub timezone: Option<Zone>,
    /// What becomes of a run whose time passed.
    #[serde(default)]
    pub missed: Missed,
}

fn one() -> u32 {
    1
}

impl ScheduleConfig {
    /// Its moments, whichever way they are written.
    pub fn moments(&self) -> Option<&Calendar> {
        self.calendar.as_ref().or(self.cron.as_ref())
    }

    /// The zone of its times.
    pub fn zone(&self) -> jiff::tz::TimeZone {
        self.timezone.as_ref().map_or_else(jiff::tz::TimeZone::system, |zone| zone.0.clone())
    }
}

/// What this host's jobs may take together.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Jobs at once on this host; 2 when left out.
    #[serde(default = "default_jobs")]
    pub jobs: u32,
    /// Jobs at once on one repository; as many as on the host when left out.
    pub jobs_per_repository: Option<u32>,
    /// A job reads no faster, in bytes a second; as fast as it can when left out.
    #[serde(default, deserialize_with = "value::rate")]
    pub rate: Option<u64>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { jobs: default_jobs(), jobs_per_repository: None, rate: None }
    }
}

/// Two runs keep a disk busy; more make each guest wait longer for its own.
fn default_jobs() -> u32 {
    2
}

/// What the points of a project may take in each repository.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuotaConfig {
    /// Points; any number when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub points: Option<u64>,
    /// Stored data in GiB; any amount when left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gigabytes: Option<f64>,
}

/// What is told of without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NotifyOn {
    /// A job failed.
    Failure,
    /// A disk was read whole although it had a parent.
    Fallback,
    /// A run was not made at its time.
    Missed,
}

/// Who is told.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NotifyConfig {
    /// Of what; of everything when left out.
    #[serde(default = "every_event")]
    pub on: Vec<NotifyOn>,
    /// An http or https URL that takes a JSON document by POST.
    pub webhook: Option<Reference>,
    /// Addresses that get a mail.
    #[serde(default)]
    pub mail: Vec<String>,
    /// The sender; `icecore@` and the host's name when left out.
    pub from: Option<String>,
    /// The program that takes a mail with its header on standard input.
    #[serde(default = "default_sendmail")]
    pub sendmail: Vec<String>,
}

fn every_event() -> Vec<NotifyOn> {
    vec![NotifyOn::Failure, NotifyOn::Fallback, NotifyOn::Missed]
}

fn default_sendmail() -> Vec<String> {
    vec!["/usr/sbin/sendmail".into(), "-t".into(), "-i".into()]
}

/// Where the daemon listens.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiConfig {
    /// The unix socket.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// A group whose members may use the socket as operators; root alone when left out.
    pub group: Option<String>,
    /// A TCP address as well; it needs `tls` and at least one token.
    pub listen: Option<Reference>,
    /// Certificate and key for `listen`.
    pub tls: Option<TlsConfig>,
    /// `[api.tokens.NAME]`: who may come in over TCP.
    #[serde(default)]
    pub tokens: BTreeMap<String, TokenConfig>,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            socket: default_socket(),
            group: None,
            listen: None,
            tls: None,
            tokens: BTreeMap::new(),
        }
    }
}

fn default_socket() -> PathBuf {
    DEFAULT_SOCKET.into()
}

/// Files for TLS.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// The certificate chain, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Lists and reports.
    Read,
    /// And starts and cancels jobs.
    Operate,
    /// And deletes.
    Administer,
}

/// A token.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenConfig {
    /// What it allows.
    pub role: Role,
    /// The file that holds it; never in the configuration itself.
    pub file: PathBuf,
}
