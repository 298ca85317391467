//! What a disk's snapshot has to say about change, streamed to the data plane as read items.

use icecore_io_engine::{ReadItem, Span};
use icecore_nbd_client::extents::Extent;
use icecore_nbd_client::{Changed, ChangedKind, ContextId, Flow};
use tokio::sync::mpsc;

use crate::nbd::{ALLOCATION, Questions};

/// A stretch is asked for as a whole and its answer held while it is read: the connection has
/// nothing unread in it, however slowly the data plane goes on. This is the first one: reading
/// begins soon, and a disk that is all dirty fills it with 131,072 extents of 64 KiB.
const STRETCH_BYTES_FIRST: u64 = 8 << 30;
/// A stretch with fewer extents than this is followed by one twice as long: what is sparse costs
/// what is in it, not its size.
const STRETCH_EXTENTS_FEW: usize = 1 << 12;
/// A stretch ends early when so many extents are held (3 MiB).
const STRETCH_EXTENTS_MAX: usize = 1 << 17;
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
        let (mut at, mut stretch) = (0, STRETCH_BYTES_FIRST);
        while at < self.size {
            let asked = Extent::new(at, stretch.min(self.size - at));
            let found = self.changed(asked).await?;
            at = match found.last() {
                Some(last) if found.len() >= STRETCH_EXTENTS_MAX => last.offset + last.length,
                _ => asked.end(),
            };
            if found.len() < STRETCH_EXTENTS_FEW {
                stretch = stretch.saturating_mul(2);
            }
            for changed in found {
                items.send(Message::Item(item(changed))).await.map_err(|_| "the reader is gone")?;
            }
        }
        Ok(())
    }

    /// What changed in a stretch, up to its end or to [`STRETCH_EXTENTS_MAX`].
    async fn changed(&mut self, stretch: Extent) -> Result<Vec<Changed>, Failed> {
        let mut found = Vec::new();
        match self.scope.clone() {
            Scope::Whole => self.ask(stretch, None, &mut found).await?,
            Scope::Bitmap { name, grown_from } => {
                let context = format!("qemu:dirty-bitmap:{name}");
                let bitmap = self.control.session().context(&context);
                let bitmap = bitmap.ok_or("the dirty bitmap is not exported")?;
                let old = stretch.end().min(grown_from).saturating_sub(stretch.offset);
                let known = Extent::new(stretch.offset, old);
                self.ask(known, Some(bitmap), &mut found).await?;
                let grown = Extent::new(stretch.offset + old, stretch.length - old);
                if found.len() < STRETCH_EXTENTS_MAX {
                    self.ask(grown, None, &mut found).await?;
                }
            }
        }
        Ok(found)
    }

    async fn ask(
        &mut self,
        range: Extent,
        bitmap: Option<ContextId>,
        found: &mut Vec<Changed>,
    ) -> Result<(), Failed> {
        if range.length == 0 {
            return Ok(());
        }
        let allocation = self.control.session().context(ALLOCATION);
        let keep = |changed| {
            found.push(changed);
            if found.len() >= STRETCH_EXTENTS_MAX { Flow::Break(()) } else { Flow::Continue(()) }
        };
        Ok(self.control.changed(range, bitmap, allocation, keep).await?)
    }
}

fn item(changed: Changed) -> ReadItem {
    let span = Span::new(changed.offset, changed.length);
    match changed.kind {
        ChangedKind::Data => ReadItem::Data(span),
        ChangedKind::Zero => ReadItem::Zero(span),
    }
}
