//! What an operator's configuration and policy come to: VMs by name, retention, quotas, messages,
//! records.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use icecore_tests::{Icecore, MIB, Result, Run, compare, run, text, wait_until};
use serde_json::Value;

/// Size of the VM's disk.
const DISK_BYTES: u64 = 4 * MIB;

/// A VM that is off, known by its name.
struct Operator {
    icecore: Icecore,
    image: PathBuf,
    config: PathBuf,
}

impl Operator {
    fn new(more: &str) -> Result<Self> {
        let icecore = Icecore::new()?;
        let (image, config) = (icecore.path("vm1.raw"), icecore.path("etc/icecore.toml"));
        std::fs::create_dir_all(icecore.path("etc"))?;
        let operator = Self { icecore, image, config };
        operator.fill(1)?;
        operator.configure("", more)?;
        Ok(operator)
    }

    /// Writes the configuration, with keys of the VM and tables of its own.
    fn configure(&self, vm: &str, more: &str) -> Result<()> {
        let (repository, image) = (self.icecore.repository().display(), self.image.display());
        let text = format!(
            "[repository.main]\nurl = '{repository}'\n[vm.vm1]\nimage = ['d0={image}']\n{vm}\n{more}\n"
        );
        Ok(std::fs::write(&self.config, text)?)
    }

    /// Changes the disk: the pattern differs with each seed and compresses to little.
    fn fill(&self, seed: u8) -> Result<()> {
        let byte = |at: u64| ((at >> 12) as u8).wrapping_mul(seed);
        Ok(std::fs::write(&self.image, (0..DISK_BYTES).map(byte).collect::<Vec<u8>>())?)
    }

    fn command(&self, subcommand: &str) -> Run {
        self.icecore.command(subcommand).arg("--config").arg(&self.config).arg("--json")
    }

    fn backup(&self) -> Run {
        self.command("backup").args(["vm1", "--repo", "main"])
    }

    /// Takes a point of new content and keeps a copy of the disk beside it.
    fn point(&self, seed: u8) -> Result<String> {
        self.fill(seed)?;
        let report = self.backup().json()?;
        let point = text(&report, "point")?.to_owned();
        std::fs::copy(&self.image, self.icecore.path(&point))?;
        Ok(point)
    }

    fn on_point(&self, action: &str, point: &str) -> Run {
        self.command("point").args([action, point, "--repo", "main"])
    }

    /// The points that are there, oldest first.
    fn points(&self) -> Result<Vec<String>> {
        let listed = self.command("point").args(["list", "vm1", "--repo", "main"]).json()?;
        let available = listed.as_array().into_iter().flatten();
        let available = available.filter(|point| point["status"] == "available");
        Ok(available.filter_map(|point| point["point"].as_str().map(ToOwned::to_owned)).collect())
    }

    /// Restores a point and compares it with the copy of its disk.
    fn prove(&self, point: &str) -> Result<()> {
        let target = self.icecore.path(&format!("{point}.restored"));
        let restore = self.command("restore").args([point, "--repo", "main", "--disk", "d0"]);
        restore.arg("--force").arg("--to").arg(&target).succeed()?;
        compare(&self.icecore.path(point), &target)
    }
}

fn ids(report: &Value, list: &str) -> Vec<String> {
    let all = report[list].as_array().into_iter().flatten();
    all.filter_map(|one| one["point"].as_str().map(ToOwned::to_owned)).collect()
}

#[test]
fn a_vm_is_backed_up_and_rolled_back_by_its_name_and_started_by_its_command() -> Result<()> {
    let operator = Operator::new("")?;
    let started = operator.icecore.path("started");
    operator.configure(&format!("restart = ['touch', '{}']", started.display()), "")?;
    let first = operator.point(1)?;
    operator.fill(2)?;
    let rollback = operator.command("rollback").args(["vm1", "--repo", "main", "--to", &first]);
    let report = rollback.json()?;
    assert_eq!(report["vm_restarted"], true, "{report}");
    assert!(started.exists());
    compare(&operator.icecore.path(&first), &operator.image)?;
    let listed = operator.command("vm").arg("list").json()?;
    assert_eq!(listed[0]["vm"], "vm1", "{listed}");
    assert_eq!(listed[0]["configured"], true, "{listed}");
    let shown = operator.command("vm").args(["show", "vm1", "--repo", "main"]).json()?;
    assert_eq!(shown["disks"][0]["disk"], "d0", "{shown}");
    let status = operator.command("status").json()?;
    assert_eq!(status["vms"][0]["points"], 2, "{status}");
    assert_eq!(status["repositories"][0]["points"], 2, "{status}");
    Ok(())
}

#[test]
fn a_wrong_configuration_is_named_with_file_and_line() -> Result<()> {
    let schedule = "[schedule.s]\ncron = '0 3 * * *'\nvms = ['vm2']\nrepository = 'main'";
    let operator = Operator::new(schedule)?;
    let checked = operator.command("config").arg("check").expect(2)?.json()?;
    let problem = &checked["problems"][0];
    assert!(text(problem, "what")?.contains("vm2") && problem["line"] == 8, "{checked}");
    let backup = operator.backup().expect(2)?;
    assert!(backup.stderr.contains("icecore.toml, line 8"), "{}", backup.stderr);
    operator.configure("", &schedule.replace("vm2", "vm1"))?;
    let checked = operator.command("config").arg("check").json()?;
    assert_eq!(checked["ok"], true, "{checked}");
    let next = operator.command("schedule").args(["next", "--count", "3"]).json()?;
    assert_eq!(next.as_array().map(Vec::len), Some(3), "{next}");
    assert_eq!(next[0]["vm"], "vm1", "{next}");
    let listed = operator.command("schedule").arg("list").json()?;
    assert_eq!(listed[0]["next_at"], next[0]["at"], "{listed} {next}");
    Ok(())
}

#[test]
fn what_is_due_is_run_once_and_pruned() -> Result<()> {
    let schedule = "[schedule.s]\ncalendar = '*:*:0/1'\nvms = ['vm*']\nrepository = 'main'\n\
                    retention = { last = 1 }";
    let operator = Operator::new(schedule)?;
    let due = || operator.command("schedule").arg("run").json();
    // A VM that is seen for the first time waits for its next moment, which comes each second.
    assert_eq!(due()?["runs"], Value::Array(Vec::new()));
    for seed in 1..3 {
        operator.fill(seed)?;
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let ran = due()?;
        assert_eq!((&ran["runs"][0]["backup"], &ran["runs"][0]["prune"]), (&0.into(), &0.into()));
        assert_eq!(ran["runs"].as_array().map(Vec::len), Some(1), "{ran}");
        assert_eq!(operator.points()?.len(), 1);
    }
    // Days without a look are made up for once.
    let marks = operator.icecore.path("state/schedule/marks.json");
    std::fs::write(&marks, r#"{"s":{"vm1":"2020-01-01T00:00:00Z"}}"#)?;
    operator.configure("", &schedule.replace("*:*:0/1", "2020-01-02"))?;
    let ran = due()?;
    assert_eq!(ran["missed"][0]["made_up"], true, "{ran}");
    assert_eq!(ran["runs"].as_array().map(Vec::len), Some(1), "{ran}");
    assert_eq!(due()?["runs"], Value::Array(Vec::new()));
    Ok(())
}

#[test]
fn a_prune_does_what_its_dry_run_says_and_the_rest_stays_restorable() -> Result<()> {
    let operator = Operator::new("")?;
    let points: Vec<String> = (1..=5).map(|seed| operator.point(seed)).collect::<Result<_>>()?;
    operator.on_point("protect", &points[1]).succeed()?;
    let prune = || operator.command("prune").args(["vm1", "--repo", "main"]);
    prune().expect(2)?;
    prune().args(["--keep-last", "2", "--timezone", "Nowhere"]).expect(2)?;
    let planned = prune().args(["--keep-last", "2", "--dry-run"]).json()?;
    assert_eq!(ids(&planned, "removed"), [points[0].clone(), points[2].clone()], "{planned}");
    assert_eq!(operator.points()?, points);
    let done = prune().args(["--keep-last", "2"]).json()?;
    assert_eq!(done["removed"], planned["removed"]);
    assert_eq!(done["kept"], planned["kept"]);
    assert_eq!(done["kept"][0]["rules"][0], "protected", "{done}");
    let left = [points[1].clone(), points[3].clone(), points[4].clone()];
    assert_eq!(operator.points()?, left);
    operator.icecore.on_repository("gc").succeed()?;
    for point in &left {
        operator.prove(point)?;
    }
    operator.icecore.check()?;
    // All five are of one day: one stands for it, and what is protected stays.
    prune().args(["--keep-yearly", "3"]).succeed()?;
    assert_eq!(operator.points()?, [points[1].clone(), points[4].clone()]);
    Ok(())
}

#[test]
fn a_quota_refuses_before_a_run_and_ends_one_that_stores_too_much() -> Result<()> {
    let operator = Operator::new("")?;
    operator.configure("project = 'shop'", "[quota.shop]\npoints = 1")?;
    operator.point(1)?;
    let refused = operator.backup().expect(3)?;
    assert!(refused.stderr.contains("shop") && refused.stderr.contains("quota"), "{refused:?}");
    let shown = operator.command("quota").args(["show", "shop"]).json()?;
    assert_eq!(shown[0]["used"]["points"], 1, "{shown}");
    assert!(shown[0]["exceeded"].is_string(), "{shown}");
    // What is set by command is in a file of its own; what was written by hand stays.
    let set = |size: &str| operator.command("quota").args(["set", "shop", "--gigabytes", size]);
    set("0.002").expect(3)?;
    operator.configure("project = 'shop'", "")?;
    set("0.002").succeed()?;
    let mut random = std::process::Command::new("sh");
    random.args(["-c", "head -c 8M /dev/urandom > \"$1\"", "sh"]).arg(&operator.image);
    run(&mut random)?;
    let ended = operator.backup().expect(3)?;
    assert!(ended.stderr.contains("more than"), "{ended:?}");
    assert_eq!(operator.points()?.len(), 1);
    operator.icecore.on_repository("gc").succeed()?;
    operator.icecore.check()?;
    set("1").succeed()?;
    operator.backup().succeed()?;
    Ok(())
}

/// A server that takes one request and answers 200; what it got is written into a file.
fn webhook(got: &Path) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let got = got.to_owned();
    std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut request = Vec::new();
        let mut buffer = [0; 4096];
        while !request.ends_with(b"}") {
            match stream.read(&mut buffer)? {
                0 => break,
                read => request.extend_from_slice(&buffer[..read]),
            }
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
        std::fs::write(got, request)
    });
    Ok(port)
}

#[test]
fn a_failure_is_told_by_mail_and_webhook_and_a_deaf_one_changes_nothing() -> Result<()> {
    let operator = Operator::new("")?;
    let (mail, hook) = (operator.icecore.path("mail"), operator.icecore.path("hook"));
    let port = webhook(&hook)?;
    let notify = format!(
        "[notify]\nmail = ['op@example.org']\nwebhook = 'http://127.0.0.1:{port}/x'\n\
         sendmail = ['/bin/sh', '-c', 'cat > {}']",
        mail.display()
    );
    operator.configure("", &notify)?;
    // A first point is read whole, as everyone expects.
    operator.point(1)?;
    assert!(!mail.exists());
    std::fs::remove_file(&operator.image)?;
    let status = operator.backup().outcome()?.status;
    wait_until("the webhook", std::time::Duration::from_secs(10), || Ok(hook.exists()))?;
    let (mail, hook) = (std::fs::read_to_string(&mail)?, std::fs::read_to_string(&hook)?);
    assert!(mail.contains("To: op@example.org") && mail.contains("vm1"), "{mail}");
    assert!(hook.starts_with("POST /x") && hook.contains("\"event\":\"failure\""), "{hook}");
    // Nobody listens any more.
    assert_eq!(operator.backup().outcome()?.status, status);
    operator.fill(2)?;
    operator.configure("", &notify.replace("cat >", "exit 1; cat >"))?;
    operator.backup().succeed().map(drop)
}

#[test]
fn a_record_tells_a_vanished_point_and_brings_it_back() -> Result<()> {
    let operator = Operator::new("")?;
    let point = operator.point(1)?;
    operator.point(2)?;
    let file = operator.icecore.path("point.record");
    let export = operator.command("record").args(["export", &point, "--repo", "main", "-o"]);
    export.arg(&file).succeed()?;
    let import = |file: &Path| {
        let run = operator.command("record").args(["import", "--repo", "main", "--read-data"]);
        run.arg(file)
    };
    let there = import(&file).json()?;
    assert_eq!((&there["state"], &there["restorable"]), (&"identical".into(), &true.into()));
    let manifest = operator.icecore.repository().join("points").join(&point);
    std::fs::remove_file(&manifest)?;
    let gone = import(&file).expect(4)?.json()?;
    assert_eq!(gone["state"], "missing", "{gone}");
    assert!(text(&gone, "advice")?.contains("--repair"), "{gone}");
    let back = import(&file).arg("--repair").json()?;
    assert_eq!((&back["state"], &back["restorable"]), (&"reinstated".into(), &true.into()));
    operator.prove(&point)?;
    // A manifest that is damaged instead of gone.
    let mut bytes = std::fs::read(&manifest)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&manifest)?;
    std::fs::write(&manifest, bytes)?;
    assert_eq!(import(&file).expect(4)?.json()?["state"], "damaged");
    import(&file).arg("--repair").succeed()?;
    operator.prove(&point)?;
    operator.icecore.check()?;
    // A record that was changed, and a point that was deleted.
    let changed = operator.icecore.path("changed.record");
    let record = std::fs::read_to_string(&file)?;
    std::fs::write(&changed, record.replacen("\"manifest\": \"", "\"manifest\": \"00", 1))?;
    import(&changed).expect(4)?;
    std::fs::write(&changed, record.replacen("\"vm1\"", "\"vm2\"", 1))?;
    import(&changed).expect(4)?;
    operator.on_point("delete", &point).succeed()?;
    assert_eq!(import(&file).expect(3)?.json()?["state"], "deleted");
    Ok(())
}

#[test]
fn the_catalog_is_made_anew_from_the_repository_alone() -> Result<()> {
    let operator = Operator::new("")?;
    let points = [operator.point(1)?, operator.point(2)?];
    assert_eq!(operator.points()?, points);
    let mut caches = Vec::new();
    for folder in std::fs::read_dir(operator.icecore.path("cache"))? {
        caches.push(folder?.path().join("catalog"));
    }
    assert_eq!(caches.len(), 1);
    let old = std::fs::read(&caches[0])?;
    operator.on_point("delete", &points[0]).succeed()?;
    // A cache of before the deletion, and one that is none.
    for content in [old, b"nonsense".to_vec()] {
        std::fs::write(&caches[0], content)?;
        assert_eq!(operator.points()?, points[1..]);
        let rebuilt = operator.command("catalog").args(["rebuild", "--repo", "main"]).json()?;
        assert_eq!(rebuilt["points"], 1);
        assert_eq!(operator.points()?, points[1..]);
    }
    Ok(())
}
