//! What the server is asked, as HTTP: names and ranges in, objects out. All that touches a disk runs
//! beside the runtime's threads, and no request holds more memory than a piece.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Query, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use icecore_repository::store::ObjectName;
use icecore_repository::store::served::{
    BYTES_HEADER, Listing, Names, OBJECT_PUT_BYTES_MAX, RIGHT_HEADER, Started,
};
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};

use super::Server;
use super::denied::Denied;
use super::hosted::Hosted;
use super::tokens::Client;

/// Bytes that are read from or written to a disk at once, and all that a request holds.
const PIECE_BYTES: usize = 256 << 10;
/// A body of [`OBJECT_PUT_BYTES_MAX`] arrives in this, at 64 KiB/s or more.
const BODY_WAIT: Duration = Duration::from_secs(120);
/// A list of names: a thousand of the longest.
const NAMES_BYTES_MAX: usize = 256 << 10;

/// All routes.
pub fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/v1/{repository}", get(about).post(make))
        .route("/v1/{repository}/objects/{*name}", get(read).head(look).put(put_object))
        .route("/v1/{repository}/uploads", post(begin))
        .route("/v1/{repository}/uploads/{id}", put(send).post(finish).delete(abandon))
        .route("/v1/{repository}/list", get(list))
        .route("/v1/{repository}/delete", post(delete))
        .route("/v1/{repository}/settle", post(settle))
        .route("/v1/{repository}/leftovers", get(leftovers).post(remove_leftovers))
        .layer(DefaultBodyLimit::max(NAMES_BYTES_MAX))
        .with_state(server)
}

/// Who asks, and in which repository.
struct Asker {
    client: Client,
    repository: String,
    hosted: Arc<Hosted>,
    quota: Option<u64>,
}

#[derive(Deserialize)]
struct InRepository {
    repository: String,
}

/// The bearer of a token, before the repository is looked for.
struct Bearer {
    client: Client,
    repository: String,
}

impl FromRequestParts<Arc<Server>> for Bearer {
    type Rejection = Denied;

    async fn from_request_parts(parts: &mut Parts, server: &Arc<Server>) -> Result<Self, Denied> {
        let path = Path::<InRepository>::from_request_parts(parts, server).await;
        let Path(InRepository { repository }) =
            path.map_err(|_| Denied::nonsense("the request names no repository"))?;
        // Who may not come in learns nothing of what there is.
        let client = token(&parts.headers).and_then(|token| server.bearer(token, &repository));
        let client = client.ok_or_else(Denied::unknown_token)?;
        if !ObjectName::new(&repository).is_ok_and(|name| !name.as_str().contains('/')) {
            return Err(Denied::nonsense("that is no name of a repository"));
        }
        Ok(Self { client, repository })
    }
}

impl FromRequestParts<Arc<Server>> for Asker {
    type Rejection = Denied;

    async fn from_request_parts(parts: &mut Parts, server: &Arc<Server>) -> Result<Self, Denied> {
        let Bearer { client, repository } = Bearer::from_request_parts(parts, server).await?;
        let (known, name) = (Arc::clone(server), repository.clone());
        let hosted = blocking(move || known.repository(&name)).await?;
        let quota = server.quota(&repository);
        Ok(Self { client, repository, hosted, quota })
    }
}

fn token(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ").map(str::trim)
}

/// Runs what waits for a disk.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Denied> + Send + 'static,
) -> Result<T, Denied> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Denied::internal(format!("a request failed badly: {e}")))?
}

fn object(name: String) -> Result<ObjectName, Denied> {
    ObjectName::new(name).map_err(|e| Denied::nonsense(e.to_string()))
}

async fn about(asker: Asker) -> Response {
    let right = serde_json::to_value(asker.client.right).ok();
    let right = right.as_ref().and_then(|right| right.as_str()).unwrap_or_default();
    let right = HeaderValue::from_str(right).unwrap_or(HeaderValue::from_static("unknown"));
    ([(HeaderName::from_static(RIGHT_HEADER), right)], asker.repository).into_response()
}

/// Makes the folder of a repository: for whoever may make its config.
async fn make(
    State(server): State<Arc<Server>>,
    Bearer { client, repository }: Bearer,
) -> Result<StatusCode, Denied> {
    use icecore_repository::rights::{Act, Owner, Purpose, may};
    may(client.right, Act::Create, &Purpose::Config, Owner::Nobody).map_err(Denied::forbidden)?;
    blocking(move || server.make(&repository)).await?;
    tracing::info!(client = client.name, "a repository was made or found");
    Ok(StatusCode::CREATED)
}

/// `/v1/{repository}/objects/{*name}`
#[derive(Deserialize)]
struct OfObject {
    name: String,
}

async fn look(asker: Asker, Path(of): Path<OfObject>) -> Result<Response, Denied> {
    let name = object(of.name)?;
    let bytes = blocking(move || asker.hosted.bytes(&asker.client, &name)).await?;
    Ok(([(HeaderName::from_static(BYTES_HEADER), HeaderValue::from(bytes))], ()).into_response())
}

async fn read(
    asker: Asker,
    Path(of): Path<OfObject>,
    headers: HeaderMap,
) -> Result<Response, Denied> {
    let (name, asker) = (object(of.name)?, Arc::new(asker));
    let (looking, its) = (Arc::clone(&asker), name.clone());
    let total = blocking(move || looking.hosted.bytes(&looking.client, &its)).await?;
    let range = headers.get(header::RANGE).map(|value| parse_range(value, total)).transpose()?;
    let status = if range.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let (begin, end) = range.unwrap_or((0, total));
    let pieces = stream::try_unfold(begin, move |at| {
        let (asker, name) = (Arc::clone(&asker), name.clone());
        async move {
            let bytes = usize::try_from(end - at).unwrap_or(usize::MAX).min(PIECE_BYTES);
            if bytes == 0 {
                return Ok(None);
            }
            let read = move || asker.hosted.read(&asker.client, &name, at, bytes);
            let piece = blocking(read).await;
            // The connection is cut: half an object never looks like a whole one.
            let piece = piece.map_err(|denied| std::io::Error::other(format!("{denied:?}")))?;
            Ok::<_, std::io::Error>(Some((Bytes::from(piece), at + bytes as u64)))
        }
    });
    let mut response = Body::from_stream(pieces.into_stream()).into_response();
    *response.status_mut() = status;
    let length = HeaderValue::from(end - begin);
    response.headers_mut().insert(header::CONTENT_LENGTH, length);
    Ok(response)
}

/// `bytes=FIRST-LAST`, the only form that is asked for; the byte behind the last one is returned.
fn parse_range(value: &HeaderValue, total: u64) -> Result<(u64, u64), Denied> {
    let parse = || {
        let (first, last) = value.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
        let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
        Some((first, last.checked_add(1).filter(|end| *end > first)?))
    };
    let (begin, end) = parse().ok_or_else(|| Denied::nonsense("a range is bytes=FIRST-LAST"))?;
    if end > total { Err(Denied::beyond_end(total)) } else { Ok((begin, end)) }
}

/// A small object in one request.
async fn put_object(
    asker: Asker,
    Path(of): Path<OfObject>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Denied> {
    let bytes = length(&headers)?;
    let name = object(of.name)?;
    // A client that goes away takes its handler along; what was begun is ended all the same.
    let whole = tokio::spawn(put_whole(Arc::new(asker), name, bytes, body));
    whole.await.map_err(|e| Denied::internal(e.to_string()))?
}

async fn put_whole(
    asker: Arc<Asker>,
    name: ObjectName,
    bytes: u64,
    body: Body,
) -> Result<StatusCode, Denied> {
    let beginner = Arc::clone(&asker);
    let id = blocking(move || beginner.hosted.begin(&beginner.client, &name)).await?;
    let received = receive(&asker, &id, 0, bytes, body).await;
    let finished = match received {
        Ok(()) => {
            let (asker, id) = (Arc::clone(&asker), id.clone());
            blocking(move || asker.hosted.finish(&asker.client, &id, bytes)).await
        }
        Err(denied) => Err(denied),
    };
    // Finished or not, nobody asks for this upload again.
    let abandoned = blocking(move || asker.hosted.abandon(&asker.client, &id)).await;
    finished?;
    abandoned?;
    Ok(StatusCode::CREATED)
}

fn length(headers: &HeaderMap) -> Result<u64, Denied> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    let length: Option<u64> = length.and_then(|length| length.parse().ok());
    match length {
        Some(length) if length <= OBJECT_PUT_BYTES_MAX as u64 => Ok(length),
        _ => Err(Denied::wrong_length(format!(
            "a body names its length, at most {OBJECT_PUT_BYTES_MAX} bytes"
        ))),
    }
}

/// Hands a body on in pieces as it arrives.
async fn receive(
    asker: &Arc<Asker>,
    id: &str,
    offset: u64,
    bytes: u64,
    body: Body,
) -> Result<(), Denied> {
    let until = Instant::now() + BODY_WAIT;
    let mut frames = body.into_data_stream();
    let (mut piece, mut at) = (Vec::new(), offset);
    loop {
        let frame = timeout_at(until, frames.next()).await;
        let frame = frame.map_err(|_| Denied::broken("the body came too slowly"))?;
        let last = frame.is_none();
        match frame {
            Some(Ok(frame)) => piece.extend_from_slice(&frame),
            Some(Err(e)) => return Err(Denied::broken(format!("the body broke off: {e}"))),
            None => {}
        }
        if at + piece.len() as u64 > offset + bytes {
            return Err(Denied::wrong_length("the body is longer than it said"));
        }
        if piece.len() >= PIECE_BYTES || (last && !piece.is_empty()) {
            let (asker, id, full) = (Arc::clone(asker), id.to_owned(), std::mem::take(&mut piece));
            let begin = at;
            at += full.len() as u64;
            blocking(move || asker.hosted.append(&asker.client, &id, begin, &full, asker.quota))
                .await?;
        }
        if last {
            let whole = at == offset + bytes;
            return if whole { Ok(()) } else { Err(Denied::broken("the body broke off")) };
        }
    }
}

#[derive(Deserialize)]
struct Begin {
    name: String,
}

async fn begin(
    asker: Asker,
    Query(asked): Query<Begin>,
) -> Result<(StatusCode, Json<Started>), Denied> {
    let name = object(asked.name)?;
    let upload = blocking(move || asker.hosted.begin(&asker.client, &name)).await?;
    Ok((StatusCode::CREATED, Json(Started { upload })))
}

/// `/v1/{repository}/uploads/{id}`
#[derive(Deserialize)]
struct OfUpload {
    id: String,
}

#[derive(Deserialize)]
struct SendPiece {
    offset: u64,
}

async fn send(
    asker: Asker,
    Path(of): Path<OfUpload>,
    Query(asked): Query<SendPiece>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, Denied> {
    let bytes = length(&headers)?;
    if asked.offset.checked_add(bytes).is_none() {
        return Err(Denied::nonsense("no object is so long"));
    }
    receive(&Arc::new(asker), &of.id, asked.offset, bytes, body).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct Finish {
    bytes: u64,
}

async fn finish(
    asker: Asker,
    Path(of): Path<OfUpload>,
    Query(asked): Query<Finish>,
) -> Result<StatusCode, Denied> {
    blocking(move || asker.hosted.finish(&asker.client, &of.id, asked.bytes)).await?;
    Ok(StatusCode::CREATED)
}

async fn abandon(asker: Asker, Path(of): Path<OfUpload>) -> Result<StatusCode, Denied> {
    blocking(move || asker.hosted.abandon(&asker.client, &of.id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct List {
    prefix: String,
    after: Option<String>,
}

async fn list(asker: Asker, Query(asked): Query<List>) -> Result<Json<Listing>, Denied> {
    let prefix = prefix(asked.prefix)?;
    let after = asked.after.map(object).transpose()?;
    let list = move || asker.hosted.list(&asker.client, &prefix, after.as_ref());
    let (entries, more) = blocking(list).await?;
    let entries = entries.into_iter().map(|entry| (entry.name.to_string(), entry.bytes));
    Ok(Json(Listing { entries: entries.collect(), more }))
}

/// Empty, or the beginning of names up to a `/`.
fn prefix(prefix: String) -> Result<String, Denied> {
    let folder = prefix.strip_suffix('/');
    if prefix.is_empty() || folder.is_some_and(|folder| ObjectName::new(folder).is_ok()) {
        return Ok(prefix);
    }
    Err(Denied::nonsense("a prefix is empty or ends with a slash"))
}

async fn delete(asker: Asker, Json(asked): Json<Names>) -> Result<StatusCode, Denied> {
    let names = asked.names.into_iter().map(object).collect::<Result<Vec<_>, _>>()?;
    blocking(move || asker.hosted.delete(&asker.client, &names)).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct Settle {
    prefix: String,
}

async fn settle(asker: Asker, Query(asked): Query<Settle>) -> Result<StatusCode, Denied> {
    let prefix = prefix(asked.prefix)?;
    blocking(move || asker.hosted.settle(&prefix)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn leftovers(asker: Asker) -> Result<Json<Names>, Denied> {
    let names = blocking(move || asker.hosted.leftovers(&asker.client)).await?;
    Ok(Json(Names { names }))
}

async fn remove_leftovers(asker: Asker, Json(asked): Json<Names>) -> Result<StatusCode, Denied> {
    blocking(move || asker.hosted.remove_leftovers(&asker.client, &asked.names)).await?;
    Ok(StatusCode::NO_CONTENT)
}
