//! The daemon from outside: its jobs survive what happens to it, and its API keeps its word.

use std::process::Command;
use std::time::Duration;

use icecore_tests::{
    Daemon, Disk, Failure, Icecore, MIB, Result, TestVm, VmSpec, run, text, wait_until,
};
use rustix::process::Signal;
use serde_json::{Value, json};

fn bare(name: &str) -> Result<TestVm> {
    let vm = VmSpec::new(name).no_guest().disk(Disk::new("d0", 64 * MIB)).start()?;
    vm.fill("d0", 1, 0, 24 * MIB)?;
    Ok(vm)
}

/// Starts a backup that takes several seconds and waits until it copies.
fn slow_backup(daemon: &Daemon, vm: &TestVm, rate: &str) -> Result<String> {
    let path = format!("/v1/vms/{}/backups", vm.name());
    let job = daemon.submit(&path, &json!({ "rate_limit": rate }).to_string())?;
    wait_until("the copy", Duration::from_secs(30), || vm.is_being_copied())?;
    Ok(job)
}

/// The documents of an event stream that has ended.
fn documents(stream: &str) -> Result<Vec<Value>> {
    let data = stream.lines().filter_map(|line| line.strip_prefix("data: "));
    data.map(|text| Ok(serde_json::from_str(text)?)).collect()
}

#[test]
fn a_backup_is_accepted_followed_and_restored_through_the_daemon() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let daemon = icecore.serve(&[&vm], "")?;
    let reference = vm.reference()?;
    let job = daemon.submit("/v1/vms/bare/backups", r#"{"label":"first","rate_limit":"16M/s"}"#)?;
    let seen = documents(&daemon.get(&format!("/v1/jobs/{job}/events"))?.body)?;
    let last = seen.last().ok_or_else(|| Failure::new("no event"))?;
    assert_eq!((&last["state"], &last["exit_status"]), (&json!("succeeded"), &json!(0)), "{last}");
    assert!(seen.len() > 2, "only {} events of a slow job", seen.len());
    let moved = seen.iter().any(|one| one["progress"]["done_bytes"].as_u64() > Some(0));
    assert!(moved, "no progress in {seen:?}");
    let point = text(last, "point")?;
    assert_eq!(last["result"]["point"], point);
    let points = daemon.get("/v1/points")?.expect(200)?;
    assert_eq!((&points[0]["point"], &points[0]["label"]), (&json!(point), &json!("first")));
    let second = icecore.through(&daemon, "backup").args(["--repo", "main", "bare"]).json()?;
    assert_eq!(second["disks"][0]["mode"], "incremental", "{second}");
    let restored = icecore.path("restored");
    std::fs::create_dir(&restored)?;
    let restore = icecore.through(&daemon, "restore").args(["--repo", "main", "--to"]);
    let report = restore.arg(&restored).arg(point).json()?;
    assert_eq!(report["disks"][0]["root_verified"], true);
    reference.compare_all(&restored)?;
    let check = icecore.through(&daemon, "check").args(["--repo", "main", "--read-data"]).json()?;
    assert_eq!(check["ok"], true);
    icecore.through(&daemon, "gc").args(["--repo", "main"]).json()?;
    vm.fill("d0", 9, 0, MIB)?;
    let rollback = icecore.through(&daemon, "rollback").args(["--repo", "main", "--to", point]);
    assert_eq!(rollback.arg("bare").json()?["disks"][0]["verified"], true);
    vm.reference()?.same_as(&reference)?;
    let metrics = daemon.get("/metrics")?.body;
    let counted = "icecore_jobs_ended_total{kind=\"backup\",state=\"succeeded\"} 2";
    assert!(metrics.contains(counted), "{metrics}");
    let jobs = icecore.through(&daemon, "job").arg("list").json()?;
    assert_eq!(jobs.as_array().map(Vec::len), Some(6), "{jobs}");
    vm.require_no_trace()
}

#[test]
fn points_are_copied_by_the_daemon() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let second = icecore.path("second");
    icecore.command("repo").arg("init").arg(&second).succeed()?;
    let more = format!("[repository.second]\nurl = '{}'\n", second.display());
    let daemon = icecore.serve(&[&vm], &more)?;
    let reference = vm.reference()?;
    let taken = daemon.submit("/v1/vms/bare/backups", r#"{"repo":"main"}"#)?;
    daemon.wait_for(&taken, "succeeded")?;
    let copy = || icecore.through(&daemon, "copy").args(["--repo", "main", "--to", "second"]);
    let copied = copy().arg("--all").json()?;
    assert_eq!((&copied["copied"], &copied["failed"]), (&json!(1), &json!(0)), "{copied}");
    let again = copy().args(["--vm", "bare"]).json()?;
    assert_eq!((&again["copied"], &again["present"]), (&json!(0), &json!(1)), "{again}");
    copy().arg("no-such-point").expect(2)?;
    let restored = icecore.path("restored");
    std::fs::create_dir(&restored)?;
    let restore = icecore.command("restore").arg("latest").arg("--repo").arg(&second);
    restore.arg("--to").arg(&restored).succeed()?;
    reference.compare_all(&restored)?;
    let job = daemon.submit("/v1/copy", r#"{"repo":"main","to":"second","point":"latest"}"#)?;
    let done = daemon.wait_for(&job, "succeeded")?;
    assert_eq!((&done["kind"], &done["result"]["present"]), (&json!("copy"), &json!(1)), "{done}");
    Ok(())
}

#[test]
fn a_cancelled_backup_leaves_nothing_and_a_waiting_one_never_begins() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let daemon = icecore.serve(&[&vm], "")?;
    let job = slow_backup(&daemon, &vm, "1M/s")?;
    let waiting = daemon.submit("/v1/vms/bare/backups", "{}")?;
    assert_eq!(daemon.job(&waiting)?["state"], "queued");
    // The one in the state directory, without asking the daemon; the other by the API.
    icecore.command("job").args(["cancel", &waiting]).succeed()?;
    daemon.post(&format!("/v1/jobs/{job}/cancel"), "")?.expect(202)?;
    let cancelled = daemon.wait_for(&job, "cancelled")?;
    assert_eq!(cancelled["exit_status"], 130, "{cancelled}");
    assert_eq!(daemon.wait_for(&waiting, "cancelled")?["point"], Value::Null);
    daemon.post(&format!("/v1/jobs/{job}/cancel"), "")?.expect(409)?;
    vm.require_no_trace()?;
    assert_eq!(vm.bitmaps("d0")?, Vec::<String>::new());
    icecore.prove_next_point(&vm).map(drop)
}

#[test]
fn a_restore_that_is_cancelled_leaves_no_target() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    icecore.prove_next_point(&vm)?;
    vm.fill("d0", 2, 0, 24 * MIB)?;
    let daemon = icecore.serve(&[&vm], "")?;
    let slow = slow_backup(&daemon, &vm, "1M/s");
    let target = icecore.path("target.raw");
    let interrupted =
        icecore.through(&daemon, "backup").args(["--repo", "main", "bare"]).start()?;
    wait_until("the second one", Duration::from_secs(20), || {
        let waiting = daemon.get("/v1/jobs?state=queued")?.expect(200)?;
        Ok(waiting.as_array().is_some_and(|jobs| jobs.len() == 1))
    })?;
    // Ctrl-C at the client cancels its job, as in place.
    interrupted.signal(Signal::INT);
    assert_eq!(interrupted.finish()?.status, Some(130));
    let body = json!({ "to": target, "disk": "d0" }).to_string();
    let job = daemon.submit("/v1/points/latest/restore", &body)?;
    // It ends either way, and what there is, is whole.
    let _ = daemon.post(&format!("/v1/jobs/{job}/cancel"), "")?;
    wait_until("the end", Duration::from_secs(60), || {
        Ok(!matches!(daemon.job(&job)?["state"].as_str(), Some("queued" | "running")))
    })?;
    let ended = daemon.job(&job)?;
    assert_eq!(target.exists(), ended["state"] == "succeeded", "{ended}");
    daemon.post(&format!("/v1/jobs/{}/cancel", slow?), "")?.expect(202).map(drop)
}

#[test]
fn jobs_survive_the_daemon() -> Result<()> {
    let (vm, other) = (bare("bare")?, bare("other")?);
    let icecore = Icecore::new()?;
    let mut daemon = icecore.serve(&[&vm, &other], "[limits]\njobs = 1")?;
    let reference = vm.reference()?;
    let running = slow_backup(&daemon, &vm, "4M/s")?;
    let waiting = daemon.submit("/v1/vms/other/backups", "{}")?;
    daemon.kill();
    let seen = icecore.command("job").args(["show", &running]).arg("--json").json()?;
    assert_eq!(seen["state"], "running", "{seen}");
    let daemon = icecore.serve_again(daemon.config())?;
    assert!(daemon.log()?.contains("adopted"), "{}", daemon.log()?);
    assert_eq!(daemon.job(&waiting)?["state"], "queued", "one at a time");
    let done = daemon.wait_for(&running, "succeeded")?;
    icecore.prove_point(&vm, text(&done, "point")?, &reference)?;
    daemon.wait_for(&waiting, "succeeded")?;
    // Told to end, it leaves what runs alone, too.
    vm.fill("d0", 3, 0, 24 * MIB)?;
    let third = slow_backup(&daemon, &vm, "1M/s")?;
    let config = daemon.config().to_owned();
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.finish()?, Some(0));
    let daemon = icecore.serve_again(&config)?;
    assert_eq!(daemon.job(&third)?["state"], "running");
    daemon.post(&format!("/v1/jobs/{third}/cancel"), "")?.expect(202)?;
    daemon.wait_for(&third, "cancelled")?;
    vm.require_no_trace()
}

#[test]
fn a_job_whose_process_is_killed_is_undone_and_its_vm_is_free_again() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let daemon = icecore.serve(&[&vm], "")?;
    let job = slow_backup(&daemon, &vm, "1M/s")?;
    icecore.command("job").args(["cancel", "--force", &job]).outcome()?;
    let killed = daemon.wait_for(&job, "interrupted")?;
    assert!(killed["failure_reason"].is_string(), "{killed}");
    let next = daemon.submit("/v1/vms/bare/backups", "{}")?;
    daemon.wait_for(&next, "succeeded")?;
    vm.require_no_trace()
}

#[test]
fn a_missed_run_of_a_schedule_is_made_up_for_once_and_its_retention_applied() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let old = icecore.prove_next_point(&vm)?;
    let marks = icecore.path("state/schedule");
    std::fs::create_dir_all(&marks)?;
    // As a daemon left it that did not run for a long time.
    let mark = json!({ "yearly": { "bare": "2020-06-01T00:00:00Z" } });
    std::fs::write(marks.join("marks.json"), mark.to_string())?;
    let schedule = "[schedule.yearly]\ncron = '0 0 1 1 *'\nvms = ['bare']\nrepository = 'main'\n\
                    [schedule.yearly.retention]\nlast = 1\n";
    let daemon = icecore.serve(&[&vm], schedule)?;
    let kinds = |kind: &str| daemon.get(&format!("/v1/jobs?state=succeeded&kind={kind}"));
    wait_until("the gc after the retention", Duration::from_secs(60), || {
        Ok(kinds("gc")?.expect(200)?.as_array().is_some_and(|jobs| !jobs.is_empty()))
    })?;
    let backups = kinds("backup")?.expect(200)?;
    let by_schedule: Vec<&Value> = backups
        .as_array()
        .into_iter()
        .flatten()
        .filter(|job| job["order"]["requested_by"] == "schedule yearly")
        .collect();
    assert_eq!(by_schedule.len(), 1, "{backups}");
    let points = daemon.get("/v1/points")?.expect(200)?;
    assert_eq!(points.as_array().map(Vec::len), Some(1), "{points}");
    assert_ne!(points[0]["point"], old["point"]);
    let metrics = daemon.get("/metrics")?.body;
    assert!(metrics.contains("icecore_runs_missed_total{schedule=\"yearly\"} 1"), "{metrics}");
    icecore.check().map(drop)
}

#[test]
fn a_second_daemon_is_refused_and_a_wrong_configuration_changes_nothing() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let daemon = icecore.serve(&[&vm], "")?;
    let second = icecore.command("serve").arg("--config").arg(daemon.config()).expect(3)?;
    assert!(second.stderr.contains("one runs"), "{}", second.stderr);
    let right = std::fs::read_to_string(daemon.config())?;
    std::fs::write(daemon.config(), "[vm.bare]\nwrong = 1\n")?;
    daemon.signal(Signal::HUP);
    wait_until("the refusal", Duration::from_secs(10), || {
        Ok(daemon.log()?.contains("stays as it was"))
    })?;
    let metrics = daemon.get("/metrics")?.body;
    assert!(metrics.contains("icecore_config_reloads_failed_total 1"), "{metrics}");
    // Its workers do not see the wrong one either.
    let job = daemon.submit("/v1/vms/bare/backups", "{}")?;
    daemon.wait_for(&job, "succeeded")?;
    std::fs::write(daemon.config(), right.replace("[vm.bare]", "[vm.renamed]"))?;
    daemon.signal(Signal::HUP);
    wait_until("the new one", Duration::from_secs(10), || {
        Ok(daemon.post("/v1/vms/bare/backups", "{}")?.status == 404)
    })?;
    assert!(!daemon.log()?.contains("next start"), "{}", daemon.log()?);
    std::fs::write(daemon.config(), right.replace("api.sock", "other.sock"))?;
    daemon.signal(Signal::HUP);
    wait_until("a word of what waits for a start", Duration::from_secs(10), || {
        Ok(daemon.log()?.contains("next start"))
    })
}

#[test]
fn what_can_be_refused_at_once_is_and_says_why() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let daemon = icecore.serve(&[&vm], "")?;
    let long = format!(r#"{{"label":"{}"}}"#, "x".repeat(5000));
    let huge = "x".repeat(300 << 10);
    let cases: &[(&str, &str, &str, u16)] = &[
        ("POST", "/v1/vms/none/backups", "{}", 404),
        ("POST", "/v1/vms/bare/backups", r#"{"unknown":1}"#, 400),
        ("POST", "/v1/vms/bare/backups", "{", 400),
        ("POST", "/v1/vms/bare/backups", "[]", 400),
        ("POST", "/v1/vms/bare/backups", r#"{"level":"sideways"}"#, 400),
        ("POST", "/v1/vms/bare/backups", r#"{"rate_limit":"fast"}"#, 400),
        ("POST", "/v1/vms/bare/backups", r#"{"rate_limit":"0"}"#, 400),
        ("POST", "/v1/vms/bare/backups", r#"{"disks":["../x"]}"#, 400),
        ("POST", "/v1/vms/bare/backups", r#"{"disks":["a"],"exclude_disks":["b"]}"#, 400),
        ("POST", "/v1/vms/bare/backups", r#"{"repo":"none"}"#, 404),
        ("POST", "/v1/vms/bare/backups", r#"{"repo":"/nowhere"}"#, 400),
        ("POST", "/v1/vms/bare/backups", r#"{"scratch":"relative"}"#, 400),
        ("POST", "/v1/vms/bare/backups", r#"{"description":"a\u0000b"}"#, 400),
        ("POST", "/v1/vms/bare/backups", &long, 400),
        ("POST", "/v1/vms/bare/backups", &huge, 413),
        ("POST", "/v1/vms/..%2Fx/backups", "{}", 400),
        ("POST", "/v1/vms/%FF/backups", "{}", 400),
        ("POST", "/v1/vms/bare/rollback", "{}", 400),
        ("POST", "/v1/vms/bare/rollback", r#"{"to":"latest"}"#, 404),
        ("POST", "/v1/vms/bare/rollback", r#"{"to":"--force"}"#, 400),
        ("POST", "/v1/points/latest/restore", r#"{"to":"relative"}"#, 400),
        ("POST", "/v1/points/latest/restore", r#"{"to":"/tmp/x"}"#, 404),
        ("POST", "/v1/check", r#"{"sample":101}"#, 400),
        ("POST", "/v1/copy", r#"{"all":true}"#, 400),
        ("POST", "/v1/copy", r#"{"to":"main"}"#, 400),
        ("POST", "/v1/copy", r#"{"to":"main","all":true,"vm":"bare"}"#, 400),
        ("POST", "/v1/copy", r#"{"to":"nowhere","all":true}"#, 404),
        ("POST", "/v1/copy", r#"{"to":"main","point":"--force"}"#, 400),
        ("GET", "/v1/jobs/none", "", 404),
        ("GET", "/v1/jobs/20250101000000-00000000", "", 404),
        ("GET", "/v1/jobs/..%2F..%2Fx/events", "", 404),
        ("POST", "/v1/jobs/20250101000000-00000000/cancel", "", 404),
        ("GET", "/v1/jobs?state=unheard", "", 400),
        ("GET", "/v1/points?repo=none", "", 404),
        ("GET", "/v1/points?unknown=1", "", 400),
        ("DELETE", "/v1/jobs", "", 405),
        ("GET", "/nowhere", "", 404),
    ];
    for (method, path, body, status) in cases {
        let answer = daemon.ask(method, path, body)?;
        let shown: String = body.chars().take(60).collect();
        assert_eq!(answer.status, *status, "{method} {path} {shown}: {answer:?}");
        let error = &answer.json()?["error"];
        for field in ["tried", "on", "why"] {
            let said = error[field].as_str().is_some_and(|text| !text.is_empty());
            assert!(said, "{method} {path} {shown}: {error}");
        }
    }
    assert_eq!(daemon.get("/v1/jobs")?.expect(200)?, json!([]), "nothing was begun");
    Ok(())
}

#[test]
fn every_answer_is_as_the_document_says_and_no_input_is_too_much() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let daemon = icecore.serve(&[&vm], "")?;
    let document = daemon.get("/openapi.json")?.expect(200)?;
    let job = daemon.submit("/v1/vms/bare/backups", "{}")?;
    daemon.wait_for(&job, "succeeded")?;
    let mut random = Random(0x1cec_0de5);
    let mut answers = 0;
    for (path, operations) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in operations.as_object().into_iter().flatten() {
            for round in 0..25 {
                let place = random.path(path, &job, round);
                let body = random.body(&document, operation, round);
                let answer = daemon.ask(&method.to_uppercase(), &place, &body)?;
                let about = format!("{method} {place} {body}: {answer:?}");
                assert!(answer.status < 500, "{about}");
                require_documented(&document, operation, &answer, &about)?;
                answers += 1;
            }
        }
    }
    assert!(answers >= 300, "{answers}");
    wait_until("the end of all jobs", Duration::from_secs(90), || {
        let all = daemon.get("/v1/jobs?state=queued")?.expect(200)?;
        for one in all.as_array().into_iter().flatten() {
            // Also what is to be tried again later.
            daemon.post(&format!("/v1/jobs/{}/cancel", text(one, "job")?), "")?;
        }
        let health = daemon.get("/healthz")?.expect(200)?;
        Ok(health["jobs_running"] == 0 && health["jobs_waiting"] == 0)
    })
}

/// A failure unless the document knows this status and its schema accepts the body.
fn require_documented(
    document: &Value,
    operation: &Value,
    answer: &icecore_tests::Answer,
    about: &str,
) -> Result<()> {
    let responses = &operation["responses"];
    let of_class = format!("{}XX", answer.status / 100);
    let known = [answer.status.to_string(), of_class];
    let Some(known) = known.iter().map(|name| &responses[name]).find(|one| !one.is_null()) else {
        return Err(Failure::new(format!("no such status in {responses}: {about}")));
    };
    let schema = &known["content"]["application/json"]["schema"];
    if schema.is_null() {
        return Ok(());
    }
    let whole = json!({ "allOf": [schema], "components": document["components"] });
    let validator = jsonschema::validator_for(&whole)
        .map_err(|e| Failure::new(format!("the document is no schema: {e}")))?;
    let instance = answer.json()?;
    let wrong: Vec<String> =
        validator.iter_errors(&instance).map(|e| format!("{}: {e}", e.instance_path())).collect();
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!("{wrong:?}: {about}")))
}

/// Inputs between right and absurd, the same in every run (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn scalar(&mut self) -> Value {
        match self.below(10) {
            0 => Value::Null,
            1 => json!(true),
            2 => json!(self.below(1 << 40)),
            3 => json!(-1.5e300),
            4 => json!("latest"),
            5 => json!("/nowhere/at/all"),
            6 => json!("4M"),
            7 => json!("\u{0}\u{202e}ü"),
            8 => json!(["d0", "", "../x"]),
            _ => json!({ "deep": [[[[[1]]]]] }),
        }
    }

    fn path(&mut self, template: &str, job: &str, round: usize) -> String {
        let names = ["bare", "none", "%00", "..", "%2e%2e%2f", "latest", "a%20b", "%F0%9F%A7%8A"];
        let right = |name: &str| if template.contains("/jobs/") { job.into() } else { name.into() };
        let name: String = match round {
            0 => right(if template.contains("/points/") { "latest" } else { "bare" }),
            _ => names[self.below(names.len() as u64) as usize].into(),
        };
        let mut path = template.to_owned();
        while let (Some(from), Some(to)) = (path.find('{'), path.find('}')) {
            path.replace_range(from..=to, &name);
        }
        let queries = ["", "", "?repo=main", "?vm=bare", "?state=failed", "?limit=-1", "?x=%FF"];
        path + queries[if round == 0 { 0 } else { self.below(queries.len() as u64) as usize }]
    }

    /// Fields that the document names, with values of any kind.
    fn body(&mut self, document: &Value, operation: &Value, round: usize) -> String {
        let body = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        let Some(name) = body.as_str().and_then(|place| place.rsplit('/').next()) else {
            return String::new();
        };
        let fields = &document["components"]["schemas"][name]["properties"];
        let names: Vec<&String> =
            fields.as_object().into_iter().flatten().map(|(n, _)| n).collect();
        let mut body = serde_json::Map::new();
        body.insert("dry_run".into(), json!(true));
        for _ in 0..self.below(4).min(round as u64) {
            let name = names[self.below(names.len() as u64) as usize];
            body.insert(name.clone(), self.scalar());
        }
        if !names.iter().any(|name| *name == "dry_run") {
            body.remove("dry_run");
        }
        match self.below(12) {
            0 if round > 0 => "{\"a\":".into(),
            _ => Value::Object(body).to_string(),
        }
    }
}

#[test]
fn over_tls_a_token_decides_what_may_be_done() -> Result<()> {
    let vm = bare("bare")?;
    let icecore = Icecore::new()?;
    let (key, certificate) = (icecore.path("tls.key"), icecore.path("tls.pem"));
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    openssl.args(["-nodes", "-days", "2", "-subj", "/CN=localhost"]);
    openssl.args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout"]);
    run(openssl.arg(&key).arg("-out").arg(&certificate))?;
    let mut more = String::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    more += &format!("listen = '127.0.0.1:{port}'\n");
    let (key, shown) = (key.display(), certificate.display());
    more += &format!("tls = {{ certificate = '{shown}', key = '{key}' }}\n");
    for role in ["read", "operate", "administer"] {
        let file = icecore.path(role);
        std::fs::write(&file, format!("{role}-0123456789-0123456789-0123456789\n"))?;
        run(Command::new("chmod").arg("600").arg(&file))?;
        more += &format!("[api.tokens.{role}]\nrole = '{role}'\nfile = '{}'\n", file.display());
    }
    let _daemon = icecore.serve(&[&vm], &more)?;
    let ask = |token: &str, method: &str, path: &str, body: &str| -> Result<String> {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-m", "30", "-o", "/dev/null", "-w", "%{http_code}", "-X", method]);
        curl.arg("--cacert").arg(&certificate).args(["-d", body, "-H"]);
        curl.arg(format!("Authorization: Bearer {token}"));
        let output = run(curl.arg(format!("https://127.0.0.1:{port}{path}")))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let token = |role: &str| format!("{role}-0123456789-0123456789-0123456789");
    let (backups, restore) = ("/v1/vms/bare/backups", "/v1/points/latest/restore");
    let cases = [
        ("nobody", "GET", "/v1/jobs", "", "401"),
        ("nobody", "GET", "/metrics", "", "401"),
        ("nobody", "GET", "/healthz", "", "200"),
        ("read", "GET", "/v1/jobs", "", "200"),
        ("read", "POST", backups, "{}", "403"),
        ("operate", "POST", backups, r#"{"vm":{"qmp":"/x"}}"#, "403"),
        ("operate", "POST", backups, r#"{"repo":"/etc"}"#, "403"),
        ("operate", "POST", restore, r#"{"to":"/etc/x"}"#, "403"),
        ("administer", "POST", restore, r#"{"to":"/tmp/x"}"#, "404"),
        ("operate", "POST", backups, r#"{"dry_run":true}"#, "202"),
    ];
    for (role, method, path, body, status) in cases {
        assert_eq!(ask(&token(role), method, path, body)?, status, "{role} {method} {path} {body}");
    }
    let mut plain = Command::new("curl");
    plain.args(["-s", "-m", "10"]).arg(format!("http://127.0.0.1:{port}/healthz"));
    assert!(run(&mut plain).is_err(), "answered without TLS");
    Ok(())
}
