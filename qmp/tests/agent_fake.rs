//! The agent's channel against agents that hang, are late, or answer out of step.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::Duration;

use icecore_qmp::QmpError;
use icecore_qmp::agent::{Agent, FreezeStatus};
use icecore_qmp::testing::{Act, Fake, Request};
use serde_json::json;

const DEADLINE: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_millis(150);

async fn agent(
    script: impl FnMut(&Request) -> Option<Vec<Act>> + Send + 'static,
) -> (Agent, Fake, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("qga");
    let fake = Fake::agent(&path, script).unwrap();
    (Agent::connect(&path, DEADLINE).await.unwrap(), fake, folder)
}

fn healthy(request: &Request) -> Option<Vec<Act>> {
    let answer = match request.name.as_str() {
        "guest-ping" => json!({}),
        "guest-fsfreeze-freeze" | "guest-fsfreeze-thaw" => json!(2),
        "guest-fsfreeze-status" => json!("thawed"),
        "guest-get-fsinfo" => {
            json!([{"name": "vda1", "mountpoint": "/", "type": "ext4", "disk": [], "new": 1}])
        }
        "guest-info" => json!({"version": "10.0.2", "supported_commands": [
            {"name": "guest-ping", "enabled": true, "success-response": true},
            {"name": "guest-exec", "enabled": false}]}),
        _ => return None,
    };
    Some(vec![Act::Return(answer)])
}

#[tokio::test]
async fn a_healthy_agent_is_understood() {
    let (mut agent, _fake, _folder) = agent(healthy).await;
    agent.ping(DEADLINE).await.unwrap();
    assert_eq!(agent.freeze(DEADLINE).await.unwrap(), 2);
    assert_eq!(agent.thaw(DEADLINE).await.unwrap(), 2);
    assert_eq!(agent.freeze_status(DEADLINE).await.unwrap(), FreezeStatus::Thawed);
    assert_eq!(agent.filesystems(DEADLINE).await.unwrap()[0].kind, "ext4");
    let info = agent.info(DEADLINE).await.unwrap();
    assert!(info.allows("guest-ping") && !info.allows("guest-exec") && !info.allows("x"));
    let error = agent.execute_raw("guest-x", json!({}), DEADLINE).await.unwrap_err();
    assert!(error.is_unknown_command(), "{error}");
}

#[tokio::test]
async fn an_agent_that_never_answers_was_never_asked_to_freeze() {
    let (sender, mut asked) = tokio::sync::mpsc::unbounded_channel();
    let (mut agent, _fake, _folder) = agent(move |request| {
        sender.send(request.name.clone()).unwrap();
        Some(vec![])
    })
    .await;
    let error = agent.freeze(SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::AgentSilent { .. }), "{error}");
    assert!(!error.outcome_unknown());
    assert_eq!(asked.try_recv().unwrap(), "guest-sync-delimited");
    assert!(asked.try_recv().is_err());
}

#[tokio::test]
async fn a_freeze_that_answers_late_is_thawed_by_the_next_call() {
    let (mut agent, _fake, _folder) = agent(|request| match request.name.as_str() {
        "guest-fsfreeze-freeze" => Some(vec![Act::Wait(SOON * 3), Act::Return(json!(7))]),
        _ => healthy(request),
    })
    .await;
    let error = agent.freeze(SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
    let error = agent.thaw(SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::AgentSilent { .. }), "still in the freeze: {error}");
    assert_eq!(agent.thaw(DEADLINE).await.unwrap(), 2, "7 would be the freeze's own answer");
}

#[tokio::test]
async fn a_call_given_up_by_its_caller_leaves_no_answer_behind() {
    let (mut agent, _fake, _folder) = agent(|request| match request.name.as_str() {
        "guest-ping" => Some(vec![Act::Wait(SOON * 2), Act::Return(json!({"stale": 1}))]),
        _ => healthy(request),
    })
    .await;
    assert!(tokio::time::timeout(SOON, agent.ping(DEADLINE)).await.is_err());
    assert_eq!(agent.freeze_status(DEADLINE).await.unwrap(), FreezeStatus::Thawed);
}

#[tokio::test]
async fn stale_and_wrong_synchronisations_are_drained() {
    let (mut agent, _fake, _folder) = agent(|request| match request.name.as_str() {
        "guest-sync-delimited" => Some(vec![
            Act::Raw(b"{\"return\": 5}\n{\"half an ans".to_vec()),
            Act::Raw(b"\xff{\"return\": 12345}\n".to_vec()),
            Act::Raw(b"\xff garbage \xff\xff".to_vec()),
            Act::Return(request.arguments["id"].clone()),
        ]),
        _ => healthy(request),
    })
    .await;
    assert_eq!(agent.freeze_status(DEADLINE).await.unwrap(), FreezeStatus::Thawed);
}

#[tokio::test]
async fn an_agent_that_knows_only_a_wrong_id_is_silent() {
    let (mut agent, _fake, _folder) = agent(|request| {
        (request.name == "guest-sync-delimited")
            .then(|| vec![Act::Raw(b"\xff{\"return\": 1}\n".to_vec())])
    })
    .await;
    let error = agent.ping(SOON).await.unwrap_err();
    assert!(matches!(error, QmpError::AgentSilent { .. }), "{error}");
}

#[tokio::test]
async fn an_answer_nobody_asked_for_is_not_the_next_answer() {
    let (mut agent, _fake, _folder) = agent(|request| match request.name.as_str() {
        "guest-ping" => Some(vec![Act::Return(json!({})), Act::Return(json!("frozen"))]),
        _ => healthy(request),
    })
    .await;
    for _ in 0..3 {
        agent.ping(DEADLINE).await.unwrap();
        assert_eq!(agent.freeze_status(DEADLINE).await.unwrap(), FreezeStatus::Thawed);
    }
}

#[tokio::test]
async fn garbage_and_bombs_are_errors_and_then_forgotten() {
    let mut answers = vec![
        b"garbage\n".to_vec(),
        b"{\"a\":".repeat(1000),
        [b"{\"return\": \"".to_vec(), vec![b'x'; 2 << 20], b"\"}\n".to_vec()].concat(),
    ];
    let (mut agent, _fake, _folder) = agent(move |request| match request.name.as_str() {
        "guest-ping" => Some(vec![Act::Raw(answers.pop()?)]),
        _ => healthy(request),
    })
    .await;
    for _ in 0..3 {
        let error = agent.ping(DEADLINE).await.unwrap_err();
        assert!(matches!(error, QmpError::Content { .. }), "{error}");
        assert_eq!(agent.freeze_status(DEADLINE).await.unwrap(), FreezeStatus::Thawed);
    }
}

#[tokio::test]
async fn refusals_while_frozen_are_told() {
    let (mut agent, _fake, _folder) = agent(|request| match request.name.as_str() {
        "guest-get-fsinfo" => {
            let desc = "Command guest-get-fsinfo has been disabled: the agent is in frozen state";
            Some(vec![Act::Error("CommandNotFound", desc.into())])
        }
        _ => healthy(request),
    })
    .await;
    let error = agent.filesystems(DEADLINE).await.unwrap_err();
    assert!(error.refusal().unwrap().contains("frozen"), "{error}");
}

#[tokio::test]
async fn a_channel_that_closes_is_closed() {
    let (mut agent, _fake, _folder) = agent(|request| match request.name.as_str() {
        "guest-ping" => Some(vec![Act::Close]),
        _ => healthy(request),
    })
    .await;
    let error = agent.ping(DEADLINE).await.unwrap_err();
    assert!(error.is_closed(), "{error}");
    let error = agent.ping(DEADLINE).await.unwrap_err();
    assert!(error.is_closed(), "{error}");
}
