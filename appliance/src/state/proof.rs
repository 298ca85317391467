//! What a job has proven. The latest of each is kept for as long as there is none newer, however many
//! jobs come after it: alerts ask for it after months.

use std::collections::BTreeSet;

use super::{JobKind, JobRecord, JobState};

/// What was proven.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proof {
    /// A repository, by its place: a check of all of it that read data found nothing wrong.
    Checked(String),
    /// A VM: all disks of a restore had the content root of their point.
    Restored(String),
}

impl Proof {
    /// What this job has proven, if anything.
    pub fn of(record: &JobRecord) -> Option<Self> {
        if record.state(false) != JobState::Succeeded {
            return None;
        }
        match record.kind {
            JobKind::Check => checked(record),
            JobKind::Restore => restored(record),
            JobKind::Backup | JobKind::Rollback | JobKind::Gc | JobKind::Copy => None,
        }
    }
}

/// One point says nothing of the others, and metadata nothing of the data.
fn checked(record: &JobRecord) -> Option<Proof> {
    let result = record.result.as_ref()?;
    let count = |name: &str| result[name].as_u64();
    let has_read = count("points_checked")? == 0 || count("blocks_checked")? > 0;
    (record.point.is_none() && has_read).then(|| Proof::Checked(record.repository.clone()))
}

fn restored(record: &JobRecord) -> Option<Proof> {
    let result = record.result.as_ref()?;
    let disks = result["disks"].as_array().filter(|disks| !disks.is_empty())?;
    let all = disks.iter().all(|disk| disk["root_verified"] == true);
    all.then(|| result["vm"].as_str().map(|vm| Proof::Restored(vm.to_owned()))).flatten()
}

/// Those of `old` records, the oldest first, that are not the latest proof of something. `later` are
/// the proofs of all records that are newer still.
pub fn forgettable(old: &[JobRecord], mut later: BTreeSet<Proof>) -> Vec<&JobRecord> {
    let is_latest = |record: &JobRecord, later: &mut BTreeSet<Proof>| match Proof::of(record) {
        Some(proof) => later.insert(proof),
        None => false,
    };
    old.iter().rev().filter(|record| !is_latest(record, &mut later)).collect()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use serde_json::{Value, json};

    use super::*;
    use crate::state::JobId;

    fn ended(kind: JobKind, result: Value) -> JobRecord {
        let at = Timestamp::UNIX_EPOCH;
        let mut record = JobRecord::new(JobId::new(at).unwrap(), kind, "/r", at);
        (record.ended, record.ended_at) = (Some(JobState::Succeeded), Some(at));
        record.result = Some(result);
        record
    }

    fn restore(roots: &[bool]) -> JobRecord {
        let disks: Vec<_> = roots.iter().map(|root| json!({ "root_verified": root })).collect();
        ended(JobKind::Restore, json!({ "vm": "web", "disks": disks }))
    }

    fn check(points: u64, blocks: u64) -> JobRecord {
        ended(JobKind::Check, json!({ "points_checked": points, "blocks_checked": blocks }))
    }

    #[test]
    fn only_a_restore_whose_every_disk_is_proven_counts() {
        let web = Some(Proof::Restored("web".to_owned()));
        assert_eq!(Proof::of(&restore(&[true, true])), web);
        assert_eq!(Proof::of(&restore(&[true, false])), None);
        assert_eq!(Proof::of(&restore(&[])), None);
    }

    #[test]
    fn only_a_check_of_all_that_read_data_and_found_it_whole_counts() {
        let whole = Some(Proof::Checked("/r".to_owned()));
        assert_eq!(Proof::of(&check(2, 9)), whole);
        assert_eq!(Proof::of(&check(0, 0)), whole);
        assert_eq!(Proof::of(&check(2, 0)), None);
        let mut of_point = check(2, 9);
        of_point.point = Some("latest".to_owned());
        assert_eq!(Proof::of(&of_point), None);
        let mut failed = check(2, 9);
        failed.ended = Some(JobState::Failed);
        assert_eq!(Proof::of(&failed), None);
    }

    #[test]
    fn the_latest_proof_of_each_kind_is_not_forgotten() {
        let old = [restore(&[true]), check(1, 1), restore(&[true]), restore(&[false])];
        let gone = |later| -> Vec<_> {
            forgettable(&old, later).into_iter().map(|record| record.job.clone()).collect()
        };
        assert_eq!(gone(BTreeSet::new()), [old[3].job.clone(), old[0].job.clone()]);
        let newer = BTreeSet::from([Proof::Checked("/r".to_owned())]);
        assert_eq!(gone(newer), [&old[3], &old[1], &old[0]].map(|record| record.job.clone()));
    }
}
