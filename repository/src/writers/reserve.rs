//! Space set aside so that deleting and gc work in a repository whose disk is full.

use super::{Coordination, RESERVE};
use crate::error::{Error, Result};
use crate::store::{ObjectName, StoreErrorKind};

/// Several objects, since a full disk may lack inodes rather than bytes.
const RESERVE_OBJECTS: u32 = 4;
/// Enough for the records of one gc on file systems that round up to large blocks.
const RESERVE_OBJECT_BYTES: usize = 64 << 10;

impl Coordination {
    /// Runs something small that must succeed; when there is no room, gives up the reserve for it.
    pub(crate) fn with_room<T>(&self, operation: impl Fn() -> Result<T>) -> Result<T> {
        match operation() {
            Err(Error::Store(error)) if error.kind() == StoreErrorKind::NoSpace => {
                let reserve = self.store.list(RESERVE)?;
                let names: Vec<_> = reserve.into_iter().map(|entry| entry.name).collect();
                self.store.delete(&names)?;
                operation()
            }
            other => other,
        }
    }

    /// Sets aside what is missing of the reserve. A disk too full for it is no error.
    pub(crate) fn refill_reserve(&self) -> Result<()> {
        for number in 0..RESERVE_OBJECTS {
            let name = ObjectName::new(format!("{RESERVE}{number}"))?;
            if self.store.exists(&name)? {
                continue;
            }
            match self.store.put(&name, &incompressible()) {
                Ok(()) => (),
                Err(error) if error.already_exists() => (),
                Err(error) if error.kind() == StoreErrorKind::NoSpace => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Bytes that a compressing file system cannot make smaller.
fn incompressible() -> Vec<u8> {
    let mut bytes = vec![0; RESERVE_OBJECT_BYTES];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}
