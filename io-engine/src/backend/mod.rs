//! Two backends behind one face: requests come out of a queue, are carried out on lanes, and go to
//! a callback when they are complete. The first failure ends a run.

mod file;
mod probe;
mod queue;
mod slots;
mod stream;
mod threads;
mod uring;

#[cfg(test)]
pub(crate) mod conformance;
#[cfg(test)]
mod fragments;
#[cfg(test)]
pub(crate) mod toy;

use crate::buffer::Buffer;
use crate::control::Halt;
use crate::error::{EngineError, Span};
use crate::lane::Lane;
use crate::limits::MAX_REQUEST;
use crate::plan::{PlanItem, ReadItem};
use crate::prove::whole_disk;
use crate::stats::Latency;
use crate::wire::Op;

pub use probe::{Engine, EngineChoice};
pub(crate) use queue::{Feed, Intake, queue};

/// One request and what its maker wants to find again at its completion.
#[derive(Debug)]
pub(crate) struct Request<N> {
    pub(crate) op: Op,
    pub(crate) offset: u64,
    pub(crate) len: u32,
    /// Reads fill its first `len` bytes, writes send them; others have none.
    pub(crate) buf: Option<Buffer>,
    pub(crate) note: N,
}

impl<N> Request<N> {
    pub(crate) fn span(&self) -> Span {
        Span::new(self.offset, u64::from(self.len))
    }
}

/// A request that has succeeded.
pub(crate) struct Completion<N> {
    pub(crate) request: Request<N>,
    /// A read whose whole range is a hole: it reads as zeroes, and the buffer was **not** filled.
    pub(crate) hole: bool,
}

/// Called in the IO thread for each success; must not block.
pub(crate) type Done<'a, N> = &'a (dyn Fn(Completion<N>) + Sync);

/// The lanes of one disk with the engine that drives them.
pub struct LaneSet {
    lanes: Vec<Lane>,
    engine: Engine,
    count: usize,
    map: Option<DataMap>,
}

/// Asks where a disk may hold something else than zeroes: a plan of all of it, ascending.
pub type DataMap = Box<dyn Fn() -> Box<dyn Iterator<Item = PlanItem> + Send> + Send>;

impl std::fmt::Debug for LaneSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LaneSet").field("lanes", &self.lanes).field("engine", &self.engine).finish()
    }
}

impl LaneSet {
    /// Takes `lanes` (all of one disk) to be driven by `choice`.
    ///
    /// # Errors
    /// No lanes, or io_uring was demanded and is not available.
    pub fn new(lanes: Vec<Lane>, choice: EngineChoice) -> Result<Self, EngineError> {
        if lanes.is_empty() {
            return Err(EngineError::Lanes("there are none".into()));
        }
        // Measured: buffered IO on files needs up to twice the CPU through a ring, whose kernel
        // threads then wait for each other's locks on the file.
        let files = lanes.iter().all(|lane| matches!(lane, Lane::File(_)));
        let choice = match choice {
            EngineChoice::Auto if files => EngineChoice::Threads,
            choice => choice,
        };
        Ok(Self { count: lanes.len(), lanes, engine: choice.resolve()?, map: None })
    }

    /// Which engine drives them.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Has whoever serves the streams be asked by `map` before the whole disk is read, so that what
    /// is a hole there need not be read. Files are asked without it.
    #[must_use]
    pub fn with_map(self, map: DataMap) -> Self {
        Self { map: Some(map), ..self }
    }

    /// The file, where the lanes are one.
    pub(crate) fn file(&self) -> Option<std::fs::File> {
        self.lanes.iter().find_map(|lane| match lane {
            Lane::File(file) => file.try_clone().ok(),
            Lane::Stream { .. } => None,
        })
    }

    /// The plan that reads all of a disk of `size` bytes that may be something else than zero:
    /// what its file system or its server knows as zero is left out.
    pub(crate) fn may_hold_data(&self, size: u64) -> Box<dyn Iterator<Item = PlanItem> + Send> {
        match self.file() {
            Some(file) => Box::new(DataOfFile { file, at: 0, size }),
            None => self.map.as_ref().map_or_else(|| Box::new(whole_disk(size)) as _, |map| map()),
        }
    }

    /// Gives the lanes back, drained, for a polite end of the connections. After a failed run they
    /// are closed already and none are left.
    pub fn into_lanes(self) -> Vec<Lane> {
        self.lanes
    }

    /// Threads that will take requests.
    pub(crate) fn threads(&self) -> usize {
        match self.engine {
            Engine::Uring => 1,
            Engine::Threads => self.count,
        }
    }

    /// Bytes of one request: [`MAX_REQUEST`] or less if a lane takes less, whole blocks; one block
    /// where that is more.
    pub(crate) fn request_bytes(&self, block: u32) -> Result<u32, EngineError> {
        let most = self.lanes.iter().map(Lane::max_request).min().unwrap_or(0);
        if most < block {
            let what = format!("the server takes {most} bytes at a time, a block has {block}");
            return Err(EngineError::Lanes(what));
        }
        let wanted = most.min(MAX_REQUEST);
        Ok((wanted - wanted % block).max(block))
    }

    /// Calls `body` with each lane alone; stops at the first error, with all lanes closed.
    pub(crate) fn each_lane(
        &mut self,
        mut body: impl FnMut(&mut LaneSet) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        for lane in std::mem::take(&mut self.lanes) {
            let mut single =
                LaneSet { lanes: vec![lane], engine: self.engine, count: 1, map: None };
            body(&mut single)?;
            self.lanes.append(&mut single.lanes);
        }
        Ok(())
    }

    /// Carries out what comes out of `intake` until it ends and everything is complete.
    ///
    /// On the way out of a failure nothing names a buffer any more, and the lanes are closed.
    pub(crate) fn run<N: Send>(
        &mut self,
        intake: Intake<N>,
        halt: &Halt,
        done: Done<'_, N>,
    ) -> Latency {
        let lanes = std::mem::take(&mut self.lanes);
        let outcome = match self.engine {
            _ if lanes.is_empty() => {
                Err(EngineError::Lanes("an earlier failure closed them".into()))
            }
            Engine::Uring => uring::run(lanes, &intake, halt, done),
            Engine::Threads => threads::run(lanes, &intake, halt, done),
        };
        match halt.note(outcome) {
            Some((lanes, latency)) => {
                self.lanes = lanes;
                latency
            }
            None => Latency::default(),
        }
    }
}

/// The extents of a file that are no holes, ascending.
struct DataOfFile {
    file: std::fs::File,
    at: u64,
    size: u64,
}

impl Iterator for DataOfFile {
    type Item = PlanItem;

    fn next(&mut self) -> Option<PlanItem> {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        if self.at >= self.size {
            return None;
        }
        let start = match seek(&self.file, SeekFrom::Data(self.at)) {
            Ok(start) => start.min(self.size),
            Err(Errno::NXIO) => self.size,
            // A device or a file system that does not tell: all of it.
            Err(_) => self.at,
        };
        if start == self.size {
            return None;
        }
        let end = seek(&self.file, SeekFrom::Hole(start)).unwrap_or(self.size).min(self.size);
        self.at = end.max(start + 1);
        Some(Ok(ReadItem::Data(Span::new(start, self.at - start))))
    }
}
