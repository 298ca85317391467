//! Who asks: keys from the environment or from a file, where other programs look for them, too.

use std::fmt;
use std::path::PathBuf;

/// Keys of an account. Its secrets show themselves nowhere.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Credentials {
    pub(super) access_key: String,
    pub(super) secret_key: String,
    pub(super) session_token: Option<String>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({}, …)", self.access_key)
    }
}

/// Where they come from; asked again when a server refuses them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Source {
    /// `AWS_ACCESS_KEY_ID` and its companions. The environment of a process does not change.
    Environment(Credentials),
    /// A profile of a credentials file, which others may renew.
    File { path: PathBuf, profile: String },
}

const DEFAULT_PROFILE: &str = "default";

impl Source {
    /// Looks where the AWS tools look: the environment first, then the file.
    ///
    /// # Errors
    /// What is missing, in words.
    pub(super) fn find(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let access = variable("AWS_ACCESS_KEY_ID");
        let secret = variable("AWS_SECRET_ACCESS_KEY");
        let profile = variable("AWS_PROFILE");
        match (access, secret) {
            (Some(access_key), Some(secret_key)) if profile.is_none() => {
                let session_token = variable("AWS_SESSION_TOKEN");
                return Ok(Self::Environment(Credentials {
                    access_key,
                    secret_key,
                    session_token,
                }));
            }
            (Some(_), None) => return Err("AWS_SECRET_ACCESS_KEY is not set".to_owned()),
            _ => {}
        }
        let named = variable("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from);
        let usual = || variable("HOME").map(|home| PathBuf::from(home).join(".aws/credentials"));
        let path = named.or_else(usual).filter(|path| path.is_file());
        let path = path.ok_or(
            "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a file in \
             AWS_SHARED_CREDENTIALS_FILE",
        )?;
        Ok(Self::File { path, profile: profile.unwrap_or_else(|| DEFAULT_PROFILE.to_owned()) })
    }

    /// The credentials as they are now.
    ///
    /// # Errors
    /// What cannot be read, in words.
    pub(super) fn load(&self) -> Result<Credentials, String> {
        match self {
            Self::Environment(credentials) => Ok(credentials.clone()),
            Self::File { path, profile } => {
                let text = std::fs::read_to_string(path).map_err(|error| {
                    format!("the credentials in {} cannot be read: {error}", path.display())
                })?;
                parse(&text, profile).ok_or_else(|| {
                    format!("{} has no complete profile [{profile}]", path.display())
                })
            }
        }
    }
}

/// A profile of a file with sections of `key = value` lines.
fn parse(text: &str, profile: &str) -> Option<Credentials> {
    let (mut access, mut secret, mut token) = (None, None, None);
    let mut here = false;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            here = name.trim() == profile;
        } else if let (true, Some((key, value))) = (here, line.split_once('=')) {
            let value = Some(value.trim().to_owned());
            match key.trim() {
                "aws_access_key_id" => access = value,
                "aws_secret_access_key" => secret = value,
                "aws_session_token" => token = value,
                _ => {}
            }
        }
    }
    Some(Credentials { access_key: access?, secret_key: secret?, session_token: token })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_read_from_its_section() {
        let text = "# mine\n[default]\naws_access_key_id = A\naws_secret_access_key=S=/+\n\
                    [other]\naws_access_key_id=B\n aws_secret_access_key = T\n\
                    aws_session_token = tok\n";
        let one = parse(text, "default").unwrap();
        assert_eq!((one.access_key.as_str(), one.secret_key.as_str()), ("A", "S=/+"));
        assert_eq!(one.session_token, None);
        assert_eq!(parse(text, "other").unwrap().session_token.as_deref(), Some("tok"));
        assert_eq!(parse(text, "third"), None);
    }

    #[test]
    fn secrets_are_not_shown() {
        let keys = Credentials {
            access_key: "AK".into(),
            secret_key: "hidden-secret".into(),
            session_token: Some("hidden-token".into()),
        };
        let shown = format!("{:?} {:?}", keys.clone(), Source::Environment(keys));
        assert!(shown.contains("AK") && !shown.contains("hidden"), "{shown}");
    }

    #[test]
    fn half_of_a_pair_is_refused_by_name() {
        let only_access = |name: &str| (name == "AWS_ACCESS_KEY_ID").then(|| "A".to_owned());
        assert!(Source::find(&only_access).unwrap_err().contains("AWS_SECRET_ACCESS_KEY"));
        assert!(Source::find(&|_| None).unwrap_err().contains("no credentials"));
    }
}
