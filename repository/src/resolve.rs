//! What a person means by a point: pure.

use crate::error::{Error, Result};
use crate::ids::PointId;

/// Finds `latest`, `latest~N`, a full id or a unique prefix among `ids`, which ascend.
pub(crate) fn point(spec: &str, ids: &[&PointId]) -> Result<PointId> {
    let absent = || Error::NotFound { what: format!("point {spec:?}") };
    if let Some(back) = steps_back(spec) {
        let found = ids.len().checked_sub(1).and_then(|last| last.checked_sub(back));
        return found.map(|at| ids[at].clone()).ok_or_else(absent);
    }
    let mut fitting = ids.iter().filter(|id| !spec.is_empty() && id.as_str().starts_with(spec));
    let first = fitting.next().ok_or_else(absent)?;
    match fitting.count() {
        0 => Ok((*first).clone()),
        more => Err(Error::Ambiguous { spec: spec.to_owned(), matches: more + 1 }),
    }
}

fn steps_back(spec: &str) -> Option<usize> {
    match spec.strip_prefix("latest")? {
        "" => Some(0),
        rest => rest.strip_prefix('~')?.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs() {
        let ids: Vec<PointId> = ["00000000a00000", "00000000a00001", "00000000b00000"]
            .iter()
            .map(|id| id.parse().unwrap())
            .collect();
        let ids: Vec<&PointId> = ids.iter().collect();
        let find = |spec: &str| point(spec, &ids).map(|id| id.to_string());
        assert_eq!(find("latest").unwrap(), "00000000b00000");
        assert_eq!(find("latest~0").unwrap(), "00000000b00000");
        assert_eq!(find("latest~2").unwrap(), "00000000a00000");
        assert_eq!(find("00000000b").unwrap(), "00000000b00000");
        assert_eq!(find("00000000a00001").unwrap(), "00000000a00001");
        assert!(matches!(find("00000000a"), Err(Error::Ambiguous { matches: 2, .. })));
        for absent in ["", "latest~3", "latest~", "latest~x", "latest~-1", "x", "../config"] {
            assert!(matches!(find(absent), Err(Error::NotFound { .. })), "{absent}");
        }
        assert!(point("latest", &[]).is_err());
    }
}
