//! An operator's day with two domains of libvirt, a bare QEMU and the daemon, from README and man
//! pages alone: each step is a command that they name.

use std::path::{Path, PathBuf};
use std::time::Duration;

use icecore_tests::{
    Daemon, Disk, Domain, Fs, Icecore, Libvirt, MIB, Outcome, Result, Run, Shell, TestVm, VmSpec,
    check_writer_in_images, compare, image_to_raw, text, wait_until,
};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Longer than a minute, in which the schedule comes once.
const SCHEDULE_DEADLINE: Duration = Duration::from_secs(100);
const DEADLINE: Duration = Duration::from_secs(60);

/// What is at hand.
struct Day<'a> {
    icecore: &'a Icecore,
    config: &'a Path,
    web: Domain<'a>,
    bare: &'a TestVm,
}

#[test]
fn an_operator_gets_through_a_day() -> Result<()> {
    let libvirt = Libvirt::start()?;
    libvirt.define("db")?;
    let mut shell = libvirt.define("web")?.boot()?;
    let bare = VmSpec::new("bare").no_guest().disk(Disk::new("d0", 64 * MIB)).start()?;
    bare.fill("d0", 1, 0, 16 * MIB)?;
    let icecore = Icecore::new()?;
    let more = format!(
        "[libvirt]\nuri = '{}'\ninclude = ['web', 'db']\n[vm.gone]\nqmp = '{}'\n\
         [schedule.often]\ncron = '* * * * *'\nvms = ['db']\nrepository = 'main'\n\
         [schedule.often.retention]\nlast = 2\n",
        libvirt.uri(),
        icecore.path("gone.qmp").display()
    );
    let config = icecore.write_config(&[&bare], &more)?;
    let project =
        std::fs::read_to_string(&config)?.replace("[vm.bare]", "[vm.bare]\nproject = 'shop'");
    std::fs::write(&config, project)?;
    let day = Day { icecore: &icecore, config: &config, web: libvirt.domain("web"), bare: &bare };
    day.command("quota").args(["set", "shop", "--points", "2"]).succeed()?;
    day.command("config").arg("check").succeed()?;
    let daemon = icecore.serve_again(&config)?;
    let (point, vdb) = day.backs_up(&mut shell)?;
    day.watches_and_cancels()?;
    day.reads_why_one_failed()?;
    day.restores()?;
    day.hits_the_quota(&daemon)?;
    day.rolls_back(&point, &vdb)?;
    day.makes_a_new_domain(&libvirt, &point, &vdb)?;
    let daemon = day.upgrades_in_mid_job(daemon)?;
    day.sees_what_the_schedule_did(&daemon)?;
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.finish()?, Some(0));
    bare.require_no_trace()
}

impl Day<'_> {
    fn command(&self, subcommand: &str) -> Run {
        self.icecore.command(subcommand).arg("--config").arg(self.config)
    }

    /// Through the daemon, to the one repository.
    fn ask(&self, subcommand: &str) -> Run {
        self.command(subcommand).args(["--daemon", "--repo", "main", "--json"])
    }

    /// A backup that takes a while; its job, when it copies.
    fn slow_backup(&self, vm: &str, rate: &str) -> Result<String> {
        let slow = ["--detach", "--level", "full", "--rate-limit", rate, vm];
        let job = text(&self.ask("backup").args(slow).json()?, "job")?.to_owned();
        wait_until("the copy", DEADLINE, || {
            let seen = self.command("job").args(["show", &job]).json()?;
            Ok(seen["progress"]["done_bytes"].as_u64() > Some(0))
        })?;
        Ok(job)
    }

    /// What `vdb` of the domain holds now; the guest leaves it alone between writes.
    fn vdb(&self, name: &str) -> Result<PathBuf> {
        let raw = self.icecore.path(name);
        image_to_raw(&self.web.image("vdb"), "qcow2", &raw)?;
        Ok(raw)
    }

    fn backs_up(&self, shell: &mut Shell) -> Result<(String, PathBuf)> {
        shell.run("dd if=/dev/urandom of=/dev/lab/vdb bs=1M count=8 conv=notrunc,fsync 2>&1")?;
        let vdb = self.vdb("vdb-of-the-point.raw")?;
        let report = self.ask("backup").arg("web").json()?;
        assert_eq!(report["consistency"]["level"], "filesystem", "{report}");
        shell.run("dd if=/dev/zero of=/dev/lab/vdb bs=1M count=8 conv=notrunc,fsync 2>&1")?;
        let next = self.ask("backup").arg("web").json()?;
        assert_eq!(next["disks"][1]["mode"], "incremental", "{next}");
        Ok((text(&report, "point")?.to_owned(), vdb))
    }

    fn watches_and_cancels(&self) -> Result<()> {
        let job = self.slow_backup("bare", "4M")?;
        let watched = self.command("job").args(["watch", &job]).succeed()?;
        assert!(watched.stdout.contains("succeeded: point"), "{watched:?}");
        assert!(watched.stderr.contains("MiB"), "it tells how far it is: {watched:?}");
        let job = self.slow_backup("web", "2M")?;
        let live = self.command("top").arg("--once").succeed()?.stdout;
        assert!(live.contains(&job) && live.contains('%'), "{live}");
        self.command("job").args(["cancel", &job]).succeed()?;
        let ended = self.command("job").args(["show", &job]).json()?;
        assert_eq!(ended["state"], "cancelled", "{ended}");
        assert!(!self.web.has_job());
        assert_eq!(self.web.state()?, "running");
        Ok(())
    }

    /// Each message says what was tried, on what, why it failed, and what to do.
    fn reads_why_one_failed(&self) -> Result<()> {
        let failed = self.ask("backup").arg("gone").expect(1)?;
        for part in ["back up gone", "gone.qmp", "next:"] {
            assert!(failed.stderr.contains(part), "{part} in {failed:?}");
        }
        let jobs = self.command("job").args(["list", "--json"]).json()?;
        let of_gone = jobs.as_array().into_iter().flatten().find(|job| {
            // It is tried again later, as a job of its own.
            job["vm"] == "gone" && job["state"] == "failed"
        });
        let job = of_gone.map(|job| &job["job"]).and_then(Value::as_str).unwrap_or_default();
        let shown = self.command("job").args(["show", job]).json()?;
        assert_eq!(shown["state"], "failed");
        assert!(shown["failure_reason"].is_string() && shown["next"].is_string(), "{shown}");
        let listed = self.command("job").arg("list").succeed()?.stdout;
        assert!(listed.contains("gone.qmp"), "{listed}");
        let status = self.command("status").succeed()?.stdout;
        assert!(
            status.lines().any(|line| line.contains("gone") && line.contains("none")),
            "{status}"
        );
        Ok(())
    }

    fn restores(&self) -> Result<()> {
        let folder = self.icecore.path("restored");
        std::fs::create_dir(&folder)?;
        let restore = self.ask("restore").args(["latest", "--vm", "bare", "--to"]).arg(&folder);
        assert_eq!(restore.json()?["disks"][0]["root_verified"], true);
        self.bare.reference()?.compare_all(&folder)
    }

    fn hits_the_quota(&self, daemon: &Daemon) -> Result<()> {
        self.ask("backup").arg("bare").succeed()?;
        let refused: Outcome = self.ask("backup").arg("bare").expect(3)?;
        assert!(
            refused.stderr.contains("shop") && refused.stderr.contains("quota set"),
            "{refused:?}"
        );
        let listed = self.command("quota").args(["list", "--json"]).json()?;
        assert_eq!(listed[0]["used"]["points"], 2, "{listed}");
        self.command("quota").args(["set", "shop", "--points", "9"]).succeed()?;
        daemon.signal(Signal::HUP);
        wait_until("the new quota", DEADLINE, || {
            Ok(self.ask("backup").arg("bare").outcome()?.status == Some(0))
        })
    }

    fn rolls_back(&self, point: &str, vdb: &Path) -> Result<()> {
        let report = self.ask("rollback").args(["web", "--to", point]).json()?;
        assert_eq!(report["vm_restarted"], true, "{report}");
        assert!(report["safety_point"].is_string(), "{report}");
        let mut shell = self.web.wait_ready("web.sh")?;
        shell.run("check-writer /mnt/vda")?;
        compare(vdb, &self.vdb("rolled-back.raw")?)
    }

    fn makes_a_new_domain(&self, libvirt: &Libvirt, point: &str, vdb: &Path) -> Result<()> {
        let (dir, uri) = (libvirt.path("made"), libvirt.uri());
        let create = self.command("vm").args(["create", "--name", "web2", "--from", point]);
        let create = create.args(["--repo", "main", "--json", "--libvirt", &uri, "--dir"]);
        assert_eq!(create.arg(&dir).json()?["defined"], true);
        assert_eq!(libvirt.domain("web2").state()?, "shut off");
        let copy = self.icecore.path("web2-vdb.raw");
        image_to_raw(&dir.join("web2-vdb.qcow2"), "qcow2", &copy)?;
        compare(vdb, &copy)
    }

    fn upgrades_in_mid_job(&self, mut daemon: Daemon) -> Result<Daemon> {
        let vdb = self.vdb("before-the-upgrade.raw")?;
        let job = self.slow_backup("web", "8M")?;
        daemon.kill();
        let daemon = self.icecore.serve_again(self.config)?;
        let done = daemon.wait_for(&job, "succeeded")?;
        let (folder, point) = (self.icecore.path("proof"), text(&done, "point")?);
        self.icecore.restore_all(point, &folder)?;
        compare(&vdb, &folder.join("vdb.raw"))?;
        check_writer_in_images(&[(folder.join("vda.raw"), Fs::Ext4)])?;
        Ok(daemon)
    }

    fn sees_what_the_schedule_did(&self, daemon: &Daemon) -> Result<()> {
        wait_until("the schedule", SCHEDULE_DEADLINE, || {
            let jobs = daemon.get("/v1/jobs?vm=db&state=succeeded")?.expect(200)?;
            let by = |job: &Value| job["order"]["requested_by"] == json!("schedule often");
            Ok(jobs.as_array().is_some_and(|jobs| jobs.iter().any(by)))
        })?;
        let vms = self.command("vm").args(["list", "--json"]).json()?;
        let of = |name: &str| vms.as_array().and_then(|all| all.iter().find(|vm| vm["vm"] == name));
        for name in ["web", "db", "bare"] {
            assert_eq!(of(name).map(|vm| &vm["protected"]), Some(&json!(true)), "{name} in {vms}");
        }
        self.icecore.check().map(drop)
    }
}
