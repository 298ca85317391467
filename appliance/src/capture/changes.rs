//! What a disk's snapshot has to say about change, streamed to the data plane as read items.

use icecore_io_engine::{ReadItem, Span};
use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::{Changed, ChangedKind, Flow};
use tokio::sync::mpsc;

use crate::nbd::{ALLOCATION, Questions};

/// A stretch is asked for as a whole and its answer held while it is read: the connection has
/// nothing unread in it, however slowly the data plane goes on. At most 131,072 extents of 64 KiB.
const STRETCH_BYTES: u64 = 8 << 30;
/// Items on their way to the data plane.
const ITEMS_AHEAD: usize = 1024;

/// An item, or why there are no more.
pub type Item = Result<ReadItem, Failed>;

/// What is sent: the end is said, so that a task that died is not taken for one.
enum Message {
    Item(ReadItem),
    Failed(Failed),
    End,
}

/// Which part of the disk changed.
#[derive(Debug, Clone)]
pub enum Scope {
    /// Everything.
    Whole,
    /// What this dirty bitmap names, and everything from `grown_from` on.
    Bitmap { name: String, grown_from: u64 },
}

/// Streams what is to be read of a disk of `size` bytes. Dropping the receiver ends the work.
pub fn stream(control: Questions, scope: Scope, size: u64) -> Changes {
    let (items, receiver) = mpsc::channel(ITEMS_AHEAD);
    tokio::spawn(async move {
        let mut source = Source { control, scope, size };
        let last = match source.run(&items).await {
            Ok(()) => Message::End,
            Err(failure) => Message::Failed(failure),
        };
        // A receiver that is gone has failed before us, and with a better reason.
        let _ = items.send(last).await;
    });
    Changes { receiver, ended: false }
}

/// The data plane's end of the stream.
pub struct Changes {
    receiver: mpsc::Receiver<Message>,
    ended: bool,
}

impl Iterator for Changes {
    type Item = Item;

    fn next(&mut self) -> Option<Item> {
        if self.ended {
            return None;
        }
        let message = self.receiver.blocking_recv();
        self.ended = !matches!(message, Some(Message::Item(_)));
        match message {
            Some(Message::Item(item)) => Some(Ok(item)),
            Some(Message::Failed(failure)) => Some(Err(failure)),
            Some(Message::End) => None,
            None => Some(Err("the list of changes broke off".into())),
        }
    }
}

struct Source {
    control: Questions,
    scope: Scope,
    size: u64,
}

type Failed = Box<dyn std::error::Error + Send + Sync>;

impl Source {
    async fn run(&mut self, items: &mpsc::Sender<Message>) -> Result<(), Failed> {
        let mut at = 0;
        while at < self.size {
            let len = STRETCH_BYTES.min(self.size - at);
            for changed in self.changed(Extent::new(at, len)).await? {
                items.send(Message::Item(item(changed))).await.map_err(|_| "the reader is gone")?;
            }
            at += len;
        }
        Ok(())
    }

    async fn changed(&mut self, stretch: Extent) -> Result<Vec<Changed>, Failed> {
        let session = self.control.session();
        let allocation = session.context(ALLOCATION);
        let mut found = Vec::new();
        let mut keep = |changed| {
            found.push(changed);
            Flow::Continue(())
        };
        match &self.scope {
            Scope::Whole => {
                self.control.changed(stretch, None, allocation, &mut keep).await?;
            }
            Scope::Bitmap { name, grown_from } => {
                let context = format!("qemu:dirty-bitmap:{name}");
                let bitmap = session.context(&context).ok_or("the dirty bitmap is not exported")?;
                let old = stretch.end().min(*grown_from).saturating_sub(stretch.offset);
                if old > 0 {
                    let known = Extent::new(stretch.offset, old);
                    self.control.changed(known, Some(bitmap), allocation, &mut keep).await?;
                }
                let grown = Extent::new(stretch.offset + old, stretch.length - old);
                if grown.length > 0 {
                    self.control.changed(grown, None, allocation, &mut keep).await?;
                }
            }
        }
        Ok(found)
    }
}

fn item(changed: Changed) -> ReadItem {
    let span = Span::new(changed.offset, changed.length);
    match changed.kind {
        ChangedKind::Data => ReadItem::Data(span),
        ChangedKind::Zero => ReadItem::Zero(span),
    }
}
