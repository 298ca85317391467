//! What the grammar cannot say: names that lead somewhere, and keys that belong together.

use icecore_repository::{DiskId, VmName};

use super::load::{Places, Problem};
use crate::libvirt::CaptureForm;

use super::{ApiConfig, Config, NotifyConfig, Pattern, Reference, ScheduleConfig, VmConfig};

/// Everything that is wrong with a configuration that could be read.
pub(super) fn problems(config: &Config, places: &Places) -> Vec<Problem> {
    let mut all = Findings { config, places, problems: Vec::new() };
    for (name, repository) in &config.repository {
        let table = format!("repository.{name}");
        all.require(!repository.url.is_empty(), &table, || "its url is empty".into());
        let absolute = repository.key_file.as_ref().is_none_or(|file| file.is_absolute());
        all.require(absolute, &table, || "key_file is no absolute path".into());
    }
    for (name, vm) in &config.vm {
        all.vm(name, vm);
    }
    for (name, schedule) in &config.schedule {
        all.schedule(&format!("schedule.{name}"), schedule);
    }
    for (name, quota) in &config.quota {
        let table = format!("quota.{name}");
        let some = quota.points.is_some() || quota.gigabytes.is_some();
        all.require(some, &table, || "it limits nothing: give points or gigabytes".into());
        let size = quota.gigabytes.is_none_or(|size| size.is_finite() && size >= 0.0);
        all.require(size, &table, || "gigabytes is no size".into());
        let used = config.vm.values().any(|vm| vm.project.as_ref() == Some(name));
        all.require(used, &table, || format!("no VM has project = \"{name}\""));
    }
    let limits = &config.limits;
    all.require(limits.jobs > 0, "limits", || "with jobs = 0 nothing would ever run".into());
    all.require(limits.jobs_per_repository != Some(0), "limits", || {
        "with jobs_per_repository = 0 nothing would ever run".into()
    });
    if let Some(notify) = &config.notify {
        all.notify(notify);
    }
    all.api(&config.api);
    all.problems
}

struct Findings<'a> {
    config: &'a Config,
    places: &'a Places,
    problems: Vec<Problem>,
}

impl Findings<'_> {
    fn require(&mut self, holds: bool, table: &str, what: impl FnOnce() -> String) {
        if !holds {
            self.problems.push(self.places.problem(table, None, what()));
        }
    }

    fn require_at(&mut self, holds: bool, table: &str, at: &Reference, what: String) {
        if !holds {
            self.problems.push(self.places.problem(table, Some(at.span()), what));
        }
    }

    fn vm(&mut self, name: &str, vm: &VmConfig) {
        let table = format!("vm.{name}");
        if let Err(error) = VmName::new(name) {
            self.require(false, &table, || error.to_string());
        }
        let both = vm.qmp.is_some() && !vm.image.is_empty();
        self.require(!both, &table, || "it has qmp and image, and can have one of them".into());
        // A domain of the libvirt may have a table, too: for its project, disks, restart command.
        let domain = self.config.libvirt.as_ref().is_some_and(|libvirt| libvirt.has(name));
        let reached = vm.qmp.is_some() || !vm.image.is_empty() || domain;
        self.require(reached, &table, || "it needs either qmp or image".into());
        let agent_reached = vm.qga.is_none() || vm.qmp.is_some();
        self.require(agent_reached, &table, || "qga without qmp is of no use".into());
        let of_libvirt = domain && vm.qmp.is_none() && vm.image.is_empty();
        let captured = vm.capture == CaptureForm::Job || of_libvirt;
        self.require(captured, &table, || "capture is for a domain of the libvirt".into());
        for disk in &vm.disks {
            if let Err(error) = disk.parse::<DiskId>() {
                self.require(false, &table, || error.to_string());
            }
        }
        self.require(vm.image.iter().all(|image| !image.is_empty()), &table, || {
            "an image has no file: write [ID=]FILE".into()
        });
    }

    fn schedule(&mut self, table: &str, schedule: &ScheduleConfig) {
        let one = schedule.calendar.is_some() != schedule.cron.is_some();
        self.require(one, table, || "it needs either cron or calendar".into());
        self.require(!schedule.vms.is_empty(), table, || "vms is empty".into());
        self.require(schedule.concurrency > 0, table, || {
            "with concurrency = 0 nothing would ever run".into()
        });
        let known = self.config.repository.contains_key(&*schedule.repository);
        let what = format!("there is no [repository.{}]", &*schedule.repository);
        self.require_at(known, table, &schedule.repository, what);
        for vm in &schedule.vms {
            let what = format!("there is no [vm.{}]", &**vm);
            self.require_at(self.is_known(vm), table, vm, what);
        }
        if let Some(keep) = &schedule.retention {
            self.require(!keep.is_empty(), table, || {
                "its retention keeps nothing: give last, hourly, daily, weekly, monthly or yearly"
                    .into()
            });
        }
    }

    /// A VM is known by its table, or may be a domain of the libvirt.
    fn is_known(&self, name: &str) -> bool {
        let domain = || self.config.libvirt.as_ref().is_some_and(|libvirt| libvirt.has(name));
        !Pattern::of(name).is_plain() || self.config.vm.contains_key(name) || domain()
    }

    fn notify(&mut self, notify: &NotifyConfig) {
        let told = notify.webhook.is_some() || !notify.mail.is_empty();
        self.require(told, "notify", || "it tells nobody: give webhook or mail".into());
        self.require(!notify.sendmail.is_empty(), "notify", || "sendmail is empty".into());
        let addresses = notify.mail.iter().chain(&notify.from);
        // A line break in an address would be a header of its own.
        for address in addresses.filter(|a| !a.contains('@') || a.chars().any(char::is_control)) {
            self.require(false, "notify", || format!("{address:?} is no mail address"));
        }
        if let Some(url) = &notify.webhook {
            let http = url.starts_with("http://") || url.starts_with("https://");
            self.require_at(http, "notify", url, format!("'{}' is no http(s) URL", &**url));
        }
    }

    fn api(&mut self, api: &ApiConfig) {
        let Some(listen) = &api.listen else { return };
        let address = listen.parse::<std::net::SocketAddr>().is_ok();
        let what = format!("'{}' is no ADDRESS:PORT", &**listen);
        self.require_at(address, "api", listen, what);
        let what = "listen needs [api.tls] with certificate and key".to_owned();
        self.require_at(api.tls.is_some(), "api", listen, what);
        let what = "listen needs at least one [api.tokens.NAME]: nobody could come in".to_owned();
        self.require_at(!api.tokens.is_empty(), "api", listen, what);
    }
}

#[cfg(test)]
mod tests {
    use crate::config::load;

    fn problems(text: &str) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("icecore.toml");
        std::fs::write(&path, text).unwrap();
        load(Some(&path))
            .unwrap()
            .problems
            .into_iter()
            .map(|p| format!("{} {}", p.line, p.what))
            .collect()
    }

    const GOOD: &str = "[repository.main]\nurl = '/r'\n[vm.a]\nqmp = '/a'\n[schedule.s]\n";

    #[test]
    fn references_name_their_line() {
        let text =
            format!("{GOOD}calendar = 'daily'\nvms = [\n 'a',\n 'b' ]\nrepository = 'other'\n");
        assert_eq!(problems(&text), ["10 there is no [repository.other]", "9 there is no [vm.b]"]);
    }

    #[test]
    fn a_domain_of_libvirt_or_a_pattern_is_no_unknown_vm() {
        let text = format!("{GOOD}cron = '@daily'\nvms = ['w*', 'dom']\nrepository = 'main'\n");
        assert_eq!(problems(&text), ["7 there is no [vm.dom]"]);
        assert_eq!(problems(&format!("{text}[libvirt]\n")), [""; 0]);
        assert_eq!(
            problems(&format!("{text}[libvirt]\nexclude = ['d*']\n")),
            ["7 there is no [vm.dom]"]
        );
    }

    #[test]
    fn values_that_are_none_name_their_line() {
        for (line, about) in [
            ("calendar = 'every now and then'", "6"),
            ("cron = '61 * * * *'", "6"),
            ("timezone = 'Europe/Nowhere'", "6"),
            ("missed = 'perhaps'", "6"),
            ("window = ['25:00-26:00']", "6"),
            ("jitter = 'long'", "6"),
            ("retention = { lats = 3 }", "6"),
        ] {
            let found = problems(&format!("{GOOD}{line}\nvms = ['a']\nrepository = 'main'\n"));
            assert!(found.len() == 1 && found[0].starts_with(about), "{line}: {found:?}");
        }
    }

    #[test]
    fn what_belongs_together() {
        for (text, about) in [
            ("[vm.x]\nqga = '/q'\n", "either qmp or image"),
            ("[vm.x]\nqmp = '/q'\ncapture = 'direct'\n", "domain of the libvirt"),
            ("[vm.'a/b']\nqmp = '/q'\n", "1 "),
            ("[repository.r]\nurl = '/r'\nkey_file = 'k'\n", "absolute"),
            ("[quota.p]\npoints = 3\n", "no VM has project"),
            ("[quota.p]\ngigabytes = nan\n", "no size"),
            ("[limits]\njobs = 0\n", "jobs = 0"),
            ("[notify]\n", "tells nobody"),
            ("[notify]\nmail = [\"a@b\\nBcc: c@d\"]\n", "no mail address"),
            ("[notify]\nwebhook = 'ftp://x'\n", "2 'ftp://x'"),
            ("[api]\nlisten = '0.0.0.0:1'\n", "tls"),
            ("[schedule.s]\nvms = []\nrepository = 'r'\n", "cron or calendar"),
        ] {
            let found = problems(text);
            assert!(found.iter().any(|one| one.contains(about)), "{text}: {found:?}");
        }
    }
}
