//! The command line as a client of the daemon on this host: the same flags, the same output, the
//! same exit status.

use std::path::{Path, PathBuf};

use axum::http::{Method, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::Health;
use super::request::{InPlace, LibvirtDomain};
use crate::cli::{OK, VmArgs};
use crate::commands::job::Teller;
use crate::commands::vm::VmRow;
use crate::context::Context;
use crate::failure::{Failure, Outcome, Status};
use crate::interrupt::Interrupt;
use crate::job_view::{JobView, LOOK_INTERVAL};
use crate::output;
use crate::state::{JobState, jobs};

/// A longer answer is not the daemon's.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// The daemon of this host.
#[derive(Debug)]
pub struct Client<'a> {
    context: &'a Context,
    tried: String,
}

impl<'a> Client<'a> {
    /// Of the socket that the configuration names. `tried` says what for.
    pub fn new(context: &'a Context, tried: impl Into<String>) -> Self {
        Self { context, tried: tried.into() }
    }

    fn failed(&self, why: impl std::fmt::Display) -> Failure {
        Failure::failed(&self.tried, why)
    }

    async fn ask(&self, method: Method, path: &str, body: Vec<u8>) -> Outcome<Value> {
        let socket = &self.context.config.api.socket;
        let stream = UnixStream::connect(socket).await.map_err(|e| {
            self.failed(format!("no daemon answers on {}: {e}", socket.display()))
                .next("start it with 'systemctl start icecore', or leave --daemon out")
        })?;
        let failed = |e: hyper::Error| self.failed(format!("the daemon does not answer: {e}"));
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "icecore");
        let request = request.header("content-type", "application/json");
        let request = request.body(Full::new(Bytes::from(body))).map_err(|e| self.failed(e))?;
        let answer = sender.send_request(request).await.map_err(failed)?;
        let status = answer.status();
        let read = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        let bytes = read.map_err(|e| self.failed(e))?.to_bytes();
        let parsed: Value = serde_json::from_slice(&bytes).map_err(|e| self.failed(e))?;
        if status.is_success() { Ok(parsed) } else { Err(self.refusal(status, &parsed)) }
    }

    /// The daemon's error as if it had happened here.
    fn refusal(&self, status: StatusCode, answer: &Value) -> Failure {
        let error = &answer["error"];
        let text = |name: &str| error[name].as_str().map(ToOwned::to_owned);
        let why = text("why").unwrap_or_else(|| format!("the daemon answered {status}"));
        let mut failure = Failure::failed(text("tried").unwrap_or_else(|| self.tried.clone()), why);
        failure.status = match error["exit_status"].as_u64() {
            Some(2) => Status::Usage,
            Some(3) => Status::Refused,
            Some(4) => Status::Damaged,
            _ => Status::Failed,
        };
        failure.next = text("next");
        failure
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Outcome<T> {
        let answer = self.ask(Method::GET, path, Vec::new()).await?;
        serde_json::from_value(answer).map_err(|e| self.failed(e))
    }

    /// All jobs of the daemon's host, newest first.
    pub async fn jobs(&self) -> Outcome<Vec<JobView>> {
        self.get("/v1/jobs").await
    }

    /// Jobs that a query names, newest first.
    pub async fn jobs_where(&self, query: &str) -> Outcome<Vec<JobView>> {
        self.get(&format!("/v1/jobs?{query}")).await
    }

    /// Whether the daemon is there, and how much it has to do.
    pub async fn health(&self) -> Outcome<Health> {
        self.get("/healthz").await
    }

    /// The VMs and their points.
    pub async fn vms(&self) -> Outcome<Vec<VmRow>> {
        self.get("/v1/vms").await
    }

    /// One job.
    pub async fn job(&self, job: &str) -> Outcome<JobView> {
        self.get(&format!("/v1/jobs/{}", segment(job))).await
    }

    /// Asks a job to end.
    pub async fn cancel(&self, job: &str) -> Outcome<()> {
        let path = format!("/v1/jobs/{}/cancel", segment(job));
        self.ask(Method::POST, &path, Vec::new()).await.map(drop)
    }

    /// Asks for a job; its id.
    pub async fn submit(&self, path: &str, body: &impl Serialize) -> Outcome<String> {
        let body = serde_json::to_vec(body).map_err(|e| self.failed(e))?;
        let answer = self.ask(Method::POST, path, body).await?;
        let job = answer["job"].as_str().map(ToOwned::to_owned);
        job.ok_or_else(|| self.failed("the daemon named no job"))
    }

    /// Follows a job to its end. An interrupt that is listened for cancels it, as in place.
    pub async fn follow(&self, job: &str, interrupt: Option<&Interrupt>) -> Outcome<JobView> {
        let mut teller = Teller::new(self.context.quiet);
        let mut cancelled = false;
        loop {
            let view = self.job(job).await?;
            if view.is_over() {
                return Ok(view);
            }
            teller.tell(&view);
            if interrupt.is_some_and(Interrupt::is_set) && !cancelled {
                cancelled = true;
                // One that has just ended need not be cancelled.
                let _ = self.cancel(job).await;
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Asks for a job, follows it to its end and prints with `show` what the command would have
    /// printed. Without waiting (`--detach`), only its id.
    pub async fn run<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        show: impl FnOnce(&Context, T) -> Outcome<()>,
    ) -> Outcome<u8> {
        let interrupt = Interrupt::listen()?;
        let job = self.submit(path, body).await?;
        if self.context.detach {
            match self.context.json {
                true => output::json(&serde_json::json!({ "job": job }))?,
                false => output::print(&format!("{job}\n"))?,
            }
            return Ok(OK);
        }
        let view = self.follow(&job, Some(&interrupt)).await?;
        let failure = failure_of(&self.tried, &view);
        if let Some(result) = view.record.result {
            match (self.context.json, jobs::left_out(&result)) {
                (true, _) => output::json(&result)?,
                (false, Some(why)) => output::print(&format!("job {job} has ended: {why}\n"))?,
                (false, None) => {
                    show(self.context, serde_json::from_value(result).map_err(|e| self.failed(e))?)?
                }
            }
        }
        failure.map_or(Ok(OK), Err)
    }
}

/// The failure of a job, as if it had happened here.
fn failure_of(tried: &str, view: &JobView) -> Option<Failure> {
    if view.state == JobState::Succeeded {
        return None;
    }
    let why = view.record.failure_reason.clone().unwrap_or_else(|| view.state.word().into());
    let mut failure = Failure::failed(tried, why);
    failure.status = match view.record.exit_status {
        Some(2) => Status::Usage,
        Some(3) => Status::Refused,
        Some(4) => Status::Damaged,
        Some(130) => Status::Interrupted,
        _ => Status::Failed,
    };
    failure.next.clone_from(&view.record.next);
    Some(failure)
}

/// A part of a path, with everything escaped that is not plainly a letter, a digit or a dash.
pub fn segment(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => out.push(char::from(byte)),
            // Writing to a string does not fail.
            _ => drop(write!(out, "%{byte:02X}")),
        }
        out
    })
}

/// The VM as the daemon has to be told it: its name, and how it is reached where that is not in
/// the configuration.
pub fn vm(args: &VmArgs, tried: &str) -> Outcome<(String, Option<InPlace>)> {
    if let Some(name) = &args.vm {
        return Ok((name.clone(), None));
    }
    let libvirt = match args.libvirt.as_slice() {
        [uri, domain] => {
            Some(LibvirtDomain { uri: uri.clone(), domain: domain.clone(), capture: args.capture })
        }
        _ => None,
    };
    // A domain's points are kept under its name, which its UUID does not tell.
    let by_name = |domain: &&LibvirtDomain| domain.domain.matches('-').count() != 4;
    let domain = libvirt.as_ref().filter(by_name).map(|domain| &domain.domain);
    let Some(name) = args.name.as_ref().or(domain) else {
        return Err(Failure::usage(tried, "no VM is named").next("add --name NAME"));
    };
    let path =
        |path: &Option<PathBuf>| path.as_deref().map(|path| absolute(path, tried)).transpose();
    let image = args.image.iter().map(|image| match image.split_once('=') {
        Some((id, file)) => Ok(format!("{id}={}", absolute(Path::new(file), tried)?)),
        None => absolute(Path::new(image), tried),
    });
    let image = image.collect::<Outcome<_>>()?;
    Ok((
        name.clone(),
        Some(InPlace { qmp: path(&args.qmp)?, qga: path(&args.qga)?, libvirt, image }),
    ))
}

/// The repository as the daemon has to be told it: its configured name, or an absolute path.
pub fn repo(context: &Context, repo: &str, tried: &str) -> Outcome<String> {
    match context.config.repository.contains_key(repo) {
        true => Ok(repo.to_owned()),
        false => absolute(Path::new(repo), tried),
    }
}

/// A path as the daemon, which has another working directory, has to be told it.
pub fn absolute(path: &Path, tried: &str) -> Outcome<String> {
    let path = std::path::absolute(path).map_err(|e| Failure::usage(tried, e))?;
    let text = path.to_str().map(ToOwned::to_owned);
    text.ok_or_else(|| Failure::usage(tried, format!("{} is no UTF-8", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_in_a_name_becomes_a_part_of_the_path() {
        assert_eq!(segment("web-1"), "web-1");
        assert_eq!(segment("a/b ü?"), "a%2Fb%20%C3%BC%3F");
    }
}
