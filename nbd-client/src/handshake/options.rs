//! Which option is asked next, and how it is written.

use super::{Awaiting, Client, Goal};
use crate::error::HandshakeError;
use crate::export_info::Dialect;
use crate::proto::{self, OPTION_MAGIC, option, put_string};

/// The option whose replies are awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Greeting,
    ExtendedHeaders,
    StructuredReply,
    List,
    ListContexts,
    SetContexts,
    Info,
    Go,
    ExportName,
}

impl Step {
    pub(super) fn code(self) -> u32 {
        match self {
            Step::Greeting => 0,
            Step::ExtendedHeaders => option::EXTENDED_HEADERS,
            Step::StructuredReply => option::STRUCTURED_REPLY,
            Step::List => option::LIST,
            Step::ListContexts => option::LIST_META_CONTEXT,
            Step::SetContexts => option::SET_META_CONTEXT,
            Step::Info => option::INFO,
            Step::Go => option::GO,
            Step::ExportName => option::EXPORT_NAME,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Step::Greeting => "the greeting",
            Step::ExtendedHeaders => "EXTENDED_HEADERS",
            Step::StructuredReply => "STRUCTURED_REPLY",
            Step::List => "LIST",
            Step::ListContexts => "LIST_META_CONTEXT",
            Step::SetContexts => "SET_META_CONTEXT",
            Step::Info => "INFO",
            Step::Go => "GO",
            Step::ExportName => "EXPORT_NAME",
        }
    }
}

/// Writes one option.
pub(crate) fn put_option(out: &mut Vec<u8>, code: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
}

/// An export's name and a list of context queries, as both meta context options carry them.
fn context_queries<'a>(
    export: &str,
    queries: impl ExactSizeIterator<Item = &'a String>,
) -> Vec<u8> {
    let mut data = Vec::new();
    put_string(&mut data, export);
    data.extend_from_slice(&(queries.len() as u32).to_be_bytes());
    queries.for_each(|query| put_string(&mut data, query));
    data
}

impl Client {
    /// The first option after the flags.
    pub(super) fn begin(&mut self, haggle: bool) -> Result<(), HandshakeError> {
        if !haggle {
            return self.ask_export_name();
        }
        match (&self.request.goal, self.request.dialect_max) {
            (Goal::ListExports, _) => self.ask(Step::List, &[]),
            (_, Dialect::Extended) => self.ask(Step::ExtendedHeaders, &[]),
            (_, Dialect::Structured) => self.ask(Step::StructuredReply, &[]),
            (_, Dialect::Simple) => return self.after_dialect(),
        }
        Ok(())
    }

    /// The form of replies is settled: contexts next, where they are wanted and possible.
    pub(super) fn after_dialect(&mut self) -> Result<(), HandshakeError> {
        if let Goal::ListContexts(queries) = &self.request.goal {
            let data = context_queries(&self.request.export, queries.iter());
            self.ask(Step::ListContexts, &data);
            return Ok(());
        }
        let wanted: Vec<String> = self.wanted_contexts().cloned().collect();
        if self.dialect == Dialect::Simple {
            self.require_contexts("it has no structured replies")?;
        } else if !wanted.is_empty() {
            let data = context_queries(&self.request.export, wanted.iter());
            self.ask(Step::SetContexts, &data);
            return Ok(());
        }
        self.ask_export();
        Ok(())
    }

    pub(super) fn wanted_contexts(&self) -> impl Iterator<Item = &String> {
        self.request.contexts.iter().chain(&self.request.optional_contexts)
    }

    /// Fails with the first required context that was not negotiated.
    pub(super) fn require_contexts(&self, why: &'static str) -> Result<(), HandshakeError> {
        let missing =
            self.request.contexts.iter().find(|name| self.session.context(name).is_none());
        match missing {
            None => Ok(()),
            Some(name) => Err(HandshakeError::ContextMissing {
                name: name.clone(),
                export: self.request.export.clone(),
                why,
            }),
        }
    }

    /// GO or INFO, always with a request for block sizes.
    pub(super) fn ask_export(&mut self) {
        let wanted = [proto::info::BLOCK_SIZE, proto::info::NAME, proto::info::DESCRIPTION];
        let mut data = Vec::new();
        put_string(&mut data, &self.request.export);
        data.extend_from_slice(&(wanted.len() as u16).to_be_bytes());
        wanted.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
        let step = if self.request.goal == Goal::Open { Step::Go } else { Step::Info };
        self.ask(step, &data);
    }

    /// The oldest way in. It reports no errors: an unknown export closes the connection.
    pub(super) fn ask_export_name(&mut self) -> Result<(), HandshakeError> {
        if self.request.goal != Goal::Open || self.dialect == Dialect::Extended {
            return Err(HandshakeError::Refused {
                option: "GO",
                code: proto::reply::ERR_UNSUP,
                message: "only EXPORT_NAME is left, which cannot serve this request".to_owned(),
            });
        }
        self.require_contexts("it knows only EXPORT_NAME")?;
        put_option(&mut self.tx, option::EXPORT_NAME, self.request.export.as_bytes());
        self.step = Step::ExportName;
        self.awaiting = Awaiting::ExportName;
        Ok(())
    }

    pub(super) fn ask(&mut self, step: Step, data: &[u8]) {
        put_option(&mut self.tx, step.code(), data);
        self.step = step;
        self.replies = 0;
        self.awaiting = Awaiting::ReplyHeader;
    }
}
