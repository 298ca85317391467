//! The small objects by which writers, deletions and gc agree.

use super::Findings;
use crate::error::Result;
use crate::repository::Inner;
use crate::writers::COORDINATION;

/// Verifies each of them. Those that go away meanwhile are no damage.
pub(super) fn check(inner: &Inner, findings: &mut Findings<'_>) -> Result<()> {
    for entry in inner.store.list(COORDINATION)? {
        let verified = inner.coordination.verify(&entry.name);
        let gone = verified.is_err() && !inner.store.exists(&entry.name)?;
        if !gone {
            findings.note(entry.name.as_str(), verified)?;
        }
    }
    let missing = inner.coordination.missing_reserve()?;
    for name in missing {
        findings.add(name, "missing", "part of the reserve is gone; `icecore gc` makes it anew");
    }
    Ok(())
}
