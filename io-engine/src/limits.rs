//! Every limit of the data plane, each with its reason.

use std::time::Duration;

/// Largest payload of one request, in bytes. Measured: from here on neither throughput nor the
/// server's CPU gets better, and the memory held by one slow reply stays small.
pub const MAX_REQUEST: u32 = 1 << 20;

/// Requests in flight on one lane. With [`MAX_REQUEST`] and four lanes the fastest shape measured.
pub const LANE_DEPTH: u32 = 16;

/// Longest range of one write-zeroes or trim request, in bytes. Such a request carries no payload,
/// so larger is cheaper; a server that really writes the zeroes still answers well before
/// [`STALL_AFTER`].
pub const MAX_EFFECT: u32 = 64 << 20;

/// Writes shorter than this into a blank file are given their room one by one, in bytes; a file
/// system does not set aside much more than what longer ones use.
pub(crate) const SCATTERED_BYTES_MAX: u64 = 512 << 10;

/// Zeroes written by one request where a target knows no write-zeroes, in bytes.
pub(crate) const ZERO_STEP: u32 = 256 << 10;

/// Longest sleep of a data thread, so that cancellation is seen and the pulse moves in time: the
/// watchdog over us acts after 2 s.
pub const WAKE: Duration = Duration::from_millis(200);

/// A lane that has requests outstanding and completes none for so long has failed.
pub const STALL_AFTER: Duration = Duration::from_secs(60);

/// How many times [`STALL_AFTER`] a flush may take: it writes out whatever the server has cached.
pub(crate) const FLUSH_PATIENCE: u32 = 10;

/// How long the end of a failed run waits for IO that the kernel still holds before it gives the
/// memory that this IO names away for good.
pub(crate) const DRAIN_AFTER_FAILURE: Duration = Duration::from_secs(5);

/// Most bytes that a wire may want outside a buffer, in bytes: an NBD error with its longest message
/// fits. More is an error of the adapter.
pub const MAX_HEADER: usize = 8192;

/// Requests that wait between the stage that makes them and the IO threads: enough that a lane
/// with room never waits for a thread switch, few enough to hold no memory worth speaking of.
pub(crate) const QUEUE: usize = 8;

/// Memory of one planned item beside its data (places in queues, parents of its blocks), in bytes:
/// what bounds a million tiny or zero ranges in front of a slow sink.
pub(crate) const ITEM_COST: u64 = 1024;

/// Least memory of one pipeline, in bytes: two requests in flight, two being worked on.
pub const MIN_MEMORY: u64 = 4 * MAX_REQUEST as u64;

/// Unit of alignment of every buffer, in bytes: what O_DIRECT asks for on any device.
pub(crate) const PAGE: usize = 4096;
