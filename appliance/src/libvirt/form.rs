//! How a domain is captured while it runs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The two ways; docs/LIBVIRT.md weighs them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CaptureForm {
    /// libvirt's own backup job, with a checkpoint.
    #[default]
    Job,
    /// The graph that a bare QEMU gets, put in through libvirt's monitor passthrough.
    Direct,
}

impl CaptureForm {
    /// The word of the command line and the configuration.
    pub fn word(self) -> &'static str {
        match self {
            Self::Job => "job",
            Self::Direct => "direct",
        }
    }
}

impl std::str::FromStr for CaptureForm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::Job, Self::Direct].into_iter().find(|form| form.word() == text);
        known.ok_or_else(|| format!("'{text}' is neither 'job' nor 'direct'"))
    }
}

#[cfg(test)]
mod tests {
    use super::CaptureForm;

    #[test]
    fn words_come_back() {
        for form in [CaptureForm::Job, CaptureForm::Direct] {
            assert_eq!(form.word().parse(), Ok(form));
            assert_eq!(serde_json::to_value(form).unwrap(), form.word());
        }
        assert!("pull".parse::<CaptureForm>().is_err());
    }
}
