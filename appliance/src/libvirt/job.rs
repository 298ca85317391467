//! libvirt's backup job: the XML that asks for it, and whose job it is. Pure.

use std::path::{Path, PathBuf};

use icecore_qmp::inventory::is_ours;
use roxmltree::Document;

use super::checkpoint::CheckpointName;
use super::xml::{child, escape};

/// A disk of a pull-mode backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDisk {
    pub target: String,
    /// Where QEMU keeps what the guest overwrites.
    pub scratch: PathBuf,
    /// Show what changed since this checkpoint.
    pub since: Option<CheckpointName>,
}

/// The name of the bitmap that a disk's export shows.
pub fn export_bitmap(target: &str) -> String {
    format!("backup-{target}")
}

/// XML of a pull-mode backup of `disks` and of none of the `others`, served on `socket`.
pub fn request(socket: &Path, disks: &[JobDisk], others: &[&str]) -> String {
    let disk = |disk: &JobDisk| {
        let target = escape(&disk.target);
        let mode = match &disk.since {
            Some(since) => format!(
                "backupmode='incremental' incremental='{since}' exportbitmap='{}'",
                escape(&export_bitmap(&disk.target))
            ),
            None => "backupmode='full'".into(),
        };
        let scratch = escape(&disk.scratch.to_string_lossy());
        format!(
            "<disk name='{target}' backup='yes' type='file' {mode} exportname='{target}'>\
             <driver type='qcow2'/><scratch file='{scratch}'/></disk>"
        )
    };
    let others = others.iter().map(|other| format!("<disk name='{}' backup='no'/>", escape(other)));
    let disks: String = disks.iter().map(disk).chain(others).collect();
    let socket = escape(&socket.to_string_lossy());
    format!(
        "<domainbackup mode='pull'><server transport='unix' socket='{socket}'/>\
         <disks>{disks}</disks></domainbackup>"
    )
}

/// The socket of a backup job (`backup-dumpxml`): it tells whose job it is. `None` for one that
/// serves elsewhere, or pushes.
pub fn socket(text: &str) -> Result<Option<PathBuf>, String> {
    let document =
        Document::parse(text).map_err(|e| format!("a backup job's XML is not understood: {e}"))?;
    let server = child(document.root_element(), "server");
    Ok(server.and_then(|server| server.attribute("socket")).map(PathBuf::from))
}

/// What libvirt is at on a domain, from the answer of `domjobinfo`.
pub fn domain_job(said: &str) -> Option<String> {
    let field = |name: &str| {
        said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    match field("Job type") {
        None | Some("None") => None,
        Some(kind) => Some(field("Operation").unwrap_or(kind).to_lowercase()),
    }
}

/// A job of QEMU's block layer that is not ours, from the answer to `query-jobs`. The making of an
/// image, as for an external snapshot, is over in a moment and touches no disk.
pub fn block_job(said: &str) -> Option<String> {
    let answer: serde_json::Value = serde_json::from_str(said).ok()?;
    let text = |job: &serde_json::Value, key: &str| job[key].as_str().unwrap_or("").to_owned();
    let jobs = answer["return"].as_array()?.iter();
    let mut others = jobs.filter(|job| !is_ours(&text(job, "id")) && text(job, "type") != "create");
    others.next().map(|job| format!("{} ({})", text(job, "type"), text(job, "id")))
}

/// The run whose scratch directory a job's socket is in (`…/icecore-RUN/nbd.sock`).
pub fn run_of(socket: &Path) -> Option<&str> {
    socket.parent()?.file_name()?.to_str()?.strip_prefix("icecore-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_of_others_are_told_from_ours() {
        assert_eq!(domain_job("Job type:         None        \n\n"), None);
        let said = "Job type:         Unbounded   \nOperation:        Outgoing migration\n";
        assert_eq!(domain_job(said).as_deref(), Some("outgoing migration"));
        let jobs =
            |jobs: serde_json::Value| serde_json::json!({"return": jobs, "id": "l-1"}).to_string();
        let one = |id: &str, kind: &str| serde_json::json!({"id": id, "type": kind});
        let ours = format!("{}0badcafe-0-job", icecore_qmp::inventory::OUR_PREFIX);
        assert_eq!(block_job(&jobs(serde_json::json!([one(&ours, "backup")]))), None);
        assert_eq!(block_job(&jobs(serde_json::json!([one("create-x", "create")]))), None);
        let commit = jobs(serde_json::json!([one("commit-vda", "commit")]));
        assert_eq!(block_job(&commit).as_deref(), Some("commit (commit-vda)"));
    }

    #[test]
    fn the_request_names_every_disk_and_the_job_tells_whose_it_is() {
        let disks = [
            JobDisk { target: "vda".into(), scratch: "/s/a.qcow2".into(), since: None },
            JobDisk {
                target: "vdb".into(),
                scratch: "/s/b'.qcow2".into(),
                since: "icecore.r.c.p".parse().ok(),
            },
        ];
        let path = Path::new("/s/icecore-0badcafe/nbd.sock");
        let text = request(path, &disks, &["vdc"]);
        let document = Document::parse(&text).unwrap();
        let nodes: Vec<_> =
            document.descendants().filter(|node| node.has_tag_name("disk")).collect();
        let attribute = |at: usize, name: &str| nodes[at].attribute(name);
        assert_eq!(attribute(0, "backupmode"), Some("full"));
        assert_eq!(attribute(1, "incremental"), Some("icecore.r.c.p"));
        assert_eq!(attribute(1, "exportbitmap"), Some("backup-vdb"));
        assert_eq!(attribute(2, "backup"), Some("no"));
        assert_eq!(socket(&text).unwrap().as_deref(), Some(path));
        assert_eq!(run_of(path), Some("0badcafe"));
        assert_eq!(run_of(Path::new("/var/tmp/other.sock")), None);
    }
}
