//! Low priority for the threads that work, so that guests go first.
#![allow(unsafe_code)]

use std::io;

/// How much the engine's worker threads give way to everything else on the host.
///
/// The threads that read replies keep the normal CPU priority in either case: they need little,
/// and a guest could wait for what they leave unread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Priority {
    /// Nice 10, short slices, lowest best-effort IO class.
    #[default]
    Low,
    /// As the process.
    Normal,
}

/// Nice value of low priority: an eighth of a normal thread's share, never nothing.
const NICE: i32 = 10;
/// How long a thread of low priority may go on once something else wants its processor, in
/// nanoseconds: the least that Linux takes. With the usual slice of 3 ms a guest's thread that wakes
/// up waits that long for ours, however low its weight. Linux before 6.12 has no slices to set.
const SLICE_NS: u64 = 100_000;
/// `ioprio_set` target: a thread.
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// Best effort (class 2 in the upper bits), level 7 of 0..=7.
const IOPRIO_LOW: libc::c_int = (2 << 13) | 7;

impl Priority {
    /// Applies it to the calling thread; a refusal is logged, never fatal.
    pub fn apply(self) {
        if self == Self::Low
            && let Err(error) = lower_cpu().and_then(|()| lower_io()).and_then(|()| shorten_slice())
        {
            tracing::debug!(%error, "the thread keeps its normal priority");
        }
    }
}

fn lower_cpu() -> io::Result<()> {
    let current = rustix::process::getpriority_process(None)?;
    // On Linux "the calling process" is the calling thread here.
    Ok(rustix::process::setpriority_process(None, current.max(NICE))?)
}

/// `struct sched_attr`, its first version (sched_setattr(2)).
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

fn shorten_slice() -> io::Result<()> {
    let attributes = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: libc::SCHED_OTHER as u32,
        flags: 0,
        nice: rustix::process::getpriority_process(None)?,
        priority: 0,
        runtime: SLICE_NS,
        deadline: 0,
        period: 0,
    };
    // SAFETY: the kernel reads `size` bytes of a structure that lives until the call returns; 0 is
    // the calling thread.
    let outcome = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn lower_io() -> io::Result<()> {
    // SAFETY: ioprio_set takes three integers and touches no memory; 0 is the calling thread.
    let outcome = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_LOW) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_calling_thread_gives_way() {
        let before = rustix::process::getpriority_process(None).unwrap();
        let lowered = std::thread::spawn(|| {
            Priority::Low.apply();
            rustix::process::getpriority_process(None).unwrap()
        });
        assert!(lowered.join().unwrap() >= NICE);
        assert_eq!(rustix::process::getpriority_process(None).unwrap(), before);
    }
}
