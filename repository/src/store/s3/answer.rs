//! What a server says: refusals, listings, ids of uploads.

use roxmltree::{Document, Node};

use crate::store::retry::Fault;

/// An answer that is no success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// The server's word for it; empty when it said none, as to every HEAD.
    pub(super) code: String,
    pub(super) message: String,
}

impl Refusal {
    /// Reads the body of an answer with this status.
    pub(super) fn read(status: u16, body: &[u8]) -> Self {
        let text = String::from_utf8_lossy(body);
        let document = Document::parse(&text);
        let root = document.as_ref().ok().map(Document::root_element);
        let of = |name| root.and_then(|root| text_of(root, name)).unwrap_or_default();
        Self { status, code: of("Code"), message: of("Message") }
    }

    /// What a failed request means for the next try.
    pub(super) fn fault(&self) -> Fault {
        match (self.status, self.code.as_str()) {
            (_, "SlowDown" | "ServiceUnavailable" | "TooManyRequests" | "Throttling")
            | (429 | 503, _) => Fault::Busy,
            (_, "InternalError" | "RequestTimeout" | "ConditionalRequestConflict")
            | (
                _,
                "OperationAborted" | "IncompleteBody" | "BadDigest" | "XAmzContentSHA256Mismatch",
            )
            | (408 | 500 | 502 | 504, _) => Fault::Transient,
            (
                _,
                "ExpiredToken" | "ExpiredTokenException" | "InvalidToken" | "TokenRefreshRequired",
            )
            | (_, "RequestTimeTooSkewed" | "RequestExpired") => Fault::Stale,
            // To a HEAD a server cannot say which it is.
            (400 | 401 | 403, "") => Fault::Stale,
            _ => Fault::Final,
        }
    }

    /// For people.
    pub(super) fn words(&self) -> String {
        let Self { status, code, message } = self;
        match (code.as_str(), message.as_str()) {
            ("", "") => format!("the server answered with status {status}"),
            (code, "") => format!("the server answered {code} (status {status})"),
            (code, message) => format!("the server answered {code} (status {status}): {message}"),
        }
    }
}

fn child<'a>(node: Node<'a, 'a>, name: &str) -> Option<Node<'a, 'a>> {
    node.children().find(|child| child.tag_name().name() == name)
}

fn text_of(node: Node<'_, '_>, name: &str) -> Option<String> {
    node.children()
        .find(|child| child.tag_name().name() == name)
        .and_then(|child| child.text())
        .map(str::to_owned)
}

/// An answer that makes no sense.
pub(super) type Nonsense = String;

fn parse(body: &[u8]) -> Result<Document<'_>, Nonsense> {
    let text = std::str::from_utf8(body).map_err(|_| "its answer is no text".to_owned())?;
    Document::parse(text.trim()).map_err(|error| format!("its answer is no XML: {error}"))
}

/// One page of a listing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Page<T> {
    pub(super) items: Vec<T>,
    /// Where the next page begins; none after the last one.
    pub(super) next: Option<String>,
}

/// Keys and their bytes.
pub(super) fn objects(body: &[u8]) -> Result<Page<(String, u64)>, Nonsense> {
    let document = parse(body)?;
    let root = document.root_element();
    let mut items = Vec::new();
    for entry in root.children().filter(|node| node.tag_name().name() == "Contents") {
        let size = text_of(entry, "Size").and_then(|text| text.trim().parse().ok());
        let (Some(key), Some(size)) = (text_of(entry, "Key"), size) else {
            return Err("its listing has an entry without a name or size".to_owned());
        };
        items.push((key, size));
    }
    let next = text_of(root, "NextContinuationToken");
    Ok(Page { items, next: following(root, next)? })
}

/// An unfinished upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Upload {
    pub(super) key: String,
    pub(super) id: String,
}

/// Unfinished uploads. The mark of the next page is a key and, behind a line feed, an id.
pub(super) fn uploads(body: &[u8]) -> Result<Page<Upload>, Nonsense> {
    let document = parse(body)?;
    let root = document.root_element();
    let mut items = Vec::new();
    for entry in root.children().filter(|node| node.tag_name().name() == "Upload") {
        let (Some(key), Some(id)) = (text_of(entry, "Key"), text_of(entry, "UploadId")) else {
            return Err("its listing has an upload without a name or id".to_owned());
        };
        items.push(Upload { key, id });
    }
    let id = text_of(root, "NextUploadIdMarker").unwrap_or_default();
    let next = text_of(root, "NextKeyMarker").map(|key| format!("{key}\n{id}"));
    Ok(Page { items, next: following(root, next)? })
}

fn following(root: Node<'_, '_>, next: Option<String>) -> Result<Option<String>, Nonsense> {
    let is_cut = text_of(root, "IsTruncated").is_some_and(|text| text.trim() == "true");
    match (is_cut, next) {
        (false, _) => Ok(None),
        (true, Some(next)) => Ok(Some(next)),
        (true, None) => Err("its listing is cut off without saying where it goes on".to_owned()),
    }
}

/// The id of an upload that was begun.
pub(super) fn upload_id(body: &[u8]) -> Result<String, Nonsense> {
    let document = parse(body)?;
    let id = text_of(document.root_element(), "UploadId").filter(|id| !id.is_empty());
    id.ok_or_else(|| "it began an upload without giving its id".to_owned())
}

/// A success in status and an error in the body, as completing an upload may end.
pub(super) fn error_within(body: &[u8]) -> Option<Refusal> {
    let is_error = parse(body).is_ok_and(|document| document.root_element().has_tag_name("Error"));
    is_error.then(|| Refusal::read(200, body))
}

/// What of a batch was not deleted.
pub(super) fn not_deleted(body: &[u8]) -> Result<Vec<(Version, Refusal)>, Nonsense> {
    let document = parse(body)?;
    let errors =
        document.root_element().children().filter(|node| node.tag_name().name() == "Error");
    let gone = |node: &Node<'_, '_>| {
        let code = child(*node, "Code").and_then(|code| code.text());
        matches!(code, Some("NoSuchKey" | "NoSuchVersion"))
    };
    let refusal = |node| {
        let of = |name| text_of(node, name).unwrap_or_default();
        let version = Version { key: of("Key"), id: of("VersionId") };
        (version, Refusal { status: 200, code: of("Code"), message: of("Message") })
    };
    Ok(errors.filter(|node| !gone(node)).map(refusal).collect())
}

/// A version of a key, or a mark that hides those before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) key: String,
    pub(super) id: String,
}

/// Versions and marks. The mark of the next page is a key and, behind a line feed, an id.
pub(super) fn versions(body: &[u8]) -> Result<Page<Version>, Nonsense> {
    let document = parse(body)?;
    let root = document.root_element();
    let mut items = Vec::new();
    let is_one = |node: &Node<'_, '_>| matches!(node.tag_name().name(), "Version" | "DeleteMarker");
    for entry in root.children().filter(is_one) {
        let (Some(key), Some(id)) = (text_of(entry, "Key"), text_of(entry, "VersionId")) else {
            return Err("its listing has a version without a name or id".to_owned());
        };
        items.push(Version { key, id });
    }
    let id = text_of(root, "NextVersionIdMarker").unwrap_or_default();
    let next = text_of(root, "NextKeyMarker").map(|key| format!("{key}\n{id}"));
    Ok(Page { items, next: following(root, next)? })
}

/// What a bucket says of its locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Locking {
    pub(super) is_enabled: bool,
    /// All that is put into it is locked, asked or not.
    pub(super) has_default: bool,
}

/// The configuration of locks of a bucket.
pub(super) fn locking(body: &[u8]) -> Result<Locking, Nonsense> {
    let document = parse(body)?;
    let root = document.root_element();
    let is_enabled =
        text_of(root, "ObjectLockEnabled").is_some_and(|text| text.trim() == "Enabled");
    let rule = child(root, "Rule").and_then(|rule| child(rule, "DefaultRetention"));
    let has_default = rule.is_some_and(|rule| rule.has_children());
    Ok(Locking { is_enabled, has_default })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NS: &str = "xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"";

    #[test]
    fn a_listing_has_names_sizes_and_a_next_page() {
        let body = format!(
            "<?xml version=\"1.0\"?>\n<ListBucketResult {NS}><IsTruncated>true</IsTruncated>\
             <Contents><Key>p/a</Key><Size>5</Size></Contents><NextContinuationToken>t=/</\
             NextContinuationToken></ListBucketResult>"
        );
        let page = objects(body.as_bytes()).unwrap();
        assert_eq!(page.items, [("p/a".to_owned(), 5)]);
        assert_eq!(page.next.as_deref(), Some("t=/"));
        let endless = body.replace("NextContinuationToken", "Other");
        assert!(objects(endless.as_bytes()).is_err(), "never silently partial");
        assert!(objects(body.replace("<Size>5</Size>", "").as_bytes()).is_err());
        assert!(objects(b"<html>proxy").is_err() && objects(b"\xff").is_err());
    }

    #[test]
    fn refusals_are_told_apart() {
        let refusal = |status, code: &str| {
            let body = format!("<Error><Code>{code}</Code><Message>m</Message></Error>");
            Refusal::read(status, body.as_bytes()).fault()
        };
        assert_eq!(refusal(503, "SlowDown"), Fault::Busy);
        assert_eq!(refusal(200, "SlowDown"), Fault::Busy);
        assert_eq!(refusal(500, "InternalError"), Fault::Transient);
        assert_eq!(refusal(200, "InternalError"), Fault::Transient);
        assert_eq!(refusal(400, "ExpiredToken"), Fault::Stale);
        assert_eq!(refusal(403, "RequestTimeTooSkewed"), Fault::Stale);
        assert_eq!(refusal(403, "SignatureDoesNotMatch"), Fault::Final);
        assert_eq!(refusal(403, "AccessDenied"), Fault::Final);
        assert_eq!(refusal(404, "NoSuchKey"), Fault::Final);
        assert_eq!(refusal(409, "ConditionalRequestConflict"), Fault::Transient);
        assert_eq!(Refusal::read(502, b"<html>bad gateway").fault(), Fault::Transient);
        assert_eq!(Refusal::read(403, b"").fault(), Fault::Stale);
        assert_eq!(Refusal::read(404, b"").fault(), Fault::Final);
    }

    #[test]
    fn a_success_that_is_an_error_is_found() {
        let error = b"<Error><Code>InternalError</Code></Error>";
        assert_eq!(error_within(error).unwrap().code, "InternalError");
        assert_eq!(error_within(b"<CompleteMultipartUploadResult/>"), None);
        let batch = b"<DeleteResult><Deleted><Key>a</Key></Deleted><Error><Key>b</Key><Code>\
                      AccessDenied</Code></Error></DeleteResult>";
        assert_eq!(not_deleted(batch).unwrap()[0].0.key, "b");
        let gone =
            b"<DeleteResult><Error><Key>b</Key><Code>NoSuchKey</Code></Error></DeleteResult>";
        assert_eq!(not_deleted(gone).unwrap(), []);
    }

    #[test]
    fn versions_and_marks_are_both_listed_and_locks_are_read() {
        let body = format!(
            "<ListVersionsResult {NS}><IsTruncated>true</IsTruncated><NextKeyMarker>p/a</NextKeyMarker>\
             <NextVersionIdMarker>2</NextVersionIdMarker><Version><Key>p/a</Key><VersionId>1</VersionId>\
             </Version><DeleteMarker><Key>p/a</Key><VersionId>2</VersionId></DeleteMarker>\
             </ListVersionsResult>"
        );
        let page = versions(body.as_bytes()).unwrap();
        let ids: Vec<&str> = page.items.iter().map(|version| version.id.as_str()).collect();
        assert_eq!((ids, page.next.as_deref()), (vec!["1", "2"], Some("p/a\n2")));
        assert!(versions(body.replace("NextKeyMarker", "Other").as_bytes()).is_err());
        let on = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled>RULE\
                  </ObjectLockConfiguration>";
        let rule = "<Rule><DefaultRetention><Mode>COMPLIANCE</Mode></DefaultRetention></Rule>";
        let read = |rule: &str| locking(on.replace("RULE", rule).as_bytes()).unwrap();
        assert_eq!(read(""), Locking { is_enabled: true, has_default: false });
        assert_eq!(read(rule), Locking { is_enabled: true, has_default: true });
    }
}
