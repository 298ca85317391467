//! Reading: one file after the other, then all of them as one.
//!
//! A table may stand in one file only, so that no file silently changes what another says.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{
    ApiConfig, Config, DEFAULT_PATH, LibvirtConfig, Limits, NotifyConfig, QuotaConfig,
    RepositoryConfig, ScheduleConfig, VmConfig, verify,
};
use crate::failure::{Failure, Outcome};

/// A configuration file is read whole; a larger one is something else.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Something that is wrong, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: PathBuf,
    /// Its line, from 1 on.
    pub line: usize,
    /// What is wrong.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}: {}", self.file.display(), self.line, self.what)
    }
}

/// What reading came to.
#[derive(Debug)]
pub struct Loaded {
    /// The configuration; what has problems may be missing from it.
    pub config: Config,
    /// The files it was read from.
    pub files: Vec<PathBuf>,
    /// All that is wrong.
    pub problems: Vec<Problem>,
}

type Tables<T> = BTreeMap<Spanned<String>, T>;

/// One file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    repository: Tables<RepositoryConfig>,
    #[serde(default)]
    vm: Tables<VmConfig>,
    libvirt: Option<Spanned<LibvirtConfig>>,
    #[serde(default)]
    schedule: Tables<ScheduleConfig>,
    limits: Option<Spanned<Limits>>,
    #[serde(default)]
    quota: Tables<QuotaConfig>,
    notify: Option<Spanned<NotifyConfig>>,
    api: Option<Spanned<ApiConfig>>,
}

/// Where each table stands.
#[derive(Debug, Default)]
pub(super) struct Places {
    sources: Vec<Source>,
    tables: BTreeMap<String, (usize, usize)>,
}

#[derive(Debug)]
struct Source {
    path: PathBuf,
    text: String,
}

impl Source {
    fn problem(&self, at: usize, what: String) -> Problem {
        let before = self.text.as_bytes().get(..at).unwrap_or_default();
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Problem { file: self.path.clone(), line, what }
    }
}

impl Places {
    /// A problem with a value in `table`, or with the table itself.
    pub(super) fn problem(&self, table: &str, at: Option<Range<usize>>, what: String) -> Problem {
        let (source, offset) = self.tables.get(table).copied().unwrap_or_default();
        let at = at.map_or(offset, |range| range.start);
        match self.sources.get(source) {
            Some(source) => source.problem(at, what),
            None => Problem { file: PathBuf::new(), line: 0, what },
        }
    }

    /// Remembers a table of the newest source; complains where there is one already.
    fn enter(&mut self, table: String, at: usize, problems: &mut Vec<Problem>) -> bool {
        let newest = self.sources.len().saturating_sub(1);
        match self.tables.get(&table).copied() {
            None => {
                self.tables.insert(table, (newest, at));
                true
            }
            Some((first, _)) => {
                let other = self.sources[first].path.display().to_string();
                let what = format!("[{table}] is in {other} already; keep one of the two");
                problems.push(self.sources[newest].problem(at, what));
                false
            }
        }
    }
}

/// Reads and checks a configuration: `path`, or the default file where there is one.
///
/// # Errors
/// Only when files cannot be read; what is wrong in them is in [`Loaded::problems`].
pub fn load(path: Option<&Path>) -> Outcome<Loaded> {
    let required = path.is_some();
    let main = path.unwrap_or(Path::new(DEFAULT_PATH));
    let mut config = Config::default();
    let mut places = Places::default();
    let mut problems = Vec::new();
    let mut files = Vec::new();
    let fragments = fragments(main)?;
    let all = std::iter::once((main.to_owned(), required));
    for (path, required) in all.chain(fragments.into_iter().map(|path| (path, true))) {
        let Some(text) = read(&path, required)? else { continue };
        files.push(path.clone());
        let parsed = toml::from_str::<File>(&text);
        places.sources.push(Source { path, text });
        match parsed {
            Ok(file) => merge(&mut config, file, &mut places, &mut problems),
            Err(error) => problems.extend(unparsed(&places, &error)),
        }
    }
    // References into a file that cannot be read would only repeat its problem.
    if problems.is_empty() {
        problems = verify::problems(&config, &places);
    }
    Ok(Loaded { config, files, problems })
}

fn unparsed(places: &Places, error: &toml::de::Error) -> Option<Problem> {
    let at = error.span().map_or(0, |span| span.start);
    places.sources.last().map(|source| source.problem(at, error.message().to_owned()))
}

/// The files in `conf.d` beside the main file, by name.
fn fragments(main: &Path) -> Outcome<Vec<PathBuf>> {
    let dir = main.with_file_name("conf.d");
    let tried = format!("read the configuration in {}", dir.display());
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Failure::usage(tried, e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Failure::usage(&tried, e))?.path();
        let hidden = path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "toml") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read(path: &Path, required: bool) -> Outcome<Option<String>> {
    let tried = format!("read the configuration {}", path.display());
    match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && !required => return Ok(None),
        Ok(meta) if meta.len() > FILE_BYTES_MAX => {
            return Err(Failure::usage(tried, "it is larger than any configuration"));
        }
        _ => {}
    }
    std::fs::read_to_string(path).map(Some).map_err(|e| Failure::usage(tried, e))
}

fn merge(config: &mut Config, file: File, places: &mut Places, problems: &mut Vec<Problem>) {
    fn named<T>(
        kind: &str,
        into: &mut BTreeMap<String, T>,
        tables: Tables<T>,
        places: &mut Places,
        problems: &mut Vec<Problem>,
    ) {
        for (name, table) in tables {
            let at = name.span().start;
            let name = name.into_inner();
            if places.enter(format!("{kind}.{name}"), at, problems) {
                into.insert(name, table);
            }
        }
    }
    named("repository", &mut config.repository, file.repository, places, problems);
    named("vm", &mut config.vm, file.vm, places, problems);
    named("schedule", &mut config.schedule, file.schedule, places, problems);
    named("quota", &mut config.quota, file.quota, places, problems);
    let mut single = |kind: &str, at: usize| places.enter(kind.to_owned(), at, problems);
    if let Some(table) = file.libvirt.filter(|t| single("libvirt", t.span().start)) {
        config.libvirt = Some(table.into_inner());
    }
    if let Some(table) = file.limits.filter(|t| single("limits", t.span().start)) {
        config.limits = table.into_inner();
    }
    if let Some(table) = file.notify.filter(|t| single("notify", t.span().start)) {
        config.notify = Some(table.into_inner());
    }
    if let Some(table) = file.api.filter(|t| single("api", t.span().start)) {
        config.api = table.into_inner();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(dir: &Path, name: &str, text: &str) -> PathBuf {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    #[test]
    fn unknown_keys_are_refused_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(dir.path(), "icecore.toml", "[vm.a]\nqmp = '/x'\nqmpp = '/y'\n");
        let failure = Config::load(Some(&path)).unwrap_err();
        assert_eq!(failure.status, crate::failure::Status::Usage);
        assert!(failure.why.contains("line 3") && failure.why.contains("qmpp"), "{}", failure.why);
        assert!(failure.why.contains("icecore.toml"), "{}", failure.why);
    }

    #[test]
    fn a_named_file_must_exist() {
        assert!(Config::load(Some(Path::new("/nowhere/icecore.toml"))).is_err());
        assert!(Config::load(None).is_ok());
    }

    #[test]
    fn the_example_is_accepted_and_what_it_shows_as_a_comment_too() {
        let text = include_str!("../../../packaging/icecore.toml");
        // What is commented out are keys and tables; prose has no " = " and no bracket in front.
        let bare = |line: &str| {
            let shown = line.strip_prefix("# ").unwrap_or(line);
            let key = shown.split(" = ").next().unwrap_or_default();
            let is_key = shown.contains(" = ") && !key.contains(' ');
            if is_key || shown.starts_with('[') { shown.to_owned() } else { line.to_owned() }
        };
        let all: Vec<String> = text.lines().map(bare).collect();
        let dir = tempfile::tempdir().unwrap();
        for text in [text.to_owned(), all.join("\n")] {
            let path = write(dir.path(), "icecore.toml", &text);
            assert_eq!(load(Some(&path)).unwrap().problems, []);
        }
        let config = Config::load(Some(&dir.path().join("icecore.toml"))).unwrap();
        assert!(config.notify.is_some() && config.libvirt.is_some());
        assert!(config.api.tls.is_some() && config.limits.rate.is_some());
        assert_eq!(config.vm["web"].restart.len(), 3);
    }

    #[test]
    fn fragments_are_merged_and_a_table_in_two_files_is_refused_with_both() {
        let dir = tempfile::tempdir().unwrap();
        let main =
            write(dir.path(), "icecore.toml", "[repository.r]\nurl = '/r'\n[vm.a]\nqmp = '/a'\n");
        write(dir.path(), "conf.d/10-b.toml", "# a VM\n[vm.b]\nqmp = '/b'\n[limits]\njobs = 3\n");
        write(dir.path(), "conf.d/not-read.txt", "nonsense");
        let config = Config::load(Some(&main)).unwrap();
        assert_eq!(config.vm.len(), 2);
        assert_eq!(config.limits.jobs, 3);
        write(dir.path(), "conf.d/20-a.toml", "\n\n[vm.a]\nqmp = '/c'\n[limits]\njobs = 4\n");
        let loaded = load(Some(&main)).unwrap();
        let all: Vec<String> = loaded.problems.iter().map(ToString::to_string).collect();
        assert_eq!(loaded.problems.len(), 2, "{all:?}");
        assert!(all[0].contains("20-a.toml, line 3") && all[0].contains("icecore.toml"), "{all:?}");
        assert!(all[1].contains("line 5") && all[1].contains("10-b.toml"), "{all:?}");
    }
}
