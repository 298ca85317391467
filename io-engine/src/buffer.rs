//! Page-aligned buffers that are reused, within a number of bytes that is never exceeded.
//!
//! The memory is mapped, so what is given back really leaves the process, and it starts zeroed, so
//! every byte is initialised at all times.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::budget::BudgetError;
use crate::error::EngineError;
use crate::limits::{PAGE, WAKE};

/// One mapping of `size` bytes, owned.
struct Mapping {
    at: NonNull<u8>,
    size: usize,
}

// SAFETY: a Mapping owns its memory exclusively and has no thread affinity.
unsafe impl Send for Mapping {}
// SAFETY: shared access only reads through `&self`.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(size: usize) -> Result<Self, EngineError> {
        let failed = |errno: rustix::io::Errno| EngineError::Memory { size, source: errno.into() };
        // SAFETY: a fresh private anonymous mapping at an address that the kernel chooses touches
        // no memory that anyone else refers to.
        let at = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        let at = NonNull::new(at.map_err(failed)?.cast::<u8>());
        Ok(Self { at: at.ok_or_else(|| failed(rustix::io::Errno::NOMEM))?, size })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this size, is owned by us alone, and whoever
        // gave its address to the kernel keeps it alive until the kernel has answered.
        if let Err(errno) = unsafe { munmap(self.at.as_ptr().cast(), self.size) } {
            tracing::warn!(%errno, size = self.size, "could not unmap a buffer");
        }
    }
}

/// A mapping and the pool that it returns to when the last part of it is dropped.
struct Lease {
    mapping: Option<Mapping>,
    pool: Option<Arc<Shared>>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let (Some(pool), Some(mapping)) = (self.pool.take(), self.mapping.take()) {
            pool.give_back(mapping);
        }
    }
}

/// A piece of memory of a fixed length, page-aligned unless it was split off at another place.
///
/// Its address stays the same when the `Buffer` moves.
pub(crate) struct Buffer {
    lease: Arc<Lease>,
    /// Where it begins in the mapping. No two buffers of one lease overlap.
    from: usize,
    len: usize,
}

impl Buffer {
    /// Memory outside any pool, for the small fixed parts of a lane.
    pub(crate) fn fixed(len: usize) -> Result<Self, EngineError> {
        let mapping = Mapping::new(len.max(1).next_multiple_of(PAGE))?;
        Ok(Self::of(mapping, len, None))
    }

    fn of(mapping: Mapping, len: usize, pool: Option<Arc<Shared>>) -> Self {
        Self { lease: Arc::new(Lease { mapping: Some(mapping), pool }), from: 0, len }
    }

    /// Splits the first `at` bytes (no more than there are) off; what is left keeps its place.
    pub(crate) fn split_to(&mut self, at: usize) -> Self {
        let len = at.min(self.len);
        let first = Self { lease: Arc::clone(&self.lease), from: self.from, len };
        self.from += len;
        self.len -= len;
        first
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.lease.mapping {
            // SAFETY: `from + len` never passes the end of the mapping, whose bytes are initialised
            // and live as long as the lease.
            Some(mapping) => unsafe {
                std::slice::from_raw_parts(mapping.at.as_ptr().add(self.from), self.len)
            },
            None => &[],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &self.lease.mapping {
            // SAFETY: as in `deref`; buffers of one lease are disjoint, so `&mut self` makes the
            // access exclusive.
            Some(map) => unsafe {
                std::slice::from_raw_parts_mut(map.at.as_ptr().add(self.from), self.len)
            },
            None => &mut [],
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

/// Buffers of up to `limit` bytes in all, idle ones included, in classes of powers of two.
#[derive(Clone)]
pub(crate) struct Pool(Arc<Shared>);

struct Shared {
    limit: usize,
    state: Mutex<State>,
    freed: Condvar,
}

#[derive(Default)]
struct State {
    mapped: usize,
    idle_bytes: usize,
    idle: BTreeMap<usize, Vec<Mapping>>,
    waiting: bool,
}

impl State {
    fn in_use(&self) -> usize {
        self.mapped - self.idle_bytes
    }

    fn take_idle(&mut self, class: usize) -> Option<Mapping> {
        let mapping = self.idle.get_mut(&class)?.pop()?;
        self.idle_bytes -= class;
        Some(mapping)
    }

    /// Unmaps idle buffers until `class` more bytes fit in `limit`; false if they cannot.
    fn make_room(&mut self, class: usize, limit: usize) -> bool {
        while self.mapped + class > limit {
            let Some(other) = self.idle.iter().find(|(_, list)| !list.is_empty()) else {
                return false;
            };
            let other = *other.0;
            drop(self.take_idle(other));
            self.mapped -= other;
        }
        true
    }
}

impl Pool {
    /// A pool that maps at most `limit` bytes.
    pub(crate) fn new(limit: u64) -> Self {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let state = Mutex::new(State::default());
        Self(Arc::new(Shared { limit, state, freed: Condvar::new() }))
    }

    /// What a buffer of `len` bytes takes of the pool.
    pub(crate) fn cost(len: usize) -> usize {
        len.max(PAGE).next_power_of_two()
    }

    /// A buffer of `len` bytes with undefined content, waiting until one is free.
    ///
    /// Once it had to wait it goes on waiting until half of the pool is free: requests then go out
    /// in bursts, which spares the server far more CPU than a steady trickle of single ones.
    pub(crate) fn get(
        &self,
        len: usize,
        cancelled: impl Fn() -> bool,
    ) -> Result<Buffer, EngineError> {
        let shared = &self.0;
        let class = Self::cost(len);
        if class > shared.limit {
            let (asked, total) = (class as u64, shared.limit as u64);
            return Err(BudgetError::TooLarge { asked, total }.into());
        }
        let mut state = shared.locked();
        let mut enough = shared.limit;
        loop {
            if cancelled() {
                return Err(EngineError::Cancelled);
            }
            if state.in_use() <= enough
                && let Some(buffer) = self.take(&mut state, class, len)?
            {
                return Ok(buffer);
            }
            enough = shared.limit / 2;
            state.waiting = true;
            let waited = shared.freed.wait_timeout(state, WAKE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn take(
        &self,
        state: &mut State,
        class: usize,
        len: usize,
    ) -> Result<Option<Buffer>, EngineError> {
        let mapping = match state.take_idle(class) {
            Some(mapping) => mapping,
            None if state.make_room(class, self.0.limit) => {
                let mapping = Mapping::new(class)?;
                state.mapped += class;
                mapping
            }
            None => return Ok(None),
        };
        Ok(Some(Buffer::of(mapping, len, Some(Arc::clone(&self.0)))))
    }
}

impl Shared {
    fn locked(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_back(&self, mapping: Mapping) {
        let mut state = self.locked();
        state.idle_bytes += mapping.size;
        state.idle.entry(mapping.size).or_default().push(mapping);
        if state.waiting && state.in_use() <= self.limit / 2 {
            state.waiting = false;
            drop(state);
            self.freed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn never() -> bool {
        false
    }

    #[test]
    fn buffers_are_aligned_reused_and_keep_their_address() {
        let pool = Pool::new(4 << 20);
        let mut first = pool.get(100_000, never).unwrap();
        assert_eq!(first.as_ptr() as usize % PAGE, 0);
        assert_eq!(first.len(), 100_000);
        first[99_999] = 7;
        let address = first.as_ptr();
        let moved = Box::new(first);
        assert_eq!(moved.as_ptr(), address);
        drop(moved);
        assert_eq!(pool.get(80_000, never).unwrap().as_ptr(), address, "same class is reused");
    }

    #[test]
    fn parts_are_disjoint_and_return_together() {
        let pool = Pool::new(64 << 10);
        let mut rest = pool.get(10_000, never).unwrap();
        rest.fill(1);
        let mut first = rest.split_to(4096);
        first.fill(2);
        drop(rest.split_to(904));
        assert_eq!((first.len(), rest.len()), (4096, 5000));
        assert!(first.iter().all(|byte| *byte == 2) && rest.iter().all(|byte| *byte == 1));
        drop(rest);
        assert_eq!(pool.0.locked().idle_bytes, 0, "a part is in use");
        drop(first);
        assert_eq!(pool.0.locked().idle_bytes, 16 << 10);
    }

    #[test]
    fn other_classes_are_unmapped_when_room_is_needed() {
        let pool = Pool::new(1 << 20);
        let small: Vec<_> = (0..16).map(|_| pool.get(64 << 10, never).unwrap()).collect();
        assert_eq!(pool.0.locked().mapped, 1 << 20);
        drop(small);
        let large = pool.get(1 << 20, never).unwrap();
        assert_eq!(pool.0.locked().mapped, 1 << 20);
        drop(large);
    }

    #[test]
    fn waits_for_half_and_sees_cancellation() {
        let pool = Pool::new(4 * PAGE as u64);
        let mut held: Vec<_> = (0..4).map(|_| pool.get(PAGE, never).unwrap()).collect();
        assert!(matches!(pool.get(PAGE, || true), Err(EngineError::Cancelled)));
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| pool.get(PAGE, never).unwrap().len());
            held.truncate(2);
            assert_eq!(waiter.join().unwrap(), PAGE);
        });
        assert!(pool.get(64 << 10, never).is_err(), "larger than the pool");
    }
}
