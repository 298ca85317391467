//! Disks that QEMU has to push: their export would crash it (in an iothread, before 9.1).

use std::ops::Range;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use icecore_nbd_client::Flow;
use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::server::{Server, ServerOptions};
use icecore_qmp::guardian::GuardianClient;
use icecore_qmp::guardian::protocol::{ExposedDisk, Push, PushState};
use tokio::net::UnixListener;

use super::{QmpCapture, guardian_base};
use crate::capture::spool::Spool;
use crate::capture::{Base, Data};
use crate::failure::{Failure, Outcome};
use crate::nbd::{self, Peer};

/// How often a push is looked at.
const PUSH_POLL: Duration = Duration::from_millis(20);
/// The name of the export that a push writes to.
const PUSH_EXPORT: &str = "push";

impl QmpCapture {
    /// Lets QEMU push a disk into a spool in the scratch directory.
    pub(super) async fn receive(
        &self,
        at: usize,
        disk: &ExposedDisk,
        base: Option<&Base>,
        samples: &[Range<u64>],
    ) -> Outcome<Data> {
        let tried = &self.settings.tried;
        let Some(scratch) = &self.scratch else {
            return Err(Failure::failed(tried, "there is no scratch directory"));
        };
        let what = if base.is_some() { "changes" } else { "whole" };
        let path = scratch.path().join(format!("push{at}-{what}"));
        let failed = |e: std::io::Error| Failure::failed(tried, format!("{}: {e}", path.display()));
        let spool = Arc::new(Spool::create(&path, disk.size_bytes).map_err(failed)?);
        let socket = path.with_extension("sock");
        let server = Server::new(
            vec![(PUSH_EXPORT.into(), Arc::clone(&spool) as _)],
            ServerOptions::default(),
        );
        let listener = UnixListener::bind(&socket).map_err(failed)?;
        scratch.give_away(&socket).map_err(failed)?;
        let serving = tokio::spawn(serve_push(listener, server, self.guardian.clone()));
        // What was added to the disk is in no bitmap.
        let grown = base.map(|base| base.size_bytes..disk.size_bytes).filter(|r| !r.is_empty());
        let push = Push {
            disk: u16::try_from(at).map_err(|e| Failure::failed(tried, e))?,
            socket,
            export: PUSH_EXPORT.into(),
            base: base.map(guardian_base),
            samples: samples.iter().cloned().chain(grown).collect(),
        };
        let number = push.disk;
        let pushed = match self.guardian.push(push).await {
            Ok(()) => self.wait_for_push(number).await,
            Err(e) => Err(self.failed(e)),
        };
        serving.abort();
        pushed?;
        if base.is_none()
            && let Some(missing) = spool.missing(0, disk.size_bytes)
        {
            let why = format!("QEMU says that it pushed everything, but not the byte at {missing}");
            return Err(Failure::failed(tried, why));
        }
        Ok(Data::Spool(spool))
    }

    async fn wait_for_push(&self, disk: u16) -> Outcome<()> {
        loop {
            match self.guardian.push_status(disk).await.map_err(|e| self.failed(e))? {
                PushState::Done => return Ok(()),
                PushState::Failed(why) => {
                    let why = format!("QEMU could not push the disk: {why}");
                    return Err(Failure::failed(&self.settings.tried, why)
                        .next("is there room in the --scratch directory?"));
                }
                PushState::Running { .. } => {
                    self.settings.interrupt.check(&self.settings.tried)?;
                    if self.settings.activity.stop.load(Ordering::Relaxed) {
                        return Err(Failure::interrupted(&self.settings.tried));
                    }
                    tokio::time::sleep(PUSH_POLL).await;
                }
            }
        }
    }
}

/// Serves QEMU's connection for a push; the guardian can end it, too.
async fn serve_push(listener: UnixListener, server: Server, guardian: GuardianClient) {
    while let Ok((stream, _)) = listener.accept().await {
        if let Err(error) = guardian.leash(stream.as_fd()) {
            tracing::warn!("a push is refused, for the guardian could not end it: {error}");
            return;
        }
        if let Err(error) = server.serve_stream(stream).await {
            tracing::debug!("a push has ended: {error}");
        }
    }
}

/// All dirty ranges of an exported bitmap. A million of them are 16 MiB.
pub(super) async fn list_dirty(
    uri: &Peer,
    bitmap: &str,
    size: u64,
    tried: &str,
) -> Outcome<Vec<Range<u64>>> {
    let failed = |e| Failure::failed(tried, e);
    let mut control = nbd::control(uri, Some(bitmap), tried).await?;
    let context = control.session().context(&format!("qemu:dirty-bitmap:{bitmap}"));
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let asked = control.changed(Extent::new(0, size), context, None, |changed| {
        let range = changed.offset..changed.offset + changed.length;
        match ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => ranges.push(range),
        }
        Flow::Continue(())
    });
    asked.await.map_err(failed)?;
    control.disconnect().await.map_err(failed)?;
    Ok(ranges)
}
