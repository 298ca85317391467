//! Manifests kept outside of the repository: what one still says of its point, and putting one back.

use crate::error::{Damage, DamageKind, Error, Result};
use crate::ids::PointId;
use crate::manifest::{self, RECEIPT_BYTES_MAX, Receipt};
use crate::names;
use crate::point::Point;
use crate::repository::Repository;

/// What the repository holds of a point of which a manifest was kept elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RecordState {
    /// The same manifest, byte for byte.
    Identical,
    /// Another manifest under the same id: one of the two is not what it says.
    Different,
    /// The point was deleted on purpose.
    Deleted,
    /// The manifest is damaged or gone, and the receipt says that the kept one is it.
    Reinstatable(Damage),
    /// The manifest is damaged or gone, and nothing proves the kept one.
    Unproven(Damage),
    /// Nothing speaks of such a point.
    Absent,
}

impl Repository {
    /// The manifest of a point as it lies in the store, verified.
    ///
    /// # Errors
    /// As [`point`](Self::point).
    pub fn manifest_of(&self, id: &PointId) -> Result<Vec<u8>> {
        self.point(id)?;
        let bytes = self.inner.manifest_bytes(id)?;
        self.read_manifest(id, &bytes)?;
        Ok(bytes)
    }

    /// The point that a manifest describes, with all parts of its capsule verified.
    ///
    /// # Errors
    /// `Damaged` when it is no manifest of this point in this repository.
    pub fn read_manifest(&self, id: &PointId, bytes: &[u8]) -> Result<Point> {
        let (point, parts) = self.inner.decode_manifest(id, bytes)?;
        for part in &point.parts {
            manifest::part(&point, &parts, part.name.as_str())?;
        }
        Ok(point)
    }

    /// Compares a kept manifest with what there is.
    ///
    /// # Errors
    /// `Damaged` when the kept one is; the store's.
    pub fn compare_manifest(&self, id: &PointId, kept: &[u8]) -> Result<RecordState> {
        let point = self.read_manifest(id, kept)?;
        if self.inner.coordination.standing()?.is_deleted(id) {
            return Ok(RecordState::Deleted);
        }
        let found = self
            .inner
            .manifest_bytes(id)
            .and_then(|bytes| self.read_manifest(id, &bytes).map(|_| bytes));
        let damage = match found {
            Ok(bytes) if bytes == kept => return Ok(RecordState::Identical),
            Ok(_) => return Ok(RecordState::Different),
            Err(error) => error.damage().ok_or(error)?,
        };
        match self.receipt(id) {
            Ok(receipt) if receipt == Receipt::of(&point, kept) => {
                Ok(RecordState::Reinstatable(damage))
            }
            Ok(_) => Ok(RecordState::Unproven(damage)),
            Err(error) if error.damage().is_none() => Err(error),
            Err(_) if damage.kind == DamageKind::Missing => Ok(RecordState::Absent),
            Err(_) => Ok(RecordState::Unproven(damage)),
        }
    }

    /// Puts a kept manifest in the place of one that is damaged or gone. What the point refers to
    /// may have been collected meanwhile: check the point afterwards.
    ///
    /// # Errors
    /// `Refused` unless [`compare_manifest`](Self::compare_manifest) says
    /// [`RecordState::Reinstatable`]; `ReadOnly`; the store's.
    pub fn reinstate_manifest(&self, id: &PointId, kept: &[u8]) -> Result<()> {
        self.inner.refuse_read_only("put a manifest back")?;
        let RecordState::Reinstatable(damage) = self.compare_manifest(id, kept)? else {
            return Err(Error::Refused {
                what: format!("the kept manifest of point {id} is not the one that is missing"),
                advice: "compare it with the repository first",
            });
        };
        let name = names::manifest(id)?;
        if damage.kind != DamageKind::Missing {
            // Names are created once; what is damaged has to make room.
            self.inner.store.delete(std::slice::from_ref(&name))?;
        }
        Ok(self.inner.store.put(&name, kept)?)
    }

    fn receipt(&self, id: &PointId) -> Result<Receipt> {
        let bytes = self.inner.store.read(&names::receipt(id)?, RECEIPT_BYTES_MAX)?;
        Receipt::decode(&self.inner.sealing, id, &bytes)
    }
}
