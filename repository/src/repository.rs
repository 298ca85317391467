//! A repository as its users hold it.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::block::{BlockHasher, Compression};
use crate::cache::Cache;
use crate::catalog::Catalog;
use crate::config::{CONFIG_BYTES_MAX, Config};
use crate::decoder::TocCache;
use crate::error::{Damage, DamageKind, Error, Result};
use crate::geometry::BlockSize;
use crate::ids::{ChainId, DiskId, PointId, RepositoryId, VmName};
use crate::kept::Kept;
use crate::lock::LockPolicy;
use crate::manifest::{self, MANIFEST_BYTES_MAX};
use crate::names;
use crate::point::Point;
use crate::reader::DiskReader;
use crate::resolve;
use crate::sealing::Sealing;
use crate::store::{ObjectLock, ObjectName, Store, Traffic, TransferMemory};
use crate::writers::Coordination;

/// Figures of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryInfo {
    /// Its id.
    pub id: RepositoryId,
    /// Version of its format.
    pub version: u32,
    /// Size of its blocks.
    pub block_size: BlockSize,
    /// Whether blocks are sealed.
    pub encrypted: bool,
    /// How new blocks are compressed.
    pub compression: Compression,
    /// How objects are locked; none where they are not.
    pub lock: Option<LockPolicy>,
    /// Points that readers see.
    pub points: u64,
    /// Chains that they belong to.
    pub chains: u64,
    /// Sum of the sizes of all disks of all points.
    pub logical_bytes: u64,
    /// Bytes of all objects.
    pub stored_bytes: u64,
    /// Packs.
    pub packs: u64,
}

/// An open repository; clones share everything.
#[derive(Clone)]
pub struct Repository {
    pub(crate) inner: Arc<Inner>,
}

/// All points, those that can be read and those that cannot.
struct Survey {
    points: Vec<Point>,
    damaged: Vec<(PointId, Damage)>,
}

pub(crate) struct Inner {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) config: Config,
    pub(crate) sealing: Sealing,
    pub(crate) coordination: Coordination,
    pub(crate) cache: Option<Cache>,
    /// Of a repository on a server.
    pub(crate) kept: Option<Kept>,
    pub(crate) read_only: bool,
    pub(crate) transfer: TransferMemory,
    pub(crate) catalog: Catalog,
    pub(crate) tocs: TocCache,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Repository({} in {})", self.inner.config.id, self.location())
    }
}

impl Repository {
    /// The repository's id.
    #[must_use]
    pub fn id(&self) -> &RepositoryId {
        &self.inner.config.id
    }

    /// Where it is, for messages.
    #[must_use]
    pub fn location(&self) -> &str {
        self.inner.store.location()
    }

    /// Requests and bytes between this process and the repository's server so far; none where there
    /// is no server.
    #[must_use]
    pub fn traffic(&self) -> Option<Traffic> {
        self.inner.store.traffic()
    }

    /// Memory that is set aside for what is under way to and from the repository's server; 0 where
    /// there is none.
    #[must_use]
    pub fn transfer_bytes(&self) -> u64 {
        if self.inner.store.readers() == 0 { 0 } else { self.inner.transfer.bytes() }
    }

    /// The size of its blocks.
    #[must_use]
    pub fn block_size(&self) -> BlockSize {
        self.inner.config.block_size
    }

    /// Computes block ids as this repository does.
    #[must_use]
    pub fn hasher(&self) -> BlockHasher {
        self.inner.sealing.hasher()
    }

    /// Whether its objects are encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.inner.config.is_encrypted()
    }

    /// Figures; lists all objects.
    ///
    /// # Errors
    /// The store's.
    pub fn info(&self) -> Result<RepositoryInfo> {
        let points = self.points()?;
        let objects = self.inner.store.list("")?;
        let packs = objects.iter().filter(|entry| entry.name.as_str().starts_with(names::PACKS));
        let chains: BTreeSet<_> = points.iter().map(|point| &point.chain).collect();
        let config = &self.inner.config;
        Ok(RepositoryInfo {
            id: config.id.clone(),
            version: config.version,
            block_size: config.block_size,
            encrypted: config.is_encrypted(),
            compression: config.compression,
            lock: config.lock(),
            points: points.len() as u64,
            chains: chains.len() as u64,
            logical_bytes: points.iter().map(Point::size_bytes).fold(0, u64::saturating_add),
            stored_bytes: objects.iter().map(|entry| entry.bytes).sum(),
            packs: packs.count() as u64,
        })
    }

    /// All points in the order of their ids. A manifest that cannot be read is left out with a
    /// warning; `check` names it.
    ///
    /// # Errors
    /// The store's.
    pub fn points(&self) -> Result<Vec<Point>> {
        let ids = self.point_ids(names::POINTS)?;
        // After the listing, never before: what this shows was shown to a revoking gc too.
        let standing = self.inner.coordination.standing()?;
        let mut points = self.inner.catalog.points(&self.inner, &ids)?;
        points.retain(|point| standing.sees(&point.id, &point.writer_id));
        Ok(points)
    }

    /// One point, read from its manifest.
    ///
    /// # Errors
    /// `NotFound` also when it was deleted; `Damaged` when its manifest is.
    pub fn point(&self, id: &PointId) -> Result<Point> {
        let absent = || Error::NotFound { what: format!("point {id}") };
        let bytes = match self.inner.manifest_bytes(id) {
            Err(Error::Store(error)) if error.is_not_found() => {
                // What has a receipt and no tombstone was a point, and its manifest has vanished.
                let vanished = self.inner.store.exists(&names::receipt(id)?)?
                    && !self.inner.coordination.standing()?.is_deleted(id);
                return Err(if vanished { error.into() } else { absent() });
            }
            other => other?,
        };
        let point = self.inner.decode_manifest(id, &bytes)?.0;
        let standing = self.inner.coordination.standing()?;
        if standing.sees(id, &point.writer_id) { Ok(point) } else { Err(absent()) }
    }

    /// Whether a point was committed, asked by somebody who does not know how its commit ended (it
    /// failed as `CommitUnknown`, or the process died in it). What this finds is durable: bitmaps
    /// may be retired on its word. None is final only if the writer's process is gone.
    ///
    /// # Errors
    /// `Damaged` when its manifest is; the store's.
    pub fn confirm_point(&self, id: &PointId) -> Result<Option<Point>> {
        // A writer killed between showing its manifest and fsyncing the directory leaves one that a
        // power cut would take back.
        self.inner.store.settle(names::POINTS)?;
        match self.point(id) {
            Ok(point) => Ok(Some(point)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// One binary part of a point's capsule.
    ///
    /// # Errors
    /// `NotFound` when there is no such part, `Damaged` when it is not what it was.
    pub fn capsule_part(&self, point: &Point, name: &str) -> Result<Vec<u8>> {
        let bytes = self.inner.manifest_bytes(&point.id)?;
        let (point, parts) = self.inner.decode_manifest(&point.id, &bytes)?;
        manifest::part(&point, &parts, name)
    }

    /// The point meant by `latest`, `latest~N`, a full id (of a copy also that of its origin) or a
    /// unique prefix, among those of `vm` or of all.
    ///
    /// # Errors
    /// `NotFound` or `Ambiguous`.
    pub fn resolve(&self, spec: &str, vm: Option<&VmName>) -> Result<PointId> {
        let Survey { points, damaged } = self.survey()?;
        let of_vm = |point: &&Point| vm.is_none_or(|vm| vm == &point.vm);
        let mut ids: Vec<PointId> =
            points.iter().filter(of_vm).map(|point| point.id.clone()).collect();
        // A damaged point does not say whose it is. It counts, so that the one before it is never
        // quietly taken for the newest.
        ids.extend(damaged.into_iter().map(|(id, _)| id));
        ids.sort_unstable();
        resolve::point(spec, &ids.iter().collect::<Vec<_>>()).or_else(|error| {
            // A copy is also found by the id that it had where it was taken.
            let is_copy = |point: &&Point| {
                point.origin.as_ref().is_some_and(|origin| origin.point.as_str() == spec)
            };
            let copy = points.iter().filter(of_vm).rfind(is_copy);
            copy.map(|copy| copy.id.clone()).ok_or(error)
        })
    }

    /// Points that were committed and not deleted, and whose manifests cannot be read any more.
    ///
    /// # Errors
    /// The store's.
    pub fn damaged_points(&self) -> Result<Vec<(PointId, Damage)>> {
        Ok(self.survey()?.damaged)
    }

    /// All points, and those that are damaged, in one go: each listing of a far store is a journey.
    fn survey(&self) -> Result<Survey> {
        let manifests = self.point_ids(names::POINTS)?;
        let receipts = self.point_ids(names::RECEIPTS)?;
        // After the listings, never before, as everywhere.
        let standing = self.inner.coordination.standing()?;
        let mut points = self.inner.catalog.points(&self.inner, &manifests)?;
        points.retain(|point| standing.sees(&point.id, &point.writer_id));
        let known: BTreeSet<&PointId> = points.iter().map(|point| &point.id).collect();
        let mut damaged = Vec::new();
        for id in manifests.union(&receipts).filter(|id| !known.contains(id)) {
            if standing.is_deleted(id) {
                continue;
            }
            let read = self
                .inner
                .manifest_bytes(id)
                .and_then(|bytes| self.inner.decode_manifest(id, &bytes).map(drop));
            match read {
                // Whole, but of a writer that was given up: no point of any reader.
                Ok(()) => {}
                // Without a receipt it was removed between two looks.
                Err(Error::Store(error)) if error.is_not_found() && !receipts.contains(id) => {}
                Err(error) => match error.damage() {
                    Some(damage) => damaged.push((id.clone(), damage)),
                    None => return Err(error),
                },
            }
        }
        Ok(Survey { points, damaged })
    }

    fn point_ids(&self, prefix: &str) -> Result<BTreeSet<PointId>> {
        let listed = self.inner.store.names(prefix)?;
        Ok(listed.iter().filter_map(|name| name.last_part().parse().ok()).collect())
    }

    /// For each of `wanted` the newest point that it says yes to. They are looked for from the
    /// newest point on, so that it costs little however many there are.
    pub(crate) fn newest<F: Fn(&Point) -> bool>(&self, wanted: &[F]) -> Result<Vec<Option<Point>>> {
        let ids = self.point_ids(names::POINTS)?;
        // After the listing, never before: what this shows was shown to a revoking gc too.
        let standing = self.inner.coordination.standing()?;
        let sees = |point: &Point| standing.sees(&point.id, &point.writer_id);
        self.inner.catalog.newest(&self.inner, &ids, |point| sees(point), wanted)
    }

    /// Of the `most` newest points those that are not `known`, the oldest first.
    pub(crate) fn news(&self, most: usize, known: impl Fn(&PointId) -> bool) -> Result<Vec<Point>> {
        let ids = self.point_ids(names::POINTS)?;
        let new: BTreeSet<PointId> =
            ids.into_iter().rev().take(most).filter(|id| !known(id)).collect();
        if new.is_empty() {
            return Ok(Vec::new());
        }
        // After the listing, never before, as everywhere.
        let standing = self.inner.coordination.standing()?;
        let mut points = self.inner.catalog.some(&self.inner, &new)?;
        points.retain(|point| standing.sees(&point.id, &point.writer_id));
        Ok(points)
    }

    /// The newest point of a VM, or of one of its chains.
    ///
    /// # Errors
    /// The store's.
    pub fn newest_of(&self, vm: &VmName, chain: Option<&ChainId>) -> Result<Option<Point>> {
        let fits =
            |point: &Point| &point.vm == vm && chain.is_none_or(|chain| chain == &point.chain);
        Ok(self.newest(&[fits])?.pop().flatten())
    }

    /// The newest point of a VM (and chain) that holds a disk: the parent of its next delta.
    ///
    /// # Errors
    /// The store's.
    pub fn newest_with_disk(
        &self,
        vm: &VmName,
        chain: Option<&ChainId>,
        disk: &DiskId,
    ) -> Result<Option<Point>> {
        Ok(self.newest_with_disks(vm, chain, &[disk])?.pop().flatten())
    }

    /// As [`newest_with_disk`](Self::newest_with_disk) for several disks, in their order.
    ///
    /// # Errors
    /// The store's.
    pub fn newest_with_disks(
        &self,
        vm: &VmName,
        chain: Option<&ChainId>,
        disks: &[&DiskId],
    ) -> Result<Vec<Option<Point>>> {
        let fits = |disk: &DiskId, point: &Point| {
            let chain_fits = chain.is_none_or(|chain| chain == &point.chain);
            &point.vm == vm && chain_fits && point.disk(disk).is_some()
        };
        let wanted: Vec<_> =
            disks.iter().map(|disk| move |point: &Point| fits(disk, point)).collect();
        self.newest(&wanted)
    }

    /// Reads one disk of a point.
    ///
    /// # Errors
    /// `NotFound` when the point lacks the disk, `Damaged` when its map cannot be opened.
    pub fn disk_reader(&self, point: &Point, disk: &DiskId) -> Result<DiskReader> {
        let Some(held) = point.disk(disk) else {
            return Err(Error::NotFound { what: format!("disk {disk} in point {}", point.id) });
        };
        DiskReader::open(Arc::clone(&self.inner), held)
    }
}

impl Inner {
    /// Opens an object whose tables may have been kept on this host. `is_sound` looks at what opening
    /// it does not, before all of it is kept.
    pub(crate) fn open_kept<T>(
        &self,
        name: &ObjectName,
        open: impl Fn(&Arc<dyn Store>) -> Result<T>,
        is_sound: impl Fn(&Arc<dyn Store>) -> bool,
    ) -> Result<T> {
        match &self.kept {
            Some(kept) => kept.open(&self.store, name, open, is_sound),
            None => open(&self.store),
        }
    }

    /// Reads the config again, as `check` does.
    pub(crate) fn verify_config(&self) -> Result<()> {
        let config = Config::decode(&self.store.read(&names::config()?, CONFIG_BYTES_MAX)?)?;
        if config == self.config {
            return Ok(());
        }
        let detail = "it is not what it was when the repository was opened";
        Err(Damage::new(names::CONFIG, DamageKind::Inconsistent, detail).into())
    }

    pub(crate) fn manifest_bytes(&self, id: &PointId) -> Result<Vec<u8>> {
        Ok(self.store.read(&names::manifest(id)?, MANIFEST_BYTES_MAX)?)
    }

    pub(crate) fn decode_manifest(&self, id: &PointId, bytes: &[u8]) -> Result<(Point, Vec<u8>)> {
        manifest::decode(&self.sealing, self.config.block_size, id, bytes)
    }

    /// Until when a point is locked, if it still is. One that cannot be read does not say; then the
    /// store knows.
    pub(crate) fn locked_until(&self, id: &PointId) -> Result<Option<jiff::Timestamp>> {
        let Some(lock) = self.store.lock().filter(|_| self.config.lock().is_some()) else {
            return Ok(None);
        };
        let now = lock.now();
        match self.manifest_bytes(id).and_then(|bytes| self.decode_manifest(id, &bytes)) {
            Ok((point, _)) => Ok(point.lock.map(|lock| lock.until).filter(|until| *until > now)),
            Err(error) if error.damage().is_some() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn refuse_read_only(&self, action: &'static str) -> Result<()> {
        if self.read_only {
            let location = self.store.location().to_owned();
            return Err(Error::ReadOnly { action, location });
        }
        Ok(())
    }
}

/// Random bytes of the operating system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| Error::Refused {
        what: format!("the system gives no random numbers: {error}"),
        advice: "wait until its random source is ready",
    })?;
    Ok(bytes)
}

/// The locks of the store of a repository that has them.
pub(crate) fn lock_of(store: &dyn Store) -> Result<&dyn ObjectLock> {
    store.lock().ok_or_else(|| Error::Refused {
        what: format!("objects are to be locked, and {} cannot do that", store.location()),
        advice: "use an object store that speaks S3",
    })
}

/// Deletes objects, but for those that locks keep; returns these.
pub(crate) fn delete_unlocked(store: &dyn Store, names: &[ObjectName]) -> Result<Vec<ObjectName>> {
    Ok(match store.lock() {
        Some(lock) => lock.delete_unlocked(names)?,
        None => store.delete(names).map(|()| Vec::new())?,
    })
}
