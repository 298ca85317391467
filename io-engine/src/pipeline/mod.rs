//! The stages above the lanes: plan, read, work in parallel, put in order; or fetch, write, prove.

mod ordered;
pub(crate) mod read;
pub(crate) mod write;

use std::sync::Arc;

use crate::budget::{Budget, BudgetError, Reservation};
use crate::control::{Control, Halt};
use crate::error::EngineError;
use crate::limits::MIN_MEMORY;
use crate::priority::Priority;

/// What every run takes beside its source and target.
#[derive(Debug, Clone)]
pub struct Options {
    /// Handles to watch and steer it.
    pub control: Control,
    /// The process's memory for data; the run takes `memory` from it while it lasts, and waits for
    /// that before it begins.
    pub budget: Arc<Budget>,
    /// Memory of this run, in bytes; at least [`MIN_MEMORY`]. It bounds the requests in flight:
    /// half of it in a backup, nearly all of it in a dry run or a restore.
    pub memory: u64,
    /// Threads that hash and compress.
    pub workers: usize,
    /// How much they give way.
    pub priority: Priority,
}

impl Options {
    /// All cores, low priority, `memory` bytes out of `budget`.
    pub fn new(budget: Arc<Budget>, memory: u64) -> Self {
        let workers = std::thread::available_parallelism().map_or(2, usize::from);
        Self { control: Control::default(), budget, memory, workers, priority: Priority::Low }
    }

    /// Takes the run's memory out of the budget.
    pub(crate) fn take_memory(
        &self,
        halt: &Halt,
        request: u32,
    ) -> Result<Reservation, EngineError> {
        let least = MIN_MEMORY.max(4 * u64::from(request));
        if self.memory < least {
            return Err(BudgetError::TooLarge { asked: least, total: self.memory }.into());
        }
        Ok(self.budget.reserve(self.memory, || halt.stopped())?)
    }
}

/// Stops everyone when the thread that holds it panics: else they would wait for it for ever.
pub(crate) struct StopOnPanic<'a>(pub(crate) &'a Halt);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(EngineError::Lanes("a thread of the engine panicked".into()));
        }
    }
}

/// Starts a named thread of a run that keeps the error of its body.
pub(crate) fn spawn<'scope, 'env, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, 'env>,
    halt: &'scope Halt,
    name: &str,
    body: impl FnOnce() -> Result<T, EngineError> + Send + 'scope,
) -> Option<std::thread::ScopedJoinHandle<'scope, Option<T>>> {
    let named = std::thread::Builder::new().name(name.into());
    let spawned = named.spawn_scoped(scope, move || {
        let _guard = StopOnPanic(halt);
        halt.note(body())
    });
    let failed = |source| EngineError::Setup { what: "start a thread", source };
    halt.note(spawned.map_err(failed))
}
