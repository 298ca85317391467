//! `STATE/schedule/marks.json`: the moments of schedules that were dealt with.

use crate::failure::{Failure, Outcome};
use crate::policy::schedule::Marks;
use crate::state::{State, replace_file};

const DIR: &str = "schedule";
const FILE: &str = "marks.json";

/// Reads the marks. A file that cannot be read is taken for none: each VM waits for its next moment.
pub fn load(state: &State) -> Marks {
    let path = state.root().join(DIR).join(FILE);
    let read = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| e.to_string()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Marks::default(),
        Err(e) => Err(e.to_string()),
    };
    read.unwrap_or_else(|why| {
        tracing::warn!(path = %path.display(), why, "the marks of the schedules are lost");
        Marks::default()
    })
}

/// Writes the marks durably.
///
/// # Errors
/// When the state directory cannot be written: then no run may begin, or it would begin again.
pub fn save(state: &State, marks: &Marks) -> Outcome<()> {
    let tried = "write the marks of the schedules";
    let text = serde_json::to_vec_pretty(marks).map_err(|e| Failure::failed(tried, e))?;
    let path = state.dir(DIR)?.join(FILE);
    replace_file(&path, &text).map_err(|e| {
        Failure::failed(tried, format!("{}: {e}", path.display()))
            .next("make room there, or name another with --state-dir")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_kept_and_lost_ones_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::new(dir.path().join("state"));
        assert_eq!(load(&state), Marks::default());
        let mut marks = Marks::default();
        let at = "2026-11-20T01:30:00Z".parse().unwrap();
        marks.0.entry("nightly".into()).or_default().insert("vm1".into(), at);
        save(&state, &marks).unwrap();
        assert_eq!(load(&state), marks);
        std::fs::write(state.root().join(DIR).join(FILE), "{").unwrap();
        assert_eq!(load(&state), Marks::default());
    }
}
