//! Whether a failed job is tried again. Pure.

use std::time::Duration;

use crate::state::{JobKind, JobRecord, JobState};

/// A failure that lasts longer than this is for an operator.
const RETRIES_MAX: u32 = 3;
/// A guardian that undoes, or a VM that starts, takes less.
const FIRST_PAUSE: Duration = Duration::from_secs(30);

/// How long after its end a job is tried again; never for most.
///
/// Only a backup: it changes nothing that a second try would not undo first, while a restore or a
/// rollback has a person waiting who decides. Only after a failure that passes by itself: the VM or
/// its guardian was busy, or its QEMU did not answer.
pub fn pause(record: &JobRecord) -> Option<Duration> {
    let retries = record.order.as_ref()?.retries;
    let may = record.kind == JobKind::Backup
        && record.ended == Some(JobState::Failed)
        && record.transient
        && retries < RETRIES_MAX;
    may.then(|| FIRST_PAUSE * 4u32.pow(retries))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::JobId;
    use crate::state::jobs::Order;
    use jiff::Timestamp;

    fn failed(kind: JobKind, transient: bool, retries: u32) -> JobRecord {
        let job = JobId::new(Timestamp::UNIX_EPOCH).unwrap();
        let mut record = JobRecord::new(job, kind, "/r", Timestamp::UNIX_EPOCH);
        record.ended = Some(JobState::Failed);
        record.transient = transient;
        record.order = Some(Order {
            queued_at: Timestamp::UNIX_EPOCH,
            arguments: Vec::new(),
            requested_by: "test".into(),
            not_before: None,
            retry_of: None,
            retries,
        });
        record
    }

    #[test]
    fn only_a_backup_that_failed_in_passing_is_tried_again_and_not_for_ever() {
        let seconds = |record: &JobRecord| pause(record).map(|pause| pause.as_secs());
        assert_eq!(seconds(&failed(JobKind::Backup, true, 0)), Some(30));
        assert_eq!(seconds(&failed(JobKind::Backup, true, 2)), Some(480));
        assert_eq!(seconds(&failed(JobKind::Backup, true, 3)), None);
        assert_eq!(seconds(&failed(JobKind::Backup, false, 0)), None);
        assert_eq!(seconds(&failed(JobKind::Rollback, true, 0)), None);
        let mut cancelled = failed(JobKind::Backup, true, 0);
        cancelled.ended = Some(JobState::Cancelled);
        assert_eq!(seconds(&cancelled), None);
        cancelled.order = None;
        assert_eq!(seconds(&cancelled), None);
    }
}
