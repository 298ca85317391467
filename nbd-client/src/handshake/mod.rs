//! The client's side of the handshake, without IO.
//!
//! The driver loops: send [`Client::transmit`], then read exactly [`Client::want`] bytes and hand
//! them to [`Client::receive`], until [`Client::outcome`] is there. Exact reads mean that not one
//! byte of the transmission phase is taken.

mod options;
mod replies;

use crate::error::{HandshakeError, ProtocolError};
use crate::export_info::{BlockSizes, Dialect, ExportInfo, Session};
use crate::proto::{
    EXPORT_NAME_PADDING, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, INIT_MAGIC, OLDSTYLE_MAGIC,
    OPTION_MAGIC, OPTION_REPLIES_MAX, OPTION_REPLY_BYTES_MAX, OPTION_REPLY_MAGIC, STRING_BYTES_MAX,
    option, take_u16, take_u32, take_u64,
};
use options::Step;

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Open the export and go on to transmission.
    Open,
    /// Describe the export, then leave.
    Describe,
    /// Name all exports, then leave.
    ListExports,
    /// Name the export's metadata contexts that match the queries (none: all), then leave.
    ListContexts(Vec<String>),
}

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct Request {
    /// The export's name; empty for the server's default.
    pub export: String,
    /// What the connection is for.
    pub goal: Goal,
    /// The newest form of replies to ask for.
    pub dialect_max: Dialect,
    /// Contexts without which the connection is of no use: each one missing is an error.
    pub contexts: Vec<String>,
    /// Contexts that are taken where the server has them.
    pub optional_contexts: Vec<String>,
    /// Send nothing but EXPORT_NAME: for servers that hang up on any other option.
    pub legacy: bool,
}

impl Request {
    /// Opens an export with the newest dialect and no contexts.
    pub fn open(export: &str) -> Request {
        Request {
            export: export.to_owned(),
            goal: Goal::Open,
            dialect_max: Dialect::Extended,
            contexts: Vec::new(),
            optional_contexts: Vec::new(),
            legacy: false,
        }
    }
}

/// One export of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListedExport {
    /// Its name.
    pub name: String,
    /// A text for people, often empty.
    pub description: String,
}

/// How a handshake ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Transmission may begin on this connection.
    Opened(Session),
    /// The export's description.
    Described(Session),
    /// The exports.
    Exports(Vec<ListedExport>),
    /// The names of metadata contexts.
    Contexts(Vec<String>),
}

/// What the next bytes of the server are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaiting {
    Greeting,
    Flags,
    ReplyHeader,
    ReplyBody { code: u32, len: usize },
    ExportName,
    Nothing,
}

/// The client's handshake machine.
#[derive(Debug)]
pub struct Client {
    request: Request,
    awaiting: Awaiting,
    step: Step,
    dialect: Dialect,
    padding: bool,
    replies: usize,
    session: Session,
    size_known: bool,
    exports: Vec<ListedExport>,
    names: Vec<String>,
    tx: Vec<u8>,
    outcome: Option<Outcome>,
}

impl Client {
    /// A machine that waits for the server's greeting.
    pub fn new(request: Request) -> Result<Client, HandshakeError> {
        let strings = request.contexts.iter().chain(&request.optional_contexts);
        if request.export.len() > STRING_BYTES_MAX {
            return Err(HandshakeError::NameTooLong { what: "the export's name" });
        }
        if strings.into_iter().any(|name| name.len() > STRING_BYTES_MAX) {
            return Err(HandshakeError::NameTooLong { what: "a metadata context's name" });
        }
        let export = ExportInfo {
            name: request.export.clone(),
            canonical_name: None,
            description: None,
            size_bytes: 0,
            flags: 0,
            block: BlockSizes::default(),
        };
        Ok(Client {
            request,
            awaiting: Awaiting::Greeting,
            step: Step::Greeting,
            dialect: Dialect::Simple,
            padding: true,
            replies: 0,
            session: Session { export, dialect: Dialect::Simple, contexts: Vec::new() },
            size_known: false,
            exports: Vec::new(),
            names: Vec::new(),
            tx: Vec::new(),
            outcome: None,
        })
    }

    /// Bytes to send now.
    pub fn transmit(&self) -> &[u8] {
        &self.tx
    }

    /// The first `n` bytes of [`Client::transmit`] were sent.
    pub fn transmitted(&mut self, n: usize) {
        self.tx.drain(..n.min(self.tx.len()));
    }

    /// How many bytes to read next; 0 when the handshake is over.
    pub fn want(&self) -> usize {
        match self.awaiting {
            Awaiting::Greeting => 16,
            Awaiting::Flags => 2,
            Awaiting::ReplyHeader => 20,
            Awaiting::ReplyBody { len, .. } => len,
            Awaiting::ExportName if self.padding => 10 + EXPORT_NAME_PADDING,
            Awaiting::ExportName => 10,
            Awaiting::Nothing => 0,
        }
    }

    /// The result, once. Send what [`Client::transmit`] still holds before leaving.
    pub fn outcome(&mut self) -> Option<Outcome> {
        self.outcome.take()
    }

    /// Takes exactly the bytes that [`Client::want`] asked for. After an error the handshake is
    /// over; [`Client::transmit`] may hold a last word to the server.
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        if bytes.len() != self.want() {
            return Err(ProtocolError::Driver("handshake bytes of another length").into());
        }
        let result = match self.awaiting {
            Awaiting::Greeting => self.greeting(bytes),
            Awaiting::Flags => self.flags(bytes),
            Awaiting::ReplyHeader => self.reply_header(bytes),
            Awaiting::ReplyBody { code, .. } => self.reply(code, bytes),
            Awaiting::ExportName => self.export_name(bytes),
            Awaiting::Nothing => Ok(()),
        };
        if let Err(error) = &result {
            self.awaiting = Awaiting::Nothing;
            self.tx.clear();
            // Part in good order where the peer is still in step.
            if !matches!(error, HandshakeError::Protocol(_) | HandshakeError::OldStyle) {
                options::put_option(&mut self.tx, option::ABORT, &[]);
            }
        }
        result
    }

    fn greeting(&mut self, mut bytes: &[u8]) -> Result<(), HandshakeError> {
        let first = take_u64(&mut bytes).unwrap_or_default();
        let second = take_u64(&mut bytes).unwrap_or_default();
        match (first, second) {
            (INIT_MAGIC, OPTION_MAGIC) => self.awaiting = Awaiting::Flags,
            (INIT_MAGIC, OLDSTYLE_MAGIC) => return Err(HandshakeError::OldStyle),
            (INIT_MAGIC, found) => {
                return Err(ProtocolError::Magic { expected: "IHAVEOPT", found }.into());
            }
            (found, _) => return Err(ProtocolError::Magic { expected: "NBDMAGIC", found }.into()),
        }
        Ok(())
    }

    /// Answers the server's flags with those of ours that it offers, and asks the first option.
    fn flags(&mut self, mut bytes: &[u8]) -> Result<(), HandshakeError> {
        let flags = take_u16(&mut bytes).unwrap_or_default();
        let echo = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.padding = flags & FLAG_NO_ZEROES == 0;
        self.tx.extend_from_slice(&u32::from(echo).to_be_bytes());
        let fixed = flags & FLAG_FIXED_NEWSTYLE != 0;
        self.begin(fixed && !self.request.legacy)
    }

    fn reply_header(&mut self, mut bytes: &[u8]) -> Result<(), HandshakeError> {
        let magic = take_u64(&mut bytes).unwrap_or_default();
        let echoed = take_u32(&mut bytes).unwrap_or_default();
        let code = take_u32(&mut bytes).unwrap_or_default();
        let len = take_u32(&mut bytes).unwrap_or_default() as usize;
        if magic != OPTION_REPLY_MAGIC {
            return Err(ProtocolError::Magic { expected: "option reply", found: magic }.into());
        }
        if echoed != self.step.code() {
            return Err(self.broken("the reply echoes another option"));
        }
        if len > OPTION_REPLY_BYTES_MAX {
            return Err(self.broken("the reply is longer than any honest one"));
        }
        self.replies += 1;
        if self.replies > OPTION_REPLIES_MAX {
            return Err(self.broken("more replies than any honest list has"));
        }
        if len == 0 {
            return self.reply(code, &[]);
        }
        self.awaiting = Awaiting::ReplyBody { code, len };
        Ok(())
    }

    /// The answer to EXPORT_NAME: size, flags, padding.
    fn export_name(&mut self, mut bytes: &[u8]) -> Result<(), HandshakeError> {
        let size = take_u64(&mut bytes).unwrap_or_default();
        let flags = take_u16(&mut bytes).unwrap_or_default();
        self.set_size(size, flags)?;
        self.opened();
        Ok(())
    }

    fn broken(&self, what: &'static str) -> HandshakeError {
        ProtocolError::Option { option: self.step.code(), what }.into()
    }

    fn set_size(&mut self, size: u64, flags: u16) -> Result<(), HandshakeError> {
        if size > i64::MAX as u64 {
            return Err(ProtocolError::Export("a size of 2^63 bytes or more").into());
        }
        self.session.export.size_bytes = size;
        self.session.export.flags = flags;
        self.size_known = true;
        Ok(())
    }

    fn opened(&mut self) {
        self.session.dialect = self.dialect;
        self.awaiting = Awaiting::Nothing;
        self.outcome = Some(Outcome::Opened(self.session.clone()));
    }

    /// Ends a connection that was only there to ask. The server may close without an answer.
    fn leave(&mut self, outcome: Outcome) {
        options::put_option(&mut self.tx, option::ABORT, &[]);
        self.awaiting = Awaiting::Nothing;
        self.outcome = Some(outcome);
    }
}
