//! Encrypted repositories through the binary: nothing is readable without the key, nothing works with
//! another one, and with it everything works as elsewhere. FAULTS row 43.

use std::path::{Path, PathBuf};

use icecore_tests::{
    Disk, Icecore, MIB, Result, Run, TestVm, VmSpec, compare, count, of_disk, require_mode,
    require_rehash, text,
};

/// In a disk and in the name of a VM, and nowhere else.
const MARK: &str = "the-guests-own-secret";

/// A VM that is off and whose disk is mostly noise, so that nothing hides in compression.
struct Off {
    icecore: Icecore,
    image: PathBuf,
}

impl Off {
    fn new(icecore: Icecore) -> Result<Self> {
        let image = icecore.path("disk.raw");
        let off = Self { icecore, image };
        off.fill(1)?;
        Ok(off)
    }

    /// Noise that depends on `seed` in one half of the disk, with the mark in each 4 KiB.
    fn fill(&self, seed: u64) -> Result<()> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut bytes: Vec<u8> = (0..MIB).map(noise).collect();
        for byte in &mut bytes[MIB as usize / 2..] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state as u8;
        }
        for page in bytes.chunks_mut(4096) {
            page[100..100 + MARK.len()].copy_from_slice(MARK.as_bytes());
        }
        Ok(std::fs::write(&self.image, bytes)?)
    }

    fn backup(&self) -> Run {
        let run = self.icecore.on_repository("backup").args(["--name", MARK, "--image"]);
        run.arg(format!("d0={}", self.image.display()))
    }

    fn restore(&self, to: &Path) -> Run {
        let run = self.icecore.on_repository("restore").args(["latest", "--disk", "d0", "--to"]);
        run.arg(to)
    }

    fn key(&self, command: &str) -> Run {
        let run = self.icecore.command("repo").arg("--json").args(["key", command]);
        run.arg(self.icecore.repository())
    }

    /// The objects in which some bytes are found.
    fn objects_with(&self, bytes: &[u8]) -> Result<Vec<PathBuf>> {
        let mut objects = Vec::new();
        collect(self.icecore.repository(), &mut objects)?;
        let mut found = Vec::new();
        for object in objects {
            let content = std::fs::read(&object)?;
            if content.windows(bytes.len()).any(|part| part == bytes) {
                found.push(object);
            }
        }
        Ok(found)
    }
}

/// A command of two words on the repository.
fn on_repository(icecore: &Icecore, command: &str, word: &str) -> Run {
    icecore.command(command).args([word, "--json", "--repo"]).arg(icecore.repository())
}

fn noise(at: u64) -> u8 {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8
}

fn collect(folder: &Path, into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { collect(&path, into)? } else { into.push(path) }
    }
    Ok(())
}

#[test]
fn a_store_holds_nothing_readable_and_is_whole() -> Result<()> {
    let off = Off::new(Icecore::encrypted()?)?;
    let icecore = &off.icecore;
    let info = icecore.command("repo").args(["info", "--json"]).arg(icecore.repository());
    assert_eq!(info.json()?["encrypted"], true);
    require_mode(&off.backup().json()?, "d0", "full")?;
    off.fill(2)?;
    let second = off.backup().json()?;
    require_rehash(&second, "d0", "BitmapMissing")?;
    let stored = count(of_disk(&second, "d0")?, "stored_bytes")?;
    assert!(stored < MIB * 3 / 4, "unchanged blocks are recognised by their ids: {stored}");
    off.restore(&icecore.path("restored.raw")).succeed()?;
    compare(&off.image, &icecore.path("restored.raw"))?;

    assert_eq!(off.objects_with(MARK.as_bytes())?, Vec::<PathBuf>::new());
    // The same search finds it where nothing is encrypted.
    let plain = Off::new(Icecore::new()?)?;
    plain.backup().succeed()?;
    assert!(plain.objects_with(MARK.as_bytes())?.len() > 1, "in a pack and in the manifest");

    // A record shows no more of the point than the store does, and vouches for it all the same.
    let record = icecore.path("kept.record");
    let export = on_repository(icecore, "record", "export").args(["latest", "-o"]);
    export.arg(&record).succeed()?;
    assert!(!std::fs::read_to_string(&record)?.contains(MARK));
    let import = on_repository(icecore, "record", "import").arg(&record).json()?;
    assert_eq!((&import["state"], &import["restorable"]), (&"identical".into(), &true.into()));

    on_repository(icecore, "point", "delete").arg("latest~1").succeed()?;
    icecore.on_repository("gc").succeed()?;
    icecore.check()?;
    off.restore(&icecore.path("after-gc.raw")).succeed()?;
    compare(&off.image, &icecore.path("after-gc.raw"))
}

#[test]
fn only_the_right_key_opens_it() -> Result<()> {
    let off = Off::new(Icecore::encrypted()?)?;
    off.backup().succeed()?;
    let icecore = &off.icecore;
    let other = Icecore::encrypted()?;
    let (short, empty) = (icecore.path("short"), icecore.path("empty"));
    std::fs::write(&short, [1; 31])?;
    std::fs::write(&empty, b"")?;
    let missing = icecore.path("no-such-file");
    let target = icecore.path("target.raw");
    let wrong = other.key_file().expect("it is encrypted");
    for (key, why) in [
        (Some(wrong), "none of its 1 keys"),
        (Some(&short), "31 bytes"),
        (Some(&empty), "0 bytes"),
        (Some(&missing), "No such file"),
        (None, "no key was given"),
    ] {
        for run in [off.restore(&target), off.backup(), icecore.on_repository("check")] {
            let run = match key {
                Some(key) => run.arg("--key-file").arg(key),
                None => run.env_remove("ICECORE_KEY_FILE"),
            };
            let outcome = run.expect(2)?;
            assert!(outcome.stderr.contains(why), "{why}: {}", outcome.stderr);
            assert!(outcome.stdout.trim().is_empty(), "{}", outcome.stdout);
        }
        assert!(!target.exists(), "a restore without the key left something");
    }
    // The key of another repository is of no harm where nothing is encrypted.
    let plain = Off::new(Icecore::new()?)?;
    plain.backup().arg("--key-file").arg(wrong).succeed()?;
    // Without a key nothing is made encrypted.
    let nowhere = icecore.path("nowhere");
    let init = icecore.command("repo").args(["init", "--encrypt"]).arg(&nowhere);
    let init = init.env_remove("ICECORE_KEY_FILE").expect(2)?;
    assert!(init.stderr.contains("--key-file") && !nowhere.exists(), "{}", init.stderr);
    let points = on_repository(icecore, "point", "list").json()?;
    assert_eq!(points.as_array().map(Vec::len), Some(1));
    Ok(())
}

#[test]
fn keys_are_exchanged_and_a_kit_replaces_them() -> Result<()> {
    let off = Off::new(Icecore::encrypted()?)?;
    off.backup().succeed()?;
    let icecore = &off.icecore;
    let (kit, phrase) = (icecore.path("kit"), icecore.path("phrase"));
    std::fs::write(&phrase, "correct horse battery\n")?;
    off.key("kit").arg("-o").arg(&kit).succeed()?;
    off.key("kit").arg("-o").arg(&kit).expect(3)?;

    let first = off.key("list").json()?[0]["key"].as_str().unwrap_or_default().to_owned();
    let last = off.key("remove").arg(&first).expect(3)?;
    assert!(last.stderr.contains("only one"), "{}", last.stderr);
    let added = off.key("add").arg("--new-passphrase-file").arg(&phrase);
    let added = added.args(["--label", "in my head"]).json()?;
    assert_eq!((&added["method"], &added["label"]), (&"passphrase".into(), &"in my head".into()));
    off.key("remove").arg(&first).succeed()?;
    let check = || icecore.on_repository("check").arg("--read-data");
    check().expect(2)?;
    check().arg("--passphrase-file").arg(&phrase).succeed()?;
    check().arg("--key-file").arg(&kit).succeed()?;

    // The kit brings the first key back.
    let key = icecore.key_file().expect("it is encrypted");
    off.key("add").arg("--key-file").arg(&kit).arg("--new-key-file").arg(key).succeed()?;
    check().succeed()?;
    off.restore(&icecore.path("restored.raw")).succeed()?;
    compare(&off.image, &icecore.path("restored.raw"))
}

#[test]
fn damage_is_found_with_and_without_the_key() -> Result<()> {
    let off = Off::new(Icecore::encrypted()?)?;
    off.backup().succeed()?;
    let mut objects = Vec::new();
    collect(off.icecore.repository(), &mut objects)?;
    let size = |path: &PathBuf| std::fs::metadata(path).map(|meta| meta.len()).unwrap_or(0);
    let pack = objects.iter().max_by_key(|path| size(path)).expect("there are objects");
    let whole = std::fs::read(pack)?;
    let scrub = || off.icecore.on_repository("check").arg("--scrub").env_remove("ICECORE_KEY_FILE");
    scrub().succeed()?;
    let mut bad = whole.clone();
    bad[whole.len() / 2] ^= 1;
    std::fs::write(pack, bad)?;
    let name = pack.file_name().unwrap_or_default().to_string_lossy().into_owned();
    for run in [scrub(), off.icecore.on_repository("check").arg("--read-data")] {
        let report = run.expect(4)?.json()?;
        assert!(report["errors"].to_string().contains(&name), "{report}");
    }
    off.restore(&off.icecore.path("restored.raw")).expect(4)?;
    assert!(!off.icecore.path("restored.raw").exists());
    std::fs::write(pack, whole)?;
    scrub().succeed().map(drop)
}

fn running() -> Result<TestVm> {
    let vm = VmSpec::new("sealed").no_guest().disk(Disk::new("d0", 32 * MIB)).start()?;
    vm.fill("d0", 7, 0, 4 * MIB)?;
    Ok(vm)
}

#[test]
fn a_running_vm_is_backed_up_and_rolled_back() -> Result<()> {
    let vm = running()?;
    let icecore = Icecore::encrypted()?;
    let full = icecore.prove_next_point(&vm)?;
    require_mode(&full, "d0", "full")?;
    let before = vm.reference()?;
    vm.fill("d0", 8, 20 * MIB, MIB)?;
    require_mode(&icecore.prove_next_point(&vm)?, "d0", "incremental")?;
    vm.fill("d0", 9, MIB, MIB)?;
    icecore.rollback(&vm, text(&full, "point")?).args(["--verify", "full"]).succeed()?;
    vm.reference()?.same_as(&before)?;
    require_mode(&icecore.prove_next_point(&vm)?, "d0", "incremental")?;
    icecore.check().map(drop)
}

#[test]
fn the_daemon_takes_keys_from_its_configuration() -> Result<()> {
    let vm = running()?;
    let icecore = Icecore::encrypted()?;
    let daemon = icecore.serve(&[&vm], "")?;
    // Whatever key the caller has.
    let wrong = icecore.path("wrong");
    std::fs::write(&wrong, [9; 40])?;
    let backup = icecore.through(&daemon, "backup").arg(vm.name()).args(["--repo", "main"]);
    let report = backup.arg("--key-file").arg(&wrong).json()?;
    require_mode(&report, "d0", "full")?;
    let listed = daemon.get("/v1/points")?.json()?;
    assert!(listed.to_string().contains(text(&report, "point")?), "{listed}");
    drop(daemon);
    icecore.check()?;

    // A key_file says that the repository is encrypted: one in clear in its place is refused.
    let key = icecore.key_file().expect("it is encrypted");
    let plain = Icecore::new()?;
    let config = icecore.path("other.toml");
    let (url, key) = (plain.repository().display(), key.display());
    std::fs::write(&config, format!("[repository.main]\nurl = '{url}'\nkey_file = '{key}'\n"))?;
    let listed = icecore.command("point").args(["list", "--repo", "main", "--config"]);
    let refused = listed.arg(&config).expect(2)?;
    assert!(refused.stderr.contains("not encrypted"), "{}", refused.stderr);
    Ok(())
}
