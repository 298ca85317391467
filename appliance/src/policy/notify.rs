//! Who is told of what. The decision is pure; the sender is thin, has a deadline, and never fails
//! the job that it speaks of.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;

use super::schedule::MissedRun;
use crate::config::{NotifyConfig, NotifyOn};

/// A message that has not gone out by then does not go out.
const DEADLINE: Duration = Duration::from_secs(15);
/// How often a mail program is asked whether it has ended.
const POLL: Duration = Duration::from_millis(50);
/// curl ends before we end it, and takes an answer other than success for a failure.
const CURL: [&str; 8] =
    ["--silent", "--fail", "--max-time", "12", "--output", "/dev/null", "--config", "-"];
/// Reasons for reading a disk whole that are no fallback: nobody could have expected less.
const NO_FALLBACK: [&str; 2] = ["FirstPoint", "Requested"];

/// Something that an operator may want to be told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// A run failed.
    Failed {
        /// What was tried.
        tried: &'a str,
        /// Why it failed.
        why: &'a str,
        /// What to do next.
        next: Option<&'a str>,
    },
    /// A disk was read whole.
    ReadWhole {
        /// The disk.
        disk: &'a str,
        /// The reason's name.
        reason: &'a str,
        /// The point.
        point: &'a str,
    },
    /// A run was not begun at its time.
    Missed(&'a MissedRun),
}

/// What is sent; a webhook gets it as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Which kind of event.
    pub event: NotifyOn,
    /// The VM, where there is one.
    pub vm: Option<String>,
    /// One line.
    pub subject: String,
    /// The whole of it.
    pub text: String,
    /// The host.
    pub host: String,
    /// When.
    pub at: Timestamp,
}

/// The message for an event; none where nobody wants to be told of it.
pub fn message(
    config: &NotifyConfig,
    event: &Event<'_>,
    vm: Option<&str>,
    host: &str,
    at: Timestamp,
) -> Option<Message> {
    let (kind, subject, text) = match event {
        Event::Failed { tried, why, next } => {
            let next = next.map_or_else(String::new, |next| format!("\nnext: {next}"));
            (NotifyOn::Failure, format!("cannot {tried}"), format!("{why}{next}"))
        }
        Event::ReadWhole { reason, .. } if NO_FALLBACK.contains(reason) => return None,
        Event::ReadWhole { disk, reason, point } => {
            let subject = format!("disk {disk} was read whole: {reason}");
            let text = format!(
                "The changes of disk {disk} since the point before could not be trusted \
                 ({reason}), so all of it was read for point {point}. The point is good."
            );
            (NotifyOn::Fallback, subject, text)
        }
        Event::Missed(run) => {
            let subject = format!("{} missed its run of schedule {}", run.vm, run.schedule);
            let outcome = if run.made_up { "it begins now" } else { "it is left out" };
            let text = format!("The run of {} was not begun at its time; {outcome}.", run.moment);
            (NotifyOn::Missed, subject, text)
        }
    };
    let wanted = config.on.contains(&kind);
    let one_line = |text: String| text.replace(char::is_control, " ");
    wanted.then(|| Message {
        event: kind,
        vm: vm.map(ToOwned::to_owned),
        subject: one_line(format!("icecore: {subject}")),
        text,
        host: host.to_owned(),
        at,
    })
}

/// A message as a mail with its header.
pub fn mail(config: &NotifyConfig, message: &Message) -> String {
    let from = config.from.clone().unwrap_or_else(|| format!("icecore@{}", message.host));
    let date = message.at.strftime("%a, %d %b %Y %H:%M:%S +0000");
    let vm = message.vm.as_deref().map_or_else(String::new, |vm| format!("VM: {vm}\n"));
    format!(
        "From: {from}\nTo: {}\nSubject: {}\nDate: {date}\nMIME-Version: 1.0\n\
         Content-Type: text/plain; charset=utf-8\n\n{}\n\nHost: {}\n{vm}Time: {}\n",
        config.mail.join(", "),
        message.subject,
        message.text,
        message.host,
        message.at
    )
}

/// Tells whoever wants to be told; what does not go out is only said in the log.
pub fn tell(config: Option<&NotifyConfig>, event: &Event<'_>, vm: Option<&str>) {
    let Some(config) = config else { return };
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let Some(message) = message(config, event, vm, &host, Timestamp::now()) else { return };
    if let Some(url) = &config.webhook
        && let Err(why) = post(url, &message)
    {
        tracing::warn!("the webhook was not told: {why}");
    }
    if !config.mail.is_empty()
        && let Err(why) = send(&config.sendmail, &mail(config, &message))
    {
        tracing::warn!("no mail was sent: {why}");
    }
}

/// A webhook is called by curl, which knows the host's certificates and proxies. All it needs comes
/// on its standard input: the URL of a webhook is a secret, and arguments are seen by everyone.
fn post(url: &str, message: &Message) -> Result<(), String> {
    let body = serde_json::to_string(message).map_err(|e| e.to_string())?;
    let mut program = vec!["curl".to_owned()];
    program.extend(CURL.map(ToOwned::to_owned));
    send(&program, &curl_config(url, &body))
}

fn curl_config(url: &str, body: &str) -> String {
    let quoted = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let (url, body) = (quoted(url), quoted(body));
    format!("url = \"{url}\"\nheader = \"Content-Type: application/json\"\ndata-raw = \"{body}\"\n")
}

fn send(program: &[String], input: &str) -> Result<(), String> {
    let (name, arguments) = program.split_first().ok_or("no program is configured")?;
    let mut command = Command::new(name);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|e| format!("{name}: {e}"))?;
    let stdin = child.stdin.take();
    let input = input.to_owned();
    // A program that does not read must not hold this thread.
    std::thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes())));
    let until = Instant::now() + DEADLINE;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("{name} ended with {status}")),
            Ok(None) if Instant::now() < until => std::thread::sleep(POLL),
            Ok(None) | Err(_) => {
                // It may end by itself just now; either way it is over.
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{name} did not end within {} s", DEADLINE.as_secs()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(on: Vec<NotifyOn>) -> NotifyConfig {
        let text = "mail = ['a@example.org', 'b@example.org']";
        NotifyConfig { on, ..toml::from_str(text).unwrap() }
    }

    const FAILED: Event<'_> =
        Event::Failed { tried: "back up vm1 to\nmain", why: "it is full", next: Some("make room") };

    fn of(on: Vec<NotifyOn>, event: &Event<'_>) -> Option<Message> {
        let at = "2026-11-20T01:30:00Z".parse().unwrap();
        message(&config(on), event, Some("vm1"), "host1", at)
    }

    #[test]
    fn only_what_is_wanted_is_told() {
        let all = vec![NotifyOn::Failure, NotifyOn::Fallback, NotifyOn::Missed];
        assert!(of(all.clone(), &FAILED).is_some());
        assert_eq!(of(vec![NotifyOn::Missed], &FAILED), None);
        let whole = |reason| Event::ReadWhole { disk: "vda", reason, point: "p" };
        assert!(of(all.clone(), &whole("BitmapMissing")).is_some());
        assert_eq!(of(all.clone(), &whole("FirstPoint")), None);
        assert_eq!(of(all.clone(), &whole("Requested")), None);
        let moment = "2026-11-20T01:30:00Z".parse().unwrap();
        let (schedule, vm) = ("nightly".into(), "vm1".into());
        let missed = MissedRun { schedule, vm, moment, made_up: false };
        let told = of(all, &Event::Missed(&missed)).unwrap();
        assert!(told.subject.contains("nightly") && told.text.contains("left out"));
    }

    #[test]
    fn a_mail_has_a_header_that_no_message_can_break() {
        let message = of(vec![NotifyOn::Failure], &FAILED).unwrap();
        let mail = mail(&config(vec![NotifyOn::Failure]), &message);
        let (header, body) = mail.split_once("\n\n").unwrap();
        assert!(header.contains("To: a@example.org, b@example.org\n"), "{header}");
        assert!(header.contains("Subject: icecore: cannot back up vm1 to main\n"), "{header}");
        assert!(header.contains("From: icecore@host1\n"), "{header}");
        assert!(body.contains("it is full") && body.contains("VM: vm1"), "{body}");
    }

    #[test]
    fn nothing_in_a_message_ends_curls_string() {
        let config = curl_config("http://h/\"x", r#"{"a":"b\"c"}"#);
        assert!(config.contains(r#"url = "http://h/\"x""#), "{config}");
        assert!(config.contains(r#"data-raw = "{\"a\":\"b\\\"c\"}""#), "{config}");
        assert_eq!(config.lines().count(), 3);
    }

    #[test]
    fn a_mail_program_gets_the_mail_and_its_failure_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("mail");
        let shell = |line: String| vec!["/bin/sh".to_owned(), "-c".to_owned(), line];
        send(&shell(format!("cat > {}", file.display())), "a mail").unwrap();
        assert_eq!(std::fs::read_to_string(file).unwrap(), "a mail");
        assert!(send(&shell("exit 3".into()), "a mail").unwrap_err().contains('3'));
        assert!(send(&["/nowhere/sendmail".to_owned()], "a mail").is_err());
    }
}
