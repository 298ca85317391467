//! `icecore record`: what a repository says of a point, kept elsewhere and compared later.
//!
//! ```text
//! { "format": "icecore record 1", "repository": ID, "point": ID, "exported_at": TIME,
//!   "description": the point as JSON, for people and their programs (null when the repository is
//!                  encrypted: the record shows no more of the point than the repository does),
//!   "manifest": the manifest object in hex, "checksum": BLAKE3 over all but the description }
//! ```
//! The description is not trusted: it has to be what the manifest says.

use std::path::Path;

use icecore_repository::{CheckOptions, Point, PointId, RecordState, Repository};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::point::find;
use crate::cli::args::{RecordCommand, RecordExportArgs, RecordImportArgs};
use crate::cli::{DAMAGED, OK};
use crate::context::Context;
use crate::failure::{Failure, Outcome, Status};
use crate::output;
use crate::state::replace_file;

const FORMAT: &str = "icecore record 1";
/// A manifest has at most 64 MiB, which is twice as much in hex; its description adds a little.
const RECORD_BYTES_MAX: u64 = 160 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    format: String,
    repository: String,
    point: PointId,
    exported_at: Timestamp,
    description: serde_json::Value,
    manifest: String,
    checksum: String,
}

impl Record {
    fn sum(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("icecore 2026 record of a point");
        let (id, at) = (self.point.to_string(), self.exported_at.to_string());
        for part in [&self.format, &self.repository, &id, &at, &self.manifest] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

#[derive(Debug, Serialize)]
struct ImportReport {
    point: PointId,
    repository: String,
    /// identical, different, deleted, missing, damaged, absent or reinstated.
    state: &'static str,
    /// Whether every block of the point is where it should be (and whole, with --read-data).
    restorable: bool,
    errors: Vec<icecore_repository::CheckError>,
    detail: Option<String>,
    advice: Option<String>,
}

/// Runs `icecore record …`.
pub fn run(context: &Context, command: RecordCommand) -> Outcome<u8> {
    match command {
        RecordCommand::Export(args) => export(context, &args),
        RecordCommand::Import(args) => import(context, &args),
    }
}

fn export(context: &Context, args: &RecordExportArgs) -> Outcome<u8> {
    let tried = format!("export the record of point {}", args.point);
    let repository = context.open_read_only(&args.repo.repo)?;
    let point = find(&repository, &args.point, args.vm.as_deref(), &tried)?;
    if args.output.exists() && !args.force {
        let why = format!("{} exists", args.output.display());
        return Err(Failure::refused(tried, why).next("name another file, or add --force"));
    }
    let manifest =
        repository.manifest_of(&point.id).map_err(|e| Failure::from_repository(&tried, e))?;
    let mut record = Record {
        format: FORMAT.into(),
        repository: repository.id().to_string(),
        point: point.id.clone(),
        exported_at: Timestamp::now(),
        description: describe(&repository, &point).map_err(|e| Failure::failed(&tried, e))?,
        manifest: to_hex(&manifest),
        checksum: String::new(),
    };
    record.checksum = record.sum();
    let text = serde_json::to_vec_pretty(&record).map_err(|e| Failure::failed(&tried, e))?;
    let path = std::path::absolute(&args.output).map_err(|e| Failure::failed(&tried, e))?;
    replace_file(&path, &text)
        .map_err(|e| Failure::failed(&tried, format!("{}: {e}", path.display())))?;
    let bytes = text.len();
    if context.json {
        let report = serde_json::json!({ "point": point.id, "file": path, "bytes": bytes });
        output::json(&report)?;
    } else {
        output::print(&format!("record of {} written to {}\n", point.id, path.display()))?;
    }
    Ok(OK)
}

fn import(context: &Context, args: &RecordImportArgs) -> Outcome<u8> {
    let tried = format!("import the record {}", args.file.display());
    let (record, manifest) = read(&args.file, &tried)?;
    let repository = if args.repair {
        context.open(&args.repo.repo)?
    } else {
        context.open_read_only(&args.repo.repo)?
    };
    if repository.id().to_string() != record.repository {
        let why = format!("it is of repository {}, this is {}", record.repository, repository.id());
        return Err(Failure::usage(tried, why).next("name the repository that it was made of"));
    }
    let failed = |e| Failure::from_repository(&tried, e);
    let point = repository.read_manifest(&record.point, &manifest).map_err(failed)?;
    let described = describe(&repository, &point).map_err(|e| Failure::failed(&tried, e))?;
    if described != record.description {
        return Err(Failure::damaged(tried, "its description is not what its manifest says"));
    }
    let mut state = repository.compare_manifest(&record.point, &manifest).map_err(failed)?;
    let mut reinstated = false;
    if args.repair && matches!(state, RecordState::Reinstatable(_)) {
        repository.reinstate_manifest(&record.point, &manifest).map_err(failed)?;
        state = repository.compare_manifest(&record.point, &manifest).map_err(failed)?;
        reinstated = state == RecordState::Identical;
    }
    let report = judge(&repository, record, &state, reinstated, args.read_data, &tried)?;
    print(context, &report)?;
    Ok(match (report.restorable, &state) {
        (true, _) => OK,
        (false, RecordState::Deleted) => Status::Refused as u8,
        _ => DAMAGED,
    })
}

fn describe(repository: &Repository, point: &Point) -> serde_json::Result<serde_json::Value> {
    if repository.is_encrypted() {
        return Ok(serde_json::Value::Null);
    }
    serde_json::to_value(point)
}

/// Reads a record and verifies what can be verified without a repository.
fn read(path: &Path, tried: &str) -> Outcome<(Record, Vec<u8>)> {
    let meta = std::fs::metadata(path).map_err(|e| Failure::usage(tried, e))?;
    if meta.len() > RECORD_BYTES_MAX {
        return Err(Failure::usage(tried, "it is larger than any record"));
    }
    let bytes = std::fs::read(path).map_err(|e| Failure::usage(tried, e))?;
    let record: Record = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::damaged(tried, format!("it is no record: {e}")))?;
    if record.format != FORMAT {
        let why = format!("its format is '{}', and this program knows '{FORMAT}'", record.format);
        return Err(Failure::usage(tried, why).next("use a newer icecore"));
    }
    if record.checksum != record.sum() {
        return Err(Failure::damaged(tried, "its checksum does not match").next("use another copy"));
    }
    let manifest = from_hex(&record.manifest)
        .ok_or_else(|| Failure::damaged(tried, "its manifest is not in hex"))?;
    Ok((record, manifest))
}

fn judge(
    repository: &Repository,
    record: Record,
    state: &RecordState,
    reinstated: bool,
    read_data: bool,
    tried: &str,
) -> Outcome<ImportReport> {
    let mut report = ImportReport {
        point: record.point,
        repository: record.repository,
        state: name(state, reinstated),
        restorable: false,
        errors: Vec::new(),
        detail: None,
        advice: advice(state).map(ToOwned::to_owned),
    };
    if let RecordState::Reinstatable(damage) | RecordState::Unproven(damage) = state {
        report.detail = Some(damage.to_string());
    }
    if *state == RecordState::Identical {
        let point = Some(report.point.clone());
        let options = CheckOptions { read_data, sample: None, point };
        let checked = repository.check(&options, |_| {});
        let checked = checked.map_err(|e| Failure::from_repository(tried, e))?;
        report.restorable = checked.ok;
        report.errors = checked.errors;
        if !checked.ok {
            let what =
                "the manifest is there, but not all that it refers to; take a full point now";
            report.advice = Some(what.into());
        }
    }
    Ok(report)
}

fn name(state: &RecordState, reinstated: bool) -> &'static str {
    match state {
        RecordState::Identical if reinstated => "reinstated",
        RecordState::Identical => "identical",
        RecordState::Different => "different",
        RecordState::Deleted => "deleted",
        RecordState::Absent => "absent",
        RecordState::Reinstatable(damage) | RecordState::Unproven(damage) => {
            if damage.kind == icecore_repository::DamageKind::Missing {
                "missing"
            } else {
                "damaged"
            }
        }
    }
}

fn advice(state: &RecordState) -> Option<&'static str> {
    match state {
        RecordState::Identical => None,
        RecordState::Different => {
            Some("check the repository; one of the two manifests was put in the place of another")
        }
        RecordState::Deleted => Some("it was deleted on purpose; there is nothing to bring back"),
        RecordState::Absent => {
            Some("nothing in the repository speaks of the point: look at an older copy of it")
        }
        RecordState::Reinstatable(_) => {
            Some("run no gc, and put the manifest back with 'icecore record import --repair'")
        }
        RecordState::Unproven(_) => {
            Some("the receipt is gone, too, so nothing proves the record: look at an older copy")
        }
    }
}

fn print(context: &Context, report: &ImportReport) -> Outcome<()> {
    if context.json {
        return output::json(report);
    }
    let verdict = if report.restorable { "restorable" } else { "not restorable" };
    let mut text = format!("point {}: {}, {verdict}\n", report.point, report.state);
    if let Some(detail) = &report.detail {
        text += &format!("{}\n", output::printable(detail));
    }
    for error in &report.errors {
        text += &format!("{}: {}\n", error.object, output::printable(&error.detail));
    }
    if let Some(advice) = &report.advice {
        text += &format!("next: {advice}\n");
    }
    output::print(&text)
}

fn to_hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let nibble = |digit: &u8| char::from(*digit).to_digit(16).and_then(|n| u8::try_from(n).ok());
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let byte = |pair: &[u8; 2]| Some(nibble(&pair[0])? << 4 | nibble(&pair[1])?);
    if rest.is_empty() { pairs.iter().map(byte).collect() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_goes_there_and_back() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&all)), Some(all));
        assert_eq!(to_hex(&[0xab, 0x01]), "ab01");
        for wrong in ["a", "zz", "é"] {
            assert_eq!(from_hex(wrong), None, "{wrong}");
        }
    }
}
