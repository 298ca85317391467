//! Which server, and how it is spoken to: the variables that all programs for S3 know.

use std::path::PathBuf;

use super::credentials::Source;
use crate::store::http::CA_VARIABLE;

const DEFAULT_REGION: &str = "us-east-1";

/// How a bucket is named in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BucketStyle {
    /// In the path: works with every server.
    Path,
    /// In the name of the host: what AWS wants.
    Host,
}

/// What a host is told about its object store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Settings {
    /// `http` or `https`.
    pub(super) scheme: &'static str,
    /// Host and, unless it is the usual one, port.
    pub(super) authority: String,
    /// What the server's paths begin with: empty, or `/…` without a `/` at its end.
    pub(super) base_path: String,
    /// Whether the server is AWS itself.
    pub(super) is_aws: bool,
    pub(super) region: String,
    pub(super) style: BucketStyle,
    pub(super) ca_bundle: Option<PathBuf>,
    pub(super) credentials: Source,
}

impl S3Settings {
    /// From the environment of this process.
    ///
    /// # Errors
    /// What is missing or wrong, in words.
    pub fn from_environment() -> Result<Self, String> {
        Self::from(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// From variables, however they are looked up.
    ///
    /// # Errors
    /// What is missing or wrong, in words.
    pub fn from(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let region = variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION"));
        let region = region.unwrap_or_else(|| DEFAULT_REGION.to_owned());
        let endpoint = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL"));
        let is_aws = endpoint.is_none();
        let endpoint = endpoint.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
        let (scheme, authority, base_path) = split(&endpoint)?;
        if scheme == "http"
            && !is_yes(variable("AWS_ALLOW_HTTP"), "AWS_ALLOW_HTTP")?.unwrap_or(false)
        {
            return Err(format!(
                "{endpoint} is not encrypted: use https, or set AWS_ALLOW_HTTP=true"
            ));
        }
        let by_host = variable("AWS_VIRTUAL_HOSTED_STYLE_REQUEST");
        let by_host = is_yes(by_host, "AWS_VIRTUAL_HOSTED_STYLE_REQUEST")?.unwrap_or(is_aws);
        Ok(Self {
            scheme,
            authority,
            base_path,
            is_aws,
            region,
            style: if by_host { BucketStyle::Host } else { BucketStyle::Path },
            ca_bundle: variable("AWS_CA_BUNDLE")
                .or_else(|| variable(CA_VARIABLE))
                .map(PathBuf::from),
            credentials: Source::find(variable)?,
        })
    }
}

fn is_yes(value: Option<String>, name: &str) -> Result<Option<bool>, String> {
    match value.as_deref() {
        None => Ok(None),
        Some("true" | "1" | "yes") => Ok(Some(true)),
        Some("false" | "0" | "no") => Ok(Some(false)),
        Some(other) => Err(format!("{name} is true or false, not {other:?}")),
    }
}

/// Scheme, authority and path of an endpoint.
fn split(endpoint: &str) -> Result<(&'static str, String, String), String> {
    let wrong = || format!("{endpoint:?} is no address of a server: write https://HOST[:PORT]");
    let (scheme, rest, usual_port) = match endpoint.split_once("://") {
        Some(("https", rest)) => ("https", rest, ":443"),
        Some(("http", rest)) => ("http", rest, ":80"),
        _ => return Err(wrong()),
    };
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let authority = authority.strip_suffix(usual_port).unwrap_or(authority);
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']');
    if authority.is_empty() || !authority.bytes().all(fits) {
        return Err(wrong());
    }
    let path = path.trim_end_matches('/');
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'/' | b'~');
    if !path.bytes().all(fits) {
        return Err(wrong());
    }
    let base_path = if path.is_empty() { String::new() } else { format!("/{path}") };
    Ok((scheme, authority.to_ascii_lowercase(), base_path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(more: &[(&str, &str)]) -> Result<S3Settings, String> {
        let keys = [("AWS_ACCESS_KEY_ID", "A"), ("AWS_SECRET_ACCESS_KEY", "S")];
        let all = [more, &keys].concat();
        let find = |name: &str| all.iter().find(|(known, _)| *known == name);
        S3Settings::from(&|name| find(name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn aws_is_asked_by_host_and_others_by_path() {
        let aws = settings(&[("AWS_DEFAULT_REGION", "eu-central-1")]).unwrap();
        assert_eq!(aws.authority, "s3.eu-central-1.amazonaws.com");
        assert_eq!((aws.scheme, aws.style, aws.is_aws), ("https", BucketStyle::Host, true));
        let own = settings(&[("AWS_ENDPOINT_URL", "https://Ceph.example:443/s3/")]).unwrap();
        assert_eq!((own.authority.as_str(), own.base_path.as_str()), ("ceph.example", "/s3"));
        assert_eq!((own.style, own.region.as_str()), (BucketStyle::Path, "us-east-1"));
        let by_host = ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true");
        let own = settings(&[("AWS_ENDPOINT_URL", "https://h:9000"), by_host]).unwrap();
        assert_eq!((own.authority.as_str(), own.style), ("h:9000", BucketStyle::Host));
    }

    #[test]
    fn plain_http_is_a_choice_and_nonsense_is_refused() {
        let plain = ("AWS_ENDPOINT_URL", "http://127.0.0.1:7480");
        assert!(settings(&[plain]).unwrap_err().contains("AWS_ALLOW_HTTP"));
        assert_eq!(settings(&[plain, ("AWS_ALLOW_HTTP", "true")]).unwrap().scheme, "http");
        assert!(settings(&[plain, ("AWS_ALLOW_HTTP", "maybe")]).is_err());
        for bad in ["ftp://x", "host:1", "https://", "https://a b", "https://u@h", "https://h/a?b"]
        {
            assert!(settings(&[("AWS_ENDPOINT_URL", bad)]).is_err(), "{bad}");
        }
    }
}
