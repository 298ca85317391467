//! `s3://bucket/prefix`.

use std::fmt;

use crate::store::ObjectName;

/// Longest prefix in bytes; with the longest object name it stays within the 1,024 of a key.
const PREFIX_BYTES_MAX: usize = 512;

/// Where in an object store a repository is. The server is not part of it: that is the setting of
/// the host, as with all programs that speak S3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Address {
    bucket: String,
    /// Empty, or a path without a `/` at its ends.
    prefix: String,
}

impl S3Address {
    /// Reads what follows `s3://`.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (bucket, prefix) = text.split_once('/').unwrap_or((text, ""));
        let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let starts = bucket.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric());
        if !(3..=63).contains(&bucket.len()) || !starts || !bucket.bytes().all(fits) {
            return Err(format!("{bucket:?} is no name of a bucket"));
        }
        let prefix = prefix.trim_end_matches('/');
        let safe = |part: &str| ObjectName::new(part).is_ok();
        if prefix.len() > PREFIX_BYTES_MAX || (!prefix.is_empty() && !prefix.split('/').all(safe)) {
            return Err(format!(
                "the prefix {prefix:?} may only have letters, digits, '.', '_', '-' and '/', and no \
                 part that begins with a dot"
            ));
        }
        Ok(Self { bucket: bucket.to_owned(), prefix: prefix.to_owned() })
    }

    pub(super) fn bucket(&self) -> &str {
        &self.bucket
    }

    /// What all keys begin with: empty, or ending in `/`.
    pub(super) fn root(&self) -> String {
        if self.prefix.is_empty() { String::new() } else { format!("{}/", self.prefix) }
    }
}

impl fmt::Display for S3Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s3://{}", self.bucket)?;
        if self.prefix.is_empty() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_and_a_prefix_of_safe_parts() {
        let parse = |text: &str| S3Address::parse(text).map(|address| address.to_string());
        assert_eq!(parse("backups").unwrap(), "s3://backups");
        assert_eq!(parse("backups/").unwrap(), "s3://backups");
        assert_eq!(parse("b.c-1/site/host_2/").unwrap(), "s3://b.c-1/site/host_2");
        assert_eq!(S3Address::parse("bbb/p/q").unwrap().root(), "p/q/");
        for bad in ["", "b", "/x", "-bc/x", "b c d", "bbb//x", "bbb/../x", "bbb/.x", "bbb/x?y"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
