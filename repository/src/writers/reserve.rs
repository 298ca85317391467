//! Space set aside so that deleting and gc work in a repository whose disk is full.

use super::{Coordination, RESERVE};
use crate::error::{Damage, DamageKind, Error, Result};
use crate::store::{ObjectName, StoreErrorKind};

/// Several objects, since a full disk may lack inodes rather than bytes.
pub(crate) const RESERVE_OBJECTS: u32 = 4;
/// Enough for the records of one gc on file systems that round up to large blocks.
const RESERVE_OBJECT_BYTES: usize = 64 << 10;

impl Coordination {
    /// Runs something small that must succeed; when there is no room, gives up the reserve for it.
    pub(crate) fn with_room<T>(&self, operation: impl Fn() -> Result<T>) -> Result<T> {
        match operation() {
            Err(Error::Store(error)) if error.kind() == StoreErrorKind::NoSpace => {
                self.store.delete(&reserve_names()?)?;
                operation()
            }
            other => other,
        }
    }

    /// Sets aside what is missing of the reserve, all of it or nothing. A disk too full for it is no
    /// error.
    pub(crate) fn refill_reserve(&self) -> Result<()> {
        for name in reserve_names()? {
            if self.store.exists(&name)? {
                continue;
            }
            match self.store.put(&name, &incompressible()) {
                Ok(()) => (),
                Err(error) if error.already_exists() => (),
                Err(error) if error.kind() == StoreErrorKind::NoSpace => {
                    return Ok(self.store.delete(&reserve_names()?)?);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// What is missing of a reserve that was not given up as a whole.
    pub(crate) fn missing_reserve(&self) -> Result<Vec<ObjectName>> {
        let present = self.store.list(RESERVE)?;
        if present.is_empty() {
            return Ok(Vec::new());
        }
        let is_there = |name: &ObjectName| present.iter().any(|entry| &entry.name == name);
        Ok(reserve_names()?.into_iter().filter(|name| !is_there(name)).collect())
    }

    pub(super) fn verify_reserve(&self, name: &ObjectName) -> Result<()> {
        if self.store.read(name, RESERVE_OBJECT_BYTES as u64)? == incompressible() {
            return Ok(());
        }
        Err(Damage::new(name, DamageKind::Checksum, "it does not hold what it should").into())
    }
}

fn reserve_names() -> Result<Vec<ObjectName>> {
    let name = |number| Ok(ObjectName::new(format!("{RESERVE}{number}"))?);
    (0..RESERVE_OBJECTS).map(name).collect()
}

/// Bytes that a compressing file system cannot make smaller.
fn incompressible() -> Vec<u8> {
    let mut bytes = vec![0; RESERVE_OBJECT_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}
