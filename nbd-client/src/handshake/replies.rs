//! What the server's answers to options mean.

use super::options::Step;
use super::{Awaiting, Client, ListedExport, Outcome};
use crate::error::{HandshakeError, printable};
use crate::export_info::{BlockSizes, Context, ContextId, Dialect};
use crate::proto::{STRING_BYTES_MAX, info, reply, take_string, take_u16, take_u32, take_u64};

impl Client {
    /// One reply to the option of the present step.
    pub(super) fn reply(&mut self, code: u32, body: &[u8]) -> Result<(), HandshakeError> {
        self.awaiting = Awaiting::ReplyHeader;
        if code & reply::ERROR_BIT != 0 {
            return self.refused(code, printable(body));
        }
        match (code, self.step) {
            (reply::ACK, _) if !body.is_empty() => Err(self.broken("ACK with a body")),
            (reply::ACK, step) => self.acknowledged(step),
            (reply::SERVER, Step::List) => self.listed(body),
            (reply::META_CONTEXT, Step::SetContexts) => self.context_set(body),
            (reply::META_CONTEXT, Step::ListContexts) => self.context_listed(body),
            (reply::INFO, Step::Go | Step::Info) => self.info(body),
            _ => Err(self.broken("a reply type that does not belong to the option")),
        }
    }

    fn acknowledged(&mut self, step: Step) -> Result<(), HandshakeError> {
        match step {
            Step::ExtendedHeaders => {
                self.dialect = Dialect::Extended;
                return self.after_dialect();
            }
            Step::StructuredReply => {
                self.dialect = Dialect::Structured;
                return self.after_dialect();
            }
            Step::SetContexts => {
                self.require_contexts("it did not choose it")?;
                self.ask_export();
            }
            Step::Go | Step::Info if !self.size_known => {
                return Err(self.broken("ACK before the export's size"));
            }
            Step::Go => self.opened(),
            Step::Info => {
                self.session.dialect = self.dialect;
                self.leave(Outcome::Described(self.session.clone()));
            }
            Step::List => {
                let exports = std::mem::take(&mut self.exports);
                self.leave(Outcome::Exports(exports));
            }
            Step::ListContexts => {
                let names = std::mem::take(&mut self.names);
                self.leave(Outcome::Contexts(names));
            }
            Step::Greeting | Step::ExportName => return Err(self.broken("ACK to nothing")),
        }
        Ok(())
    }

    /// An error reply: some lead to an older way, the others end the handshake.
    fn refused(&mut self, code: u32, message: String) -> Result<(), HandshakeError> {
        let option = self.step.name();
        match (self.step, code) {
            (_, reply::ERR_TLS_REQD) => Err(HandshakeError::TlsRequired { during: option }),
            (_, reply::ERR_SHUTDOWN) => Err(HandshakeError::Refused { option, code, message }),
            (Step::ExtendedHeaders, _) => {
                self.ask(Step::StructuredReply, &[]);
                Ok(())
            }
            (Step::StructuredReply, _) => self.after_dialect(),
            (
                Step::SetContexts | Step::Go | Step::Info | Step::ListContexts,
                reply::ERR_UNKNOWN,
            ) => Err(HandshakeError::UnknownExport { name: self.request.export.clone(), message }),
            (Step::SetContexts, _) => {
                self.session.contexts.clear();
                self.require_contexts("it refused SET_META_CONTEXT")?;
                self.ask_export();
                Ok(())
            }
            (Step::Go, reply::ERR_UNSUP) if self.dialect != Dialect::Extended => {
                self.ask_export_name()
            }
            _ => Err(HandshakeError::Refused { option, code, message }),
        }
    }

    fn listed(&mut self, mut body: &[u8]) -> Result<(), HandshakeError> {
        let Some(name) = take_string(&mut body) else {
            return Err(self.broken("a listed name that is too long or no UTF-8"));
        };
        self.exports.push(ListedExport { name, description: printable(body) });
        Ok(())
    }

    fn context_set(&mut self, mut body: &[u8]) -> Result<(), HandshakeError> {
        let (Some(id), name) = (take_u32(&mut body), self.text(body)?) else {
            return Err(self.broken("a context reply without an id"));
        };
        if !self.wanted_contexts().any(|wanted| *wanted == name) {
            return Err(self.broken("a context that was not asked for"));
        }
        let known = |context: &Context| context.id.0 == id || context.name == name;
        if self.session.contexts.iter().any(known) {
            return Err(self.broken("a context or its id comes twice"));
        }
        self.session.contexts.push(Context { name, id: ContextId(id) });
        Ok(())
    }

    fn context_listed(&mut self, body: &[u8]) -> Result<(), HandshakeError> {
        let Some((_id, text)) = body.split_first_chunk::<4>() else {
            return Err(self.broken("a context reply without an id"));
        };
        let name = self.text(text)?;
        self.names.push(name);
        Ok(())
    }

    fn info(&mut self, mut body: &[u8]) -> Result<(), HandshakeError> {
        let kind = take_u16(&mut body).ok_or_else(|| self.broken("an info without a type"))?;
        match kind {
            info::EXPORT => self.info_export(body),
            info::BLOCK_SIZE => self.info_block_size(body),
            info::NAME => {
                self.session.export.canonical_name = Some(self.text(body)?);
                Ok(())
            }
            info::DESCRIPTION => {
                self.session.export.description = Some(self.text(body)?);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn info_export(&mut self, mut body: &[u8]) -> Result<(), HandshakeError> {
        match (take_u64(&mut body), take_u16(&mut body), body) {
            (Some(size), Some(flags), []) => self.set_size(size, flags),
            _ => Err(self.broken("INFO_EXPORT of a wrong length")),
        }
    }

    fn info_block_size(&mut self, mut body: &[u8]) -> Result<(), HandshakeError> {
        let sizes = (take_u32(&mut body), take_u32(&mut body), take_u32(&mut body), body);
        let (Some(minimum), Some(preferred), Some(maximum), []) = sizes else {
            return Err(self.broken("INFO_BLOCK_SIZE of a wrong length"));
        };
        self.session.export.block = BlockSizes::checked(minimum, preferred, maximum)?;
        Ok(())
    }

    fn text(&self, bytes: &[u8]) -> Result<String, HandshakeError> {
        match std::str::from_utf8(bytes) {
            Ok(text) if text.len() <= STRING_BYTES_MAX => Ok(text.to_owned()),
            _ => Err(self.broken("a string that is too long or no UTF-8")),
        }
    }
}
