//! Reads ahead where an object is read in order, for stores at which each request is a journey.
//!
//! A restore goes through packs and maps mostly in order, some hundred KiB at a time. Where that is
//! seen, whole windows are fetched, several at once, and kept until others need their place. What is
//! read here and there is asked for as it is. Whoever opens an object reads a header at its beginning
//! and tables at its end: these edges are fetched once each, a small object as a whole.
//!
//! Everything is verified by whoever reads, as before.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{
    ObjectEntry, ObjectLock, ObjectName, ObjectWriter, Store, StoreError, StoreErrorKind, Traffic,
};

/// One request of a read in order: large enough that the journey is a small part of it.
const WINDOW_BYTES: u64 = 4 << 20;
/// Windows kept or under way, all objects together: 24 MiB.
const WINDOWS_MAX: usize = 6;
/// Planned reads that are worth having under way at once, each up to a window: 24 MiB.
const READERS_MAX: usize = 6;
/// Objects whose reads are watched: those of the readers of one process, and their maps.
const STREAMS_MAX: usize = 32;
/// So much must have been asked for in order before whole windows are worth it.
const IN_ORDER_BYTES_MIN: u64 = 256 << 10;
/// One byte of so many, at least, must have been asked for.
const SPARSENESS_MAX: u64 = 4;

/// The beginning or end of an object that is fetched at once: holds the table of a usual pack.
const EDGE_BYTES: u64 = 128 << 10;
/// Reads at the beginning of a larger object, up to this size, are headers.
const HEADER_BYTES_MAX: u64 = 4 << 10;
/// Edges kept, all objects together: 2 MiB.
const EDGES_MAX: usize = 16;

/// Where the edge begins from which a read is served, if it is to be.
fn edge_of(length: u64, offset: u64, bytes: u64) -> Option<u64> {
    let end = offset.checked_add(bytes).filter(|end| *end <= length)?;
    if length <= EDGE_BYTES || (end <= EDGE_BYTES && bytes <= HEADER_BYTES_MAX) {
        return Some(0);
    }
    (offset >= length - EDGE_BYTES).then_some(length - EDGE_BYTES)
}

/// How an object is being read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stream {
    /// Where the present run of reads in order began, where it has come to, and how much of it was
    /// asked for.
    begun: u64,
    end: u64,
    wanted: u64,
}

impl Stream {
    const fn new(offset: u64) -> Self {
        Self { begun: offset, end: offset, wanted: 0 }
    }

    /// Takes note of a read; says how many windows ahead are worth their bytes, if whole windows are
    /// at all: the longer the run so far, the more. Several readers share the work, so one of them
    /// may be a little ahead of another.
    fn note(&mut self, offset: u64, bytes: u64) -> Option<u64> {
        let begun = self.begun.saturating_sub(WINDOW_BYTES);
        let is_near = offset >= begun && offset <= self.end.saturating_add(WINDOW_BYTES);
        if !is_near {
            *self = Self::new(offset);
        }
        self.begun = self.begun.min(offset);
        let end = self.end.max(offset.saturating_add(bytes));
        // What is read again is no progress.
        self.wanted = self.wanted.saturating_add(bytes.min(end - self.end));
        self.end = end;
        let run = self.end - self.begun;
        let is_dense = self.wanted.saturating_mul(SPARSENESS_MAX) >= run;
        (self.wanted >= IN_ORDER_BYTES_MIN && is_dense).then_some(run / WINDOW_BYTES)
    }
}

#[derive(Debug)]
struct Window {
    name: ObjectName,
    number: u64,
    /// None while it is under way.
    content: Option<Arc<Vec<u8>>>,
}

#[derive(Debug, Default)]
struct State {
    /// Used last comes first, here and below.
    streams: VecDeque<(ObjectName, Stream)>,
    lengths: VecDeque<(ObjectName, u64)>,
    windows: VecDeque<Window>,
    edges: VecDeque<Edge>,
    /// Memory of windows that gave their place to others.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct Edge {
    name: ObjectName,
    start: u64,
    content: Arc<Vec<u8>>,
}

fn touch<T>(items: &mut VecDeque<T>, is_it: impl Fn(&T) -> bool) -> Option<&mut T> {
    let found = items.iter().position(is_it).and_then(|at| items.remove(at))?;
    items.push_front(found);
    items.front_mut()
}

impl State {
    fn note(&mut self, name: &ObjectName, offset: u64, bytes: u64) -> Option<u64> {
        if let Some((_, stream)) = touch(&mut self.streams, |(known, _)| known == name) {
            return stream.note(offset, bytes);
        }
        let mut stream = Stream::new(offset);
        let in_order = stream.note(offset, bytes);
        self.streams.push_front((name.clone(), stream));
        self.streams.truncate(STREAMS_MAX);
        in_order
    }

    fn length(&mut self, name: &ObjectName) -> Option<u64> {
        touch(&mut self.lengths, |(known, _)| known == name).map(|(_, length)| *length)
    }

    fn learn(&mut self, name: &ObjectName, length: u64) {
        if self.length(name).is_none() {
            self.lengths.push_front((name.clone(), length));
            self.lengths.truncate(STREAMS_MAX);
        }
    }

    fn window(&mut self, name: &ObjectName, number: u64) -> Option<&mut Window> {
        touch(&mut self.windows, |window| window.number == number && &window.name == name)
    }

    /// Makes a place for a window that is to be fetched, of `most`; none when all are under way.
    fn begin(&mut self, name: &ObjectName, number: u64, most: usize) -> bool {
        if self.windows.len() >= most {
            let idle = self.windows.iter().rposition(|window| window.content.is_some());
            let Some(at) = idle else { return false };
            let left = self.windows.remove(at).and_then(|window| window.content);
            // Unless somebody is copying from it.
            self.spare.extend(left.and_then(|content| Arc::try_unwrap(content).ok()));
        }
        self.windows.push_front(Window { name: name.clone(), number, content: None });
        true
    }

    fn end(&mut self, name: &ObjectName, number: u64, content: Option<&Arc<Vec<u8>>>) {
        let is_it = |window: &Window| window.number == number && &window.name == name;
        match content {
            Some(content) => {
                if let Some(window) = self.windows.iter_mut().find(|window| is_it(window)) {
                    window.content = Some(Arc::clone(content));
                }
            }
            // Whoever needs it asks for it himself, and is told what is wrong.
            None => self.windows.retain(|window| !is_it(window)),
        }
    }

    fn forget(&mut self, names: &[ObjectName]) {
        self.lengths.retain(|(name, _)| !names.contains(name));
        self.windows.retain(|window| window.content.is_none() || !names.contains(&window.name));
        self.edges.retain(|edge| !names.contains(&edge.name));
    }
}

/// A store that reads ahead.
#[derive(Debug)]
pub struct ReadAhead {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Arc<dyn Store>,
    windows_max: usize,
    readers: usize,
    state: Mutex<State>,
    arrived: Condvar,
}

impl ReadAhead {
    /// In front of a store, with so much memory for windows and for what planned reads have under
    /// way; two windows at least.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>, memory_bytes: u64) -> Self {
        let all = usize::try_from(memory_bytes / WINDOW_BYTES).unwrap_or(usize::MAX);
        let readers = (all / 2).clamp(1, READERS_MAX);
        let windows_max = all.saturating_sub(readers).clamp(1, WINDOWS_MAX);
        let (state, arrived) = Default::default();
        Self { shared: Arc::new(Shared { inner, windows_max, readers, state, arrived }) }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn length(&self, name: &ObjectName) -> Result<u64, StoreError> {
        if let Some(length) = self.state().length(name) {
            return Ok(length);
        }
        let length = self.inner.len(name)?;
        self.state().learn(name, length);
        Ok(length)
    }

    /// Reads from the edge of an object whose length is known; false where it does not lie in one.
    fn read_edge(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<bool, StoreError> {
        let mut state = self.state();
        let Some(length) = state.length(name) else { return Ok(false) };
        let Some(start) = edge_of(length, offset, buffer.len() as u64) else { return Ok(false) };
        let is_it = |edge: &Edge| edge.start == start && &edge.name == name;
        let kept = touch(&mut state.edges, is_it).map(|edge| Arc::clone(&edge.content));
        drop(state);
        let content = match kept {
            Some(content) => content,
            None => {
                // At most an edge.
                let mut content = vec![0; (length - start).min(EDGE_BYTES) as usize];
                match self.inner.read_exact(name, start, &mut content) {
                    Err(error) if is_of_bytes(&error) => return Ok(false),
                    other => other?,
                }
                let content = Arc::new(content);
                let edge = Edge { name: name.clone(), start, content: Arc::clone(&content) };
                let mut state = self.state();
                state.edges.push_front(edge);
                state.edges.truncate(EDGES_MAX);
                content
            }
        };
        let part = content.get((offset - start) as usize..).and_then(|c| c.get(..buffer.len()));
        let Some(part) = part else { return Ok(false) };
        buffer.copy_from_slice(part);
        Ok(true)
    }

    fn fetch(&self, name: &ObjectName, number: u64, length: u64) -> Result<Vec<u8>, StoreError> {
        let start = number * WINDOW_BYTES;
        // At most a window.
        let bytes = length.saturating_sub(start).min(WINDOW_BYTES) as usize;
        let mut content = self.state().spare.pop().unwrap_or_default();
        content.resize(bytes, 0);
        self.inner.read_exact(name, start, &mut content)?;
        Ok(content)
    }

    /// A window from here, or from the store; none where there is no place for it.
    fn get(
        &self,
        name: &ObjectName,
        number: u64,
        length: u64,
    ) -> Result<Option<Arc<Vec<u8>>>, StoreError> {
        let mut state = self.state();
        loop {
            match state.window(name, number) {
                Some(Window { content: Some(content), .. }) => {
                    return Ok(Some(Arc::clone(content)));
                }
                Some(_) => {
                    state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                None => break,
            }
        }
        if !state.begin(name, number, self.windows_max) {
            return Ok(None);
        }
        drop(state);
        let fetched = self.fetch(name, number, length).map(Arc::new);
        self.state().end(name, number, fetched.as_ref().ok());
        self.arrived.notify_all();
        fetched.map(Some)
    }

    /// Begins to fetch the windows behind one, beside.
    fn look_ahead(self: &Arc<Self>, name: &ObjectName, number: u64, length: u64, ahead: u64) {
        let last = length.saturating_sub(1) / WINDOW_BYTES;
        // The other half is for what is read ahead of other objects, or is still being used.
        let most = usize::try_from(ahead).unwrap_or(usize::MAX).min(self.windows_max / 2);
        for next in (number + 1..=last).take(most) {
            let mut state = self.state();
            if state.window(name, next).is_some() || !state.begin(name, next, self.windows_max) {
                continue;
            }
            drop(state);
            let (shared, object) = (Arc::clone(self), name.clone());
            let fetch = move || {
                let fetched = shared.fetch(&object, next, length).map(Arc::new);
                shared.state().end(&object, next, fetched.as_ref().ok());
                shared.arrived.notify_all();
            };
            let thread = std::thread::Builder::new().name("icecore-ahead".into()).spawn(fetch);
            if thread.is_err() {
                self.state().end(name, next, None);
                self.arrived.notify_all();
            }
        }
    }

    fn read_in_order(
        self: &Arc<Self>,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
        ahead: u64,
    ) -> Result<(), StoreError> {
        let length = self.length(name)?;
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let number = at / WINDOW_BYTES;
            // Begun before this one is waited for.
            self.look_ahead(name, number, length, ahead);
            let window = match self.get(name, number, length) {
                Err(error) if is_of_bytes(&error) => None,
                other => other?,
            };
            let part = window.as_ref().and_then(|w| w.get((at % WINDOW_BYTES) as usize..));
            let Some(part) = part.filter(|part| !part.is_empty()) else {
                // It ends early, which the store says in its own words; or there is no place; or some
                // of it cannot be read, which may be none of what is asked for.
                return self.inner.read_exact(name, at, rest);
            };
            let count = part.len().min(rest.len());
            let (now, later) = rest.split_at_mut(count);
            now.copy_from_slice(&part[..count]);
            at += count as u64;
            rest = later;
        }
        Ok(())
    }
}

/// Whether other bytes of the object may be readable all the same: a bad sector is no lost server.
fn is_of_bytes(error: &StoreError) -> bool {
    matches!(error.kind(), StoreErrorKind::Io | StoreErrorKind::Corrupt)
}

impl Store for ReadAhead {
    fn location(&self) -> &str {
        self.shared.inner.location()
    }

    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        self.shared.inner.create(name)
    }

    fn put(&self, name: &ObjectName, bytes: &[u8]) -> Result<(), StoreError> {
        self.shared.inner.put(name, bytes)
    }

    fn read_exact(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        if self.shared.read_edge(name, offset, buffer)? {
            return Ok(());
        }
        let ahead = self.shared.state().note(name, offset, buffer.len() as u64);
        match ahead {
            Some(ahead) => self.shared.read_in_order(name, offset, buffer, ahead),
            None => self.shared.inner.read_exact(name, offset, buffer),
        }
    }

    fn read_planned(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        self.shared.inner.read_exact(name, offset, buffer)
    }

    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        let length = self.shared.inner.len(name)?;
        self.shared.state().learn(name, length);
        Ok(length)
    }

    fn exists(&self, name: &ObjectName) -> Result<bool, StoreError> {
        self.shared.inner.exists(name)
    }

    fn read(&self, name: &ObjectName, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
        self.shared.inner.read(name, bytes_max)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        self.shared.inner.list(prefix)
    }

    fn names(&self, prefix: &str) -> Result<Vec<ObjectName>, StoreError> {
        self.shared.inner.names(prefix)
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        self.shared.state().forget(names);
        self.shared.inner.delete(names)
    }

    fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.shared.inner.settle(prefix)
    }

    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        self.shared.inner.leftovers()
    }

    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        self.shared.inner.remove_leftovers(leftovers)
    }

    fn lock(&self) -> Option<&dyn ObjectLock> {
        self.shared.inner.lock()
    }

    fn readers(&self) -> usize {
        self.shared.readers
    }

    fn traffic(&self) -> Option<Traffic> {
        self.shared.inner.traffic()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::{Access, DirectoryStore, SimFileSystem};

    #[test]
    fn reads_in_order_are_worth_windows_and_scattered_ones_are_not() {
        const READ: u64 = 100 << 10;
        let mut stream = Stream::new(60);
        let seen: Vec<_> = (0..6).map(|n| stream.note(60 + n * READ, READ)).collect();
        assert_eq!(seen, [None, None, Some(0), Some(0), Some(0), Some(0)]);
        assert!(stream.note(60 + 7 * READ, READ).is_some(), "another reader is ahead");
        assert!(stream.note(60 + 6 * READ, READ).is_some());
        assert_eq!(stream.note(30 << 20, 64 << 10), None, "elsewhere");
        let again: Vec<_> = (0..9).map(|_| stream.note(30 << 20, 64 << 10)).collect();
        assert_eq!(again, [None; 9], "no progress");
        let mut sparse = Stream::new(0);
        assert!((0..30).all(|n| sparse.note(n << 20, 64 << 10).is_none()), "one in sixteen");
        let mut long = Stream::new(0);
        let seen: Vec<_> = (0..5).map(|n| long.note(n << 22, 4 << 20)).collect();
        assert_eq!(seen, [Some(1), Some(2), Some(3), Some(4), Some(5)], "the longer, the more");
    }

    #[test]
    fn headers_and_tables_lie_in_edges_and_small_objects_are_one() {
        assert_eq!(edge_of(1000, 10, 900), Some(0));
        assert_eq!(edge_of(1000, 10, 991), None, "beyond the end");
        let large = 32 << 20;
        assert_eq!(edge_of(large, 0, 60), Some(0));
        assert_eq!(edge_of(large, 60, 100 << 10), None, "a frame");
        assert_eq!(edge_of(large, large - 44, 44), Some(large - EDGE_BYTES));
        assert_eq!(edge_of(large, large - EDGE_BYTES - 1, 2), None);
        assert_eq!(edge_of(large, u64::MAX, 2), None);
    }

    #[test]
    fn what_cannot_be_read_is_no_wider_than_it_is() {
        let fs = SimFileSystem::new();
        let inner = Arc::new(DirectoryStore::on(Arc::new(fs.clone()), "sim", Access::ReadWrite));
        let name = ObjectName::new("packs/x").unwrap();
        inner.put(&name, &vec![7; 12 << 20]).unwrap();
        for bad in [5 << 20, (12 << 20) - 4096] {
            fs.set_bad_sector(Some(bad));
            let store = ReadAhead::new(inner.clone(), 6 * WINDOW_BYTES);
            store.len(&name).unwrap();
            let mut buffer = vec![0; 4096];
            let unreadable: Vec<u64> = (0..12 << 20)
                .step_by(4096)
                .filter(|at| store.read_exact(&name, *at, &mut buffer).is_err())
                .collect();
            assert_eq!(unreadable, [bad]);
        }
    }

    proptest! {
        // Each case moves tens of MiB.
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn what_is_read_is_what_is_stored(
            length in 1usize..(9 << 20),
            reads in prop::collection::vec((0usize..(10 << 20), 1usize..(2 << 20), any::<bool>()), 1..30),
        ) {
            let fs = Arc::new(SimFileSystem::new());
            let inner = Arc::new(DirectoryStore::on(fs, "sim", Access::ReadWrite));
            let name = ObjectName::new("packs/x").unwrap();
            let content: Vec<u8> = (0..length).map(|at| (at / 251) as u8).collect();
            inner.put(&name, &content).unwrap();
            let store = ReadAhead::new(inner, 6 * WINDOW_BYTES);
            prop_assert_eq!(store.len(&name).unwrap(), length as u64);
            let mut end = 0;
            for (offset, bytes, goes_on) in reads {
                let offset = if goes_on { end } else { offset };
                let mut buffer = vec![0; bytes];
                let read = store.read_exact(&name, offset as u64, &mut buffer);
                match content.get(offset..offset + bytes) {
                    Some(expected) => {
                        read.unwrap();
                        prop_assert!(buffer == expected);
                    }
                    None => prop_assert!(read.is_err()),
                }
                end = if offset + bytes <= length { offset + bytes } else { 0 };
            }
            prop_assert!(store.shared.state().windows.len() <= 3);
        }
    }
}
