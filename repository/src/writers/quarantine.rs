//! Packs that a check found damaged. New points use nothing of them, so that a disk read whole
//! stores the blocks anew; older points that need them stay damaged.

use std::collections::BTreeSet;

use super::{Coordination, QUARANTINE};
use crate::envelope::Kind;
use crate::error::Result;
use crate::ids::PackId;
use crate::store::ObjectName;

pub(super) const KIND: Kind = Kind::new(b"DMGD");

impl Coordination {
    /// Packs that must not be built on.
    pub(crate) fn quarantined(&self) -> Result<BTreeSet<PackId>> {
        Ok(self.last_parts(QUARANTINE)?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Lets no new point use these packs.
    pub(crate) fn quarantine(&self, packs: &BTreeSet<PackId>) -> Result<()> {
        packs.iter().try_for_each(|pack| {
            let name = name(*pack)?;
            self.with_room(|| self.put_once(&name, KIND, pack))
        })
    }

    /// Takes back what was said of packs that were found whole, or that are gone.
    pub(crate) fn release(&self, packs: impl IntoIterator<Item = PackId>) -> Result<()> {
        let names: Result<Vec<_>> = packs.into_iter().map(name).collect();
        Ok(self.store.delete(&names?)?)
    }
}

fn name(pack: PackId) -> Result<ObjectName> {
    Ok(ObjectName::new(format!("{QUARANTINE}{pack}"))?)
}
