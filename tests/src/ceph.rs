//! The smallest Ceph: one monitor, one OSD in memory, one radosgw.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::failure::{Failure, Result};
use crate::object_store::{ACCESS_KEY, SECRET_KEY, free_port, silent};
use crate::process::{Background, run, wait_until};

const START_DEADLINE: Duration = Duration::from_secs(60);
/// Room of the OSD in memory; it takes what is stored, not this.
const MEMORY_BYTES: u64 = 4 << 30;

/// A cluster that is being set up.
pub(crate) struct Ceph {
    folder: PathBuf,
}

impl Ceph {
    /// Starts a cluster in an empty folder, with its S3 on `port`.
    pub(crate) fn start(folder: &Path, port: u16) -> Result<Vec<Background>> {
        let ceph = Self { folder: folder.to_path_buf() };
        for part in ["mon", "osd", "rgw", "run"] {
            std::fs::create_dir(folder.join(part))?;
        }
        let identity = uuid()?;
        let (first, second) = (free_port()?, free_port()?);
        let monitor = format!("[v2:127.0.0.1:{first},v1:127.0.0.1:{second}]");
        std::fs::write(ceph.configuration(), configuration(folder, &identity, &monitor, port))?;
        ceph.make_keys()?;
        let map = folder.join("monmap");
        let mut monmap = Command::new("monmaptool");
        monmap.args(["--create", "--fsid", &identity, "--addv", "a", &monitor]);
        run(monmap.arg(&map))?;
        let mkfs = ["-i", "a", "--mkfs", "--monmap"];
        run(ceph.program("ceph-mon").args(mkfs).arg(&map).arg("--keyring").arg(ceph.keyring()))?;
        let mon = silent(ceph.program("ceph-mon").args(["-f", "-i", "a"]))?;
        let osd_uuid = uuid()?;
        run(ceph.ask().args(["osd", "new", &osd_uuid]))?;
        run(ceph.ask().args(["auth", "import", "-i"]).arg(ceph.keyring()))?;
        let mkfs = ["-i", "0", "--mkfs", "--osd-uuid", &osd_uuid];
        run(ceph.program("ceph-osd").args(mkfs))?;
        let osd = silent(ceph.program("ceph-osd").args(["-f", "-i", "0"]))?;
        wait_until("the OSD", START_DEADLINE, || {
            let said = run(ceph.ask().args(["osd", "stat"]))?;
            Ok(String::from_utf8_lossy(&said.stdout).contains("1 up"))
        })?;
        let gateway = silent(ceph.program("radosgw").args(["-f", "-n", "client.rgw.a"]))?;
        // Its pools are made by its first start; the user goes into them.
        wait_until("radosgw", START_DEADLINE, || {
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).is_ok())
        })?;
        let mut user = ceph.program("radosgw-admin");
        user.args(["user", "create", "--uid=laboratory", "--display-name=laboratory"]);
        user.arg(format!("--access-key={ACCESS_KEY}")).arg(format!("--secret-key={SECRET_KEY}"));
        run(&mut user)?;
        Ok(vec![gateway, osd, mon])
    }

    fn configuration(&self) -> PathBuf {
        self.folder.join("ceph.conf")
    }

    fn keyring(&self) -> PathBuf {
        self.folder.join("keyring")
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.arg("-c").arg(self.configuration());
        command
    }

    fn ask(&self) -> Command {
        let mut command = self.program("ceph");
        command.args(["--connect-timeout", "30"]);
        command
    }

    fn make_keys(&self) -> Result<()> {
        let caps = [
            ("mon.", vec!["mon", "allow *"]),
            ("client.admin", vec!["mon", "allow *", "osd", "allow *", "mgr", "allow *"]),
            ("client.rgw.a", vec!["mon", "allow rw", "osd", "allow rwx"]),
            ("osd.0", vec!["mon", "allow profile osd", "osd", "allow *"]),
        ];
        for (number, (name, caps)) in caps.into_iter().enumerate() {
            let mut command = Command::new("ceph-authtool");
            command.arg(self.keyring()).args(["--gen-key", "-n", name]);
            if number == 0 {
                command.arg("--create-keyring");
            }
            for pair in caps.chunks(2) {
                command.arg("--cap").args(pair);
            }
            run(&mut command)?;
        }
        Ok(())
    }
}

fn uuid() -> Result<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    if text.trim().is_empty() {
        return Err(Failure::new("the kernel gives no UUID"));
    }
    Ok(text.trim().to_owned())
}

fn configuration(folder: &Path, identity: &str, monitor: &str, port: u16) -> String {
    let folder = folder.display();
    format!(
        "[global]
fsid = {identity}
mon_initial_members = a
mon_host = {monitor}
public_network = 127.0.0.0/8
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pgp_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
run_dir = {folder}/run
admin_socket = {folder}/run/$name.asok
log_file =
pid_file =
keyring = {folder}/keyring
ms_bind_ipv6 = false
ms_bind_ipv4 = true
[mon.a]
mon_data = {folder}/mon
mon_data_avail_crit = 1
mon_data_avail_warn = 2
[osd.0]
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = {MEMORY_BYTES}
osd_memory_target = 939524096
osd_fast_shutdown = true
[client.rgw.a]
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_data = {folder}/rgw
rgw_run_sync_thread = false
rgw_dns_name = localhost
"
    )
}
