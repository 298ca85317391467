//! Signature version 4: proves who asks, when, and what for, without sending the secret.

use std::fmt::Write as _;

use jiff::Timestamp;
use ring::digest::{SHA256, digest};
use ring::hmac::{HMAC_SHA256, Key, Tag, sign};

use super::credentials::Credentials;

/// A request as far as it is signed.
pub(super) struct Signed<'a> {
    pub(super) method: &'a str,
    pub(super) authority: &'a str,
    /// Path, already encoded.
    pub(super) path: &'a str,
    /// Names and values, not encoded.
    pub(super) query: &'a [(&'a str, &'a str)],
    /// Further headers with lower-case names.
    pub(super) headers: &'a [(&'static str, String)],
    pub(super) body: &'a [u8],
}

/// Headers that make a request a signed one.
pub(super) fn headers(
    request: &Signed<'_>,
    credentials: &Credentials,
    region: &str,
    now: Timestamp,
) -> Vec<(&'static str, String)> {
    let time = now.strftime("%Y%m%dT%H%M%SZ").to_string();
    let day = &time[..8];
    let body = hex(digest(&SHA256, request.body).as_ref());
    let mut headers = request.headers.to_vec();
    headers.push(("host", request.authority.to_owned()));
    headers.push(("x-amz-content-sha256", body.clone()));
    headers.push(("x-amz-date", time.clone()));
    if let Some(token) = &credentials.session_token {
        headers.push(("x-amz-security-token", token.clone()));
    }
    headers.sort_unstable();
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let names = names.join(";");
    let canonical = canonical(request, &headers, &names, &body);
    let scope = format!("{day}/{region}/s3/aws4_request");
    let hashed = hex(digest(&SHA256, canonical.as_bytes()).as_ref());
    let text = format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{hashed}");
    let key = signing_key(&credentials.secret_key, day, region);
    let signature = hex(sign(&key, text.as_bytes()).as_ref());
    let access = &credentials.access_key;
    let authorization = format!(
        "AWS4-HMAC-SHA256 Credential={access}/{scope},SignedHeaders={names},Signature={signature}"
    );
    headers.push(("authorization", authorization));
    headers
}

fn canonical(
    request: &Signed<'_>,
    headers: &[(&'static str, String)],
    names: &str,
    body: &str,
) -> String {
    let mut text = format!("{}\n{}\n{}\n", request.method, request.path, query(request.query));
    for (name, value) in headers {
        // Writing to a string does not fail.
        let _ = writeln!(text, "{name}:{}", value.trim());
    }
    let _ = write!(text, "\n{names}\n{body}");
    text
}

fn signing_key(secret: &str, day: &str, region: &str) -> Key {
    let step =
        |key: &[u8], text: &str| -> Tag { sign(&Key::new(HMAC_SHA256, key), text.as_bytes()) };
    let of_day = step(format!("AWS4{secret}").as_bytes(), day);
    let of_region = step(of_day.as_ref(), region);
    let of_service = step(of_region.as_ref(), "s3");
    Key::new(HMAC_SHA256, step(of_service.as_ref(), "aws4_request").as_ref())
}

/// A query in the order and encoding that is signed, and sent.
pub(super) fn query(pairs: &[(&str, &str)]) -> String {
    let encoded = |(name, value): &(&str, &str)| (encode(name), encode(value));
    let mut pairs: Vec<_> = pairs.iter().map(encoded).collect();
    pairs.sort_unstable();
    pairs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("&")
}

fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of Amazon's documentation of signature version 4 for S3.
    #[test]
    fn signs_the_examples_of_the_documentation() {
        let credentials = Credentials {
            access_key: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY".into(),
            session_token: None,
        };
        let now: Timestamp = "2013-05-24T00:00:00Z".parse().unwrap();
        let check = |method,
                     path,
                     query: &[(&str, &str)],
                     headers: &[(&'static str, String)],
                     body,
                     expected: &str| {
            let authority = "examplebucket.s3.amazonaws.com";
            let request = Signed { method, authority, path, query, headers, body };
            let signed = super::headers(&request, &credentials, "us-east-1", now);
            let (_, authorization) = signed.last().unwrap();
            assert!(authorization.ends_with(&format!("Signature={expected}")), "{authorization}");
        };
        let range = [("range", "bytes=0-9".to_owned())];
        let expected = "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41";
        check("GET", "/test.txt", &[], &range, &b""[..], expected);
        let put = [
            ("date", "Fri, 24 May 2013 00:00:00 GMT".to_owned()),
            ("x-amz-storage-class", "REDUCED_REDUNDANCY".to_owned()),
        ];
        let expected = "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd";
        check("PUT", "/test%24file.text", &[], &put, b"Welcome to Amazon S3.", expected);
        let expected = "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543";
        check("GET", "/", &[("lifecycle", "")], &[], b"", expected);
        let expected = "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7";
        check("GET", "/", &[("max-keys", "2"), ("prefix", "J")], &[], b"", expected);
    }

    #[test]
    fn a_query_is_sorted_and_encoded() {
        assert_eq!(
            query(&[("prefix", "a/b c"), ("list-type", "2")]),
            "list-type=2&prefix=a%2Fb%20c"
        );
    }
}
