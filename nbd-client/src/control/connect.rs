//! Connecting: the handshake machine on a socket, under one deadline.

use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use super::stream::Stream;
use super::{Control, Options};
use crate::error::{Cause, Error, ProtocolError};
use crate::export_info::Session;
use crate::handshake::{Client, Goal, ListedExport, Outcome, Request};
use crate::transmission::Transmission;
use crate::uri::{Endpoint, Uri};

impl Control {
    /// Opens an export.
    pub async fn connect(uri: &Uri, options: &Options) -> Result<Control, Error> {
        let request = request(&uri.export, Goal::Open, options);
        let (stream, outcome) = converse(&uri.endpoint, request, options, "connect").await?;
        opened(uri.endpoint.to_string(), stream, outcome, options)
    }

    /// Opens an export on a unix socket that is connected already.
    pub async fn over(
        stream: UnixStream,
        export: &str,
        options: &Options,
    ) -> Result<Control, Error> {
        let peer = "connected socket".to_owned();
        let mut stream = Stream::Unix(stream);
        let shaken = shake_hands(&mut stream, request(export, Goal::Open, options));
        let outcome = match timeout(options.connect_deadline, shaken).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(cause)) => return Err(Error { peer, doing: "connect", cause }),
            Err(_) => {
                let cause = Cause::TimedOut(options.connect_deadline);
                return Err(Error { peer, doing: "connect", cause });
            }
        };
        opened(peer, stream, outcome, options)
    }

    /// Describes an export without opening it.
    pub async fn describe(uri: &Uri, options: &Options) -> Result<Session, Error> {
        let request = request(&uri.export, Goal::Describe, options);
        match converse(&uri.endpoint, request, options, "describe the export").await? {
            (_, Outcome::Described(session)) => Ok(session),
            _ => Err(unexpected(&uri.endpoint.to_string(), "describe the export")),
        }
    }

    /// Names the exports of a server.
    pub async fn list_exports(
        endpoint: &Endpoint,
        options: &Options,
    ) -> Result<Vec<ListedExport>, Error> {
        let request = request("", Goal::ListExports, options);
        match converse(endpoint, request, options, "list exports").await? {
            (_, Outcome::Exports(exports)) => Ok(exports),
            _ => Err(unexpected(&endpoint.to_string(), "list exports")),
        }
    }

    /// Names the metadata contexts of an export that match the queries; none means all. A query
    /// may be a prefix that ends with a colon, for example `qemu:`.
    pub async fn list_contexts(
        uri: &Uri,
        queries: &[&str],
        options: &Options,
    ) -> Result<Vec<String>, Error> {
        let queries = queries.iter().map(|query| (*query).to_owned()).collect();
        let request = request(&uri.export, Goal::ListContexts(queries), options);
        match converse(&uri.endpoint, request, options, "list metadata contexts").await? {
            (_, Outcome::Contexts(names)) => Ok(names),
            _ => Err(unexpected(&uri.endpoint.to_string(), "list metadata contexts")),
        }
    }
}

fn request(export: &str, goal: Goal, options: &Options) -> Request {
    Request {
        export: export.to_owned(),
        goal,
        dialect_max: options.dialect_max,
        contexts: options.contexts.clone(),
        optional_contexts: options.optional_contexts.clone(),
        legacy: options.legacy,
    }
}

fn opened(
    peer: String,
    stream: Stream,
    outcome: Outcome,
    options: &Options,
) -> Result<Control, Error> {
    let Outcome::Opened(session) = outcome else {
        return Err(unexpected(&peer, "connect"));
    };
    Ok(Control {
        peer,
        stream,
        transmission: Transmission::new(session),
        progress_deadline: options.progress_deadline,
        deadline: Instant::now() + options.progress_deadline,
        busy: false,
        header: Vec::new(),
    })
}

/// The machine gave another kind of outcome than its goal asks for.
fn unexpected(peer: &str, doing: &'static str) -> Error {
    let cause = ProtocolError::Driver("the handshake ended with another goal").into();
    Error { peer: peer.to_owned(), doing, cause }
}

/// Connects and shakes hands within the connect deadline.
async fn converse(
    endpoint: &Endpoint,
    request: Request,
    options: &Options,
    doing: &'static str,
) -> Result<(Stream, Outcome), Error> {
    let work = async {
        let mut stream = Stream::connect(endpoint).await?;
        let outcome = shake_hands(&mut stream, request).await?;
        Ok::<_, Cause>((stream, outcome))
    };
    let result = match timeout(options.connect_deadline, work).await {
        Ok(result) => result,
        Err(_) => Err(Cause::TimedOut(options.connect_deadline)),
    };
    result.map_err(|cause| Error { peer: endpoint.to_string(), doing, cause })
}

async fn shake_hands(stream: &mut Stream, request: Request) -> Result<Outcome, Cause> {
    let stays = request.goal == Goal::Open;
    let mut client = Client::new(request)?;
    let mut buffer = Vec::new();
    loop {
        let sent = stream.write_all(client.transmit()).await;
        if let Some(outcome) = client.outcome() {
            // A server may close on ABORT before it was sent whole; that is no failure.
            return if stays { sent.map(|()| outcome).map_err(Cause::from) } else { Ok(outcome) };
        }
        sent?;
        client.transmitted(client.transmit().len());
        buffer.resize(client.want(), 0);
        stream.read_exact(&mut buffer).await?;
        if let Err(error) = client.receive(&buffer) {
            // The last word is a courtesy: what matters is why it ends.
            let _ = stream.write_all(client.transmit()).await;
            return Err(error.into());
        }
    }
}
