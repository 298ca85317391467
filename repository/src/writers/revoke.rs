//! Giving up a writer: the fence, then the verdict.

use std::collections::BTreeSet;

use super::{Coordination, fence_name, verdict_name};
use crate::envelope::Kind;
use crate::error::{Error, Result};
use crate::ids::{PointId, WriterId};

pub(super) const FENCE: Kind = Kind::new(b"FNCE");
pub(super) const VERDICT: Kind = Kind::new(b"VRDT");

impl Coordination {
    /// The first half of a revocation: from now on the writer reports failure. Idempotent.
    pub(crate) fn fence(&self, writer: &WriterId) -> Result<()> {
        self.with_room(|| self.put_once(&fence_name(writer)?, FENCE, writer))
    }

    /// The second half: `found` are the writer's manifests in a listing begun after the fence was
    /// durable. Returns the verdict that counts, which is the first one ever given.
    pub(crate) fn judge(
        &self,
        writer: &WriterId,
        found: &BTreeSet<PointId>,
    ) -> Result<BTreeSet<PointId>> {
        self.with_room(|| self.put_once(&verdict_name(writer)?, VERDICT, found))?;
        self.get(&verdict_name(writer)?, VERDICT)
    }

    /// The verdict on a writer; none as long as there is none, or when it cannot be read: hiding a
    /// point is the lesser evil, and `check` names the damage.
    pub(super) fn verdict(&self, writer: &WriterId) -> Result<Option<BTreeSet<PointId>>> {
        match self.get(&verdict_name(writer)?, VERDICT) {
            Ok(kept) => Ok(Some(kept)),
            Err(error) if error.damage().is_some() => Ok(None),
            Err(error @ Error::Store(_)) => Err(error),
            Err(_) => Ok(None),
        }
    }
}
