//! The server's side of option haggling, without IO.

use super::export::{Access, Features};
use crate::error::ProtocolError;
use crate::export_info::{Context, ContextId, Dialect};
use crate::proto::{
    EXPORT_NAME_PADDING, OPTION_REPLY_MAGIC, PAYLOAD_BYTES_MAX, STRING_BYTES_MAX, export_flag,
    info, option, put_string, reply, take_string, take_u16, take_u32,
};

/// Most bytes of one option. A name and some queries fit well.
pub(crate) const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Most options of one client; an endless haggler is thrown out by it.
pub(crate) const OPTIONS_MAX: usize = 256;

/// An export as it is offered.
#[derive(Clone, Debug)]
pub(crate) struct Offer {
    pub(crate) name: String,
    pub(crate) features: Features,
    pub(crate) contexts: Vec<String>,
}

/// What happens after an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    /// The next option.
    Continue,
    /// The end, after sending the replies.
    Close,
    /// Transmission, after sending the replies.
    Transmit {
        /// Index of the export.
        export: usize,
        /// Contexts that the client chose for it.
        contexts: Vec<Context>,
    },
}

/// The haggling of one client.
#[derive(Debug)]
pub(crate) struct Negotiation {
    offers: Vec<Offer>,
    dialect_max: Dialect,
    dialect: Dialect,
    no_zeroes: bool,
    options: usize,
    /// The export and its chosen contexts; the last SET_META_CONTEXT wins.
    chosen: Option<(usize, Vec<Context>)>,
    tx: Vec<u8>,
}

impl Negotiation {
    pub(crate) fn new(offers: Vec<Offer>, dialect_max: Dialect, no_zeroes: bool) -> Negotiation {
        Negotiation {
            offers,
            dialect_max,
            dialect: Dialect::Simple,
            no_zeroes,
            options: 0,
            chosen: None,
            tx: Vec::new(),
        }
    }

    pub(crate) fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// Takes the replies to send.
    pub(crate) fn take_replies(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.tx)
    }

    /// One option of the client.
    pub(crate) fn option(&mut self, code: u32, data: &[u8]) -> Result<Reaction, ProtocolError> {
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return Err(ProtocolError::Option { option: code, what: "too many options" });
        }
        let empty_expected =
            matches!(code, option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS);
        if empty_expected && !data.is_empty() {
            self.refuse(code, reply::ERR_INVALID, "this option has no data");
            return Ok(Reaction::Continue);
        }
        match code {
            option::EXPORT_NAME => return self.export_name(data),
            option::ABORT => {
                self.reply(code, reply::ACK, &[]);
                return Ok(Reaction::Close);
            }
            option::LIST => self.list(),
            option::STRUCTURED_REPLY => self.set_dialect(code, Dialect::Structured),
            option::EXTENDED_HEADERS => self.set_dialect(code, Dialect::Extended),
            option::INFO | option::GO => return Ok(self.describe(code, data)),
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(code, data),
            _ => self.refuse(code, reply::ERR_UNSUP, "unknown option"),
        }
        Ok(Reaction::Continue)
    }

    /// Transmission flags for the present dialect.
    fn flags(&self, features: &Features) -> u16 {
        let mut flags = export_flag::HAS_FLAGS | export_flag::SEND_FLUSH;
        let mut set = |flag: u16, on: bool| flags |= if on { flag } else { 0 };
        let writable = features.access == Access::Writable;
        set(export_flag::READ_ONLY, !writable);
        set(export_flag::SEND_FUA | export_flag::SEND_WRITE_ZEROES, writable);
        set(export_flag::SEND_TRIM, writable && features.trim);
        set(export_flag::SEND_FAST_ZERO, writable && features.fast_zero);
        set(export_flag::CAN_MULTI_CONN, features.multi_conn);
        set(export_flag::SEND_DF, self.dialect >= Dialect::Structured);
        set(export_flag::BLOCK_STATUS_PAYLOAD, self.dialect == Dialect::Extended);
        flags
    }

    /// The export of a name; the empty name means the only one.
    fn find(&self, name: &str) -> Option<usize> {
        let only = name.is_empty() && self.offers.len() == 1;
        self.offers.iter().position(|offer| offer.name == name).or(only.then_some(0))
    }

    fn export_name(&mut self, data: &[u8]) -> Result<Reaction, ProtocolError> {
        let name = std::str::from_utf8(data).unwrap_or("\u{fffd}");
        let found = self.find(name).filter(|_| self.dialect != Dialect::Extended);
        // This option has no way to say no but to hang up.
        let Some(export) = found else { return Ok(Reaction::Close) };
        let features = self.offers[export].features.clone();
        let flags = self.flags(&features);
        self.tx.extend_from_slice(&features.size_bytes.to_be_bytes());
        self.tx.extend_from_slice(&flags.to_be_bytes());
        if !self.no_zeroes {
            self.tx.extend_from_slice(&[0; EXPORT_NAME_PADDING]);
        }
        Ok(self.transmit(export))
    }

    fn transmit(&mut self, export: usize) -> Reaction {
        let chosen = self.chosen.take().filter(|(index, _)| *index == export);
        Reaction::Transmit { export, contexts: chosen.map(|(_, list)| list).unwrap_or_default() }
    }

    fn list(&mut self) {
        let offers = std::mem::take(&mut self.offers);
        for offer in &offers {
            let mut body = Vec::new();
            put_string(&mut body, &offer.name);
            body.extend_from_slice(offer.features.description.as_bytes());
            self.reply(option::LIST, reply::SERVER, &body);
        }
        self.offers = offers;
        self.reply(option::LIST, reply::ACK, &[]);
    }

    fn set_dialect(&mut self, code: u32, dialect: Dialect) {
        if self.dialect_max < dialect {
            self.refuse(code, reply::ERR_UNSUP, "not offered");
        } else if self.dialect == Dialect::Extended && dialect == Dialect::Structured {
            self.refuse(code, reply::ERR_EXT_HEADER_REQD, "extended headers are in use");
        } else {
            self.dialect = dialect;
            self.reply(code, reply::ACK, &[]);
        }
    }

    /// INFO and GO.
    fn describe(&mut self, code: u32, mut data: &[u8]) -> Reaction {
        let Some((name, wanted)) = name_and_infos(&mut data) else {
            self.refuse(code, reply::ERR_INVALID, "malformed");
            return Reaction::Continue;
        };
        let Some(export) = self.find(&name) else {
            self.refuse(code, reply::ERR_UNKNOWN, "no such export");
            return Reaction::Continue;
        };
        let offer = self.offers[export].clone();
        let flags = self.flags(&offer.features);
        let mut body = info::EXPORT.to_be_bytes().to_vec();
        body.extend_from_slice(&offer.features.size_bytes.to_be_bytes());
        body.extend_from_slice(&flags.to_be_bytes());
        self.reply(code, reply::INFO, &body);
        self.reply(code, reply::INFO, &block_size_info(&offer.features));
        let texts = [(info::NAME, &offer.name), (info::DESCRIPTION, &offer.features.description)];
        for (kind, text) in texts {
            if wanted.contains(&kind) && !text.is_empty() {
                let mut body = kind.to_be_bytes().to_vec();
                body.extend_from_slice(text.as_bytes());
                self.reply(code, reply::INFO, &body);
            }
        }
        self.reply(code, reply::ACK, &[]);
        if code == option::GO { self.transmit(export) } else { Reaction::Continue }
    }

    /// LIST_META_CONTEXT and SET_META_CONTEXT.
    fn contexts(&mut self, code: u32, mut data: &[u8]) {
        if code == option::SET_META_CONTEXT {
            self.chosen = None;
        }
        if self.dialect == Dialect::Simple {
            return self.refuse(code, reply::ERR_INVALID, "structured replies first");
        }
        let Some((name, queries)) = name_and_queries(&mut data) else {
            return self.refuse(code, reply::ERR_INVALID, "malformed");
        };
        let Some(export) = self.find(&name) else {
            return self.refuse(code, reply::ERR_UNKNOWN, "no such export");
        };
        let listing = code == option::LIST_META_CONTEXT;
        let matches = |context: &str| {
            let wild = |query: &String| query.ends_with(':') && context.starts_with(query.as_str());
            let by = |query: &String| query == context || (listing && wild(query));
            (listing && queries.is_empty()) || queries.iter().any(by)
        };
        let names = self.offers[export].contexts.clone();
        let mut chosen = Vec::new();
        for (name, id) in names.into_iter().zip(1..).filter(|(name, _)| matches(name)) {
            let mut body = if listing { 0_u32 } else { id }.to_be_bytes().to_vec();
            body.extend_from_slice(name.as_bytes());
            self.reply(code, reply::META_CONTEXT, &body);
            chosen.push(Context { name, id: ContextId(id) });
        }
        if !listing {
            self.chosen = Some((export, chosen));
        }
        self.reply(code, reply::ACK, &[]);
    }

    pub(crate) fn refuse(&mut self, option: u32, code: u32, why: &str) {
        self.reply(option, code, why.as_bytes());
    }

    fn reply(&mut self, option: u32, code: u32, body: &[u8]) {
        put_reply(&mut self.tx, option, code, body);
    }
}

/// Writes one option reply.
pub fn put_reply(out: &mut Vec<u8>, option: u32, code: u32, body: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(&(body.len() as u32).to_be_bytes());
    out.extend_from_slice(body);
}

fn block_size_info(features: &Features) -> Vec<u8> {
    let mut body = info::BLOCK_SIZE.to_be_bytes().to_vec();
    let maximum = features.maximum_block.min(PAYLOAD_BYTES_MAX);
    for size in [features.minimum_block, features.preferred_block, maximum] {
        body.extend_from_slice(&size.to_be_bytes());
    }
    body
}

fn name_and_infos(data: &mut &[u8]) -> Option<(String, Vec<u16>)> {
    let name = take_string(data)?;
    let count = take_u16(data)?;
    let mut wanted = Vec::new();
    for _ in 0..count {
        wanted.push(take_u16(data)?);
    }
    data.is_empty().then_some((name, wanted))
}

fn name_and_queries(data: &mut &[u8]) -> Option<(String, Vec<String>)> {
    let name = take_string(data)?;
    let count = take_u32(data)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(take_string(data).filter(|query| query.len() <= STRING_BYTES_MAX)?);
    }
    data.is_empty().then_some((name, queries))
}
