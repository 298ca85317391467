//! What the points of a project may take. Pure.

use serde::Serialize;

use crate::config::QuotaConfig;

/// Bytes of a "gigabyte" in the configuration, which is a GiB as everywhere in Icecore.
const GIGABYTE: f64 = (1u64 << 30) as f64;

/// What a project's points take in one repository.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Points.
    pub points: u64,
    /// Bytes stored for them.
    pub stored_bytes: u64,
}

impl Usage {
    /// Of points that took so many bytes each.
    pub fn of(stored_bytes: impl Iterator<Item = u64>) -> Self {
        stored_bytes.fold(Self::default(), |sum, bytes| Self {
            points: sum.points + 1,
            stored_bytes: sum.stored_bytes.saturating_add(bytes),
        })
    }
}

/// The limit in bytes.
pub fn bytes_max(quota: &QuotaConfig) -> Option<u64> {
    // A cast of a float saturates.
    quota.gigabytes.map(|gigabytes| (gigabytes * GIGABYTE) as u64)
}

/// Whether one more point may be begun, and how many bytes it may store (none: any number).
///
/// # Errors
/// With what is used up, for a person.
pub fn allowance(quota: &QuotaConfig, used: Usage) -> Result<Option<u64>, String> {
    if let Some(points) = quota.points.filter(|points| used.points >= *points) {
        return Err(format!(
            "its {} points are all that its quota of {points} allows",
            used.points
        ));
    }
    match bytes_max(quota) {
        Some(max) if used.stored_bytes >= max => Err(format!(
            "its points take {} bytes of the {max} that its quota allows",
            used.stored_bytes
        )),
        max => Ok(max.map(|max| max - used.stored_bytes)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_quota_is_reached_not_passed() {
        let quota = QuotaConfig { points: Some(2), gigabytes: Some(1.0) };
        let used = |points, stored_bytes| Usage { points, stored_bytes };
        assert_eq!(allowance(&quota, used(1, 1)), Ok(Some((1 << 30) - 1)));
        assert!(allowance(&quota, used(2, 1)).unwrap_err().contains("quota of 2"));
        assert!(allowance(&quota, used(0, 1 << 30)).is_err());
        assert_eq!(allowance(&QuotaConfig::default(), used(9, u64::MAX)), Ok(None));
        assert!(allowance(&QuotaConfig { points: Some(0), gigabytes: None }, used(0, 0)).is_err());
    }

    proptest! {
        #[test]
        fn what_is_allowed_never_passes_the_limit(
            gigabytes in 0.0f64..1e12, sizes in prop::collection::vec(any::<u64>(), 0..5),
        ) {
            let quota = QuotaConfig { points: None, gigabytes: Some(gigabytes) };
            let used = Usage::of(sizes.iter().copied());
            prop_assert_eq!(used.points, sizes.len() as u64);
            if let Ok(Some(more)) = allowance(&quota, used) {
                prop_assert!(more > 0);
                prop_assert_eq!(used.stored_bytes.checked_add(more), bytes_max(&quota));
            }
        }
    }
}
