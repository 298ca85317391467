//! Domains whose rollback has begun to write and not ended: a mark each.
//!
//! `STATE/half-written/NAME.why` is there from before the first write until all images are done. Its
//! first line is for people, its second for us. libvirt's hook refuses the start of a domain that
//! has one: it looks for the file by itself, so no process of ours has to live.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Domain;
use crate::failure::{Failure, Outcome};
use crate::state::{JobId, State, replace_file, sync_parent};

/// The folder of the marks, below the state directory.
pub const FOLDER: &str = "half-written";
/// Ends the name of a mark; the domain's begins it.
pub const EXTENSION: &str = "why";
/// No mark of ours is longer.
const MARK_BYTES_MAX: u64 = 1 << 20;

/// What is known of a rollback that has begun to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HalfWritten {
    pub domain: String,
    pub uuid: String,
    /// The last run that wrote.
    pub job: JobId,
    /// The point that was wanted.
    pub point: String,
    /// The repository as the user named it.
    pub repository: String,
    /// The images that hold blocks of two states.
    pub images: Vec<PathBuf>,
    /// The domain ran when it was begun, and is to run when it is finished.
    pub ran: bool,
}

impl HalfWritten {
    /// A run of this domain that has not written yet.
    pub fn new(domain: &Domain, job: &JobId, point: &str, repository: &str, ran: bool) -> Self {
        Self {
            domain: domain.name.clone(),
            uuid: domain.uuid.clone(),
            job: job.clone(),
            point: point.to_owned(),
            repository: repository.to_owned(),
            images: Vec::new(),
            ran,
        }
    }

    /// The mark of a run that is about to write to `images`, over an earlier one's.
    fn over(mut self, earlier: Option<Self>, images: &[PathBuf]) -> Self {
        let earlier = earlier.map(|mark| mark.images).unwrap_or_default();
        self.images = earlier.into_iter().filter(|path| !images.contains(path)).collect();
        self.images.extend_from_slice(images);
        self
    }

    /// What is left of it when `images` are written; `None` when nothing is.
    fn without(mut self, images: &[PathBuf]) -> Option<Self> {
        self.images.retain(|path| !images.contains(path));
        (!self.images.is_empty()).then_some(self)
    }

    /// What an operator has to know.
    pub fn why(&self) -> String {
        let images: Vec<_> = self.images.iter().map(|path| path.display().to_string()).collect();
        format!(
            "the rollback of {} to point {} in {} (job {}) was cut off after its first write; \
             half-written: {}",
            self.domain,
            self.point,
            self.repository,
            self.job,
            images.join(", ")
        )
    }

    /// Refuses what would use or keep the half-written disks.
    pub fn refusal(&self, tried: &str) -> Failure {
        Failure::refused(tried, self.why()).next(ADVICE)
    }

    fn text(&self) -> Outcome<String> {
        let json = serde_json::to_string(self);
        let json = json.map_err(|e| Failure::failed("mark a domain as half-written", e))?;
        Ok(format!("icecore: {}: {ADVICE}\n{json}\n", self.why().replace('\n', " ")))
    }
}

/// What ends it.
const ADVICE: &str = "run the rollback again to finish it, or roll back to its safety point; \
                      'icecore vm release' gives the domain free as it is";

fn path(state: &State, domain: &str) -> PathBuf {
    state.root().join(FOLDER).join(format!("{domain}.{EXTENSION}"))
}

/// The mark of a domain, if it has one. One that cannot be read is one all the same.
pub fn get(state: &State, domain: &str) -> Outcome<Option<HalfWritten>> {
    read(&path(state, domain))
}

fn read(path: &Path) -> Outcome<Option<HalfWritten>> {
    let unreadable = |why: String| {
        Failure::failed(format!("read {}, which marks a half-written domain", path.display()), why)
            .next("'icecore vm release' gives the domain free as it is")
    };
    let text = match std::fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Ok(about) if about.len() > MARK_BYTES_MAX => {
            return Err(unreadable("it is too long".into()));
        }
        _ => std::fs::read_to_string(path).map_err(|e| unreadable(e.to_string()))?,
    };
    let mark = text.lines().nth(1).ok_or_else(|| unreadable("it is cut off".into()))?;
    serde_json::from_str(mark).map(Some).map_err(|e| unreadable(e.to_string()))
}

/// All marks, by the domain's name.
pub fn all(state: &State) -> Vec<HalfWritten> {
    let Ok(entries) = std::fs::read_dir(state.root().join(FOLDER)) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let marks = paths.filter(|path| path.extension().is_some_and(|e| e == EXTENSION));
    let read = |path: PathBuf| {
        let told = |failure: &Failure| tracing::warn!("{failure}");
        read(&path).inspect_err(told).ok().flatten()
    };
    let mut all: Vec<HalfWritten> = marks.filter_map(read).collect();
    all.sort_by(|a, b| a.domain.cmp(&b.domain));
    all
}

/// Marks a domain, durably: `images` are about to be written to.
pub fn begin(state: &State, mark: &HalfWritten, images: &[PathBuf]) -> Outcome<()> {
    // One that had this name before and is gone has left nothing to be finished.
    let earlier = get(state, &mark.domain)?.filter(|earlier| earlier.uuid == mark.uuid);
    put(state, &mark.clone().over(earlier, images))
}

/// These images of a domain are written.
pub fn end(state: &State, domain: &str, images: &[PathBuf]) -> Outcome<()> {
    match get(state, domain)?.and_then(|mark| mark.without(images)) {
        Some(rest) => put(state, &rest),
        None => forget(state, domain),
    }
}

fn put(state: &State, mark: &HalfWritten) -> Outcome<()> {
    state.dir(FOLDER)?;
    let path = path(state, &mark.domain);
    replace_file(&path, mark.text()?.as_bytes())
        .map_err(|e| Failure::failed(format!("write {}", path.display()), e))
}

/// Removes the mark of a domain.
pub fn forget(state: &State, domain: &str) -> Outcome<()> {
    let path = path(state, domain);
    let gone = std::fs::remove_file(&path).and_then(|()| sync_parent(&path));
    match gone {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::failed(format!("remove {}", path.display()), e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::libvirt::Virsh;

    fn mark(ran: bool) -> HalfWritten {
        let virsh = Virsh::new("qemu:///system").unwrap();
        let domain = Domain { virsh, uuid: "u-1".into(), name: "a b".into() };
        let job = "20260101000000-0badcafe".parse().unwrap();
        HalfWritten::new(&domain, &job, "p1", "/repo", ran)
    }

    #[test]
    fn a_mark_goes_with_its_last_image() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        assert!(all(&state).is_empty() && get(&state, "a b").unwrap().is_none());
        let [a, b] = ["/i/a".into(), "/i/b".into()] as [PathBuf; 2];
        begin(&state, &mark(true), &[a.clone(), b.clone()]).unwrap();
        begin(&state, &mark(false), std::slice::from_ref(&b)).unwrap();
        let seen = get(&state, "a b").unwrap().unwrap();
        assert_eq!((seen.images.len(), seen.ran), (2, false));
        end(&state, "a b", std::slice::from_ref(&b)).unwrap();
        assert_eq!(all(&state)[0].images, std::slice::from_ref(&a));
        end(&state, "a b", &[a]).unwrap();
        assert!(all(&state).is_empty());
        forget(&state, "a b").unwrap();
    }

    #[test]
    fn a_mark_that_cannot_be_read_is_one_and_a_namesake_inherits_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path());
        let [a, b] = ["/i/a".into(), "/i/b".into()] as [PathBuf; 2];
        begin(&state, &mark(true), &[a]).unwrap();
        let namesake = HalfWritten { uuid: "u-2".into(), ..mark(false) };
        begin(&state, &namesake, std::slice::from_ref(&b)).unwrap();
        assert_eq!(get(&state, "a b").unwrap().unwrap().images, std::slice::from_ref(&b));
        std::fs::write(path(&state, "a b"), "cut off").unwrap();
        assert!(get(&state, "a b").is_err());
        assert!(end(&state, "a b", &[b]).is_err());
        forget(&state, "a b").unwrap();
        assert!(get(&state, "a b").unwrap().is_none());
    }

    #[test]
    fn the_first_line_is_for_people() {
        let text = mark(true).text().unwrap();
        let first = text.lines().next().unwrap();
        assert!(first.contains("a b") && first.contains("p1"), "{first}");
        assert_eq!(text.lines().count(), 2);
    }
}
