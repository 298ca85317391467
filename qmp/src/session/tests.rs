//! The session against hand-written peers and against a model of one.

use super::*;
use crate::testing::GREETING;
use proptest::prelude::*;

fn drain(session: &mut Session) -> Vec<Value> {
    let mut sent = Vec::new();
    while !session.transmit().is_empty() {
        sent.extend_from_slice(session.transmit());
        session.transmitted(session.transmit().len());
    }
    let lines = sent.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
}

fn ready() -> Session {
    let mut session = Session::new(7);
    assert_eq!(session.feed(GREETING.as_bytes()), Ok(vec![]));
    let sent = drain(&mut session);
    assert_eq!(sent, [json!({"execute": "qmp_capabilities", "id": "icecore-00000007-0"})]);
    let outputs = session.feed(b"{\"return\": {}, \"id\": \"icecore-00000007-0\"}").unwrap();
    let version = QemuVersion { major: 10, minor: 0, micro: 2 };
    assert_eq!(outputs, [Output::Ready(version)]);
    session
}

fn run(session: &mut Session, name: &str) -> (CommandId, Value) {
    let id = session.execute(name, Map::new()).unwrap();
    let sent = drain(session);
    assert_eq!(sent.len(), 1);
    (id, sent[0]["id"].clone())
}

fn success(id: &Value, value: Value) -> Vec<u8> {
    json!({"return": value, "id": id}).to_string().into_bytes()
}

#[test]
fn nothing_is_sent_before_the_greeting_and_no_command_before_the_negotiation() {
    let mut session = Session::new(7);
    session.execute("stop", Map::new()).unwrap();
    assert!(session.transmit().is_empty());
    session.feed(GREETING.as_bytes()).unwrap();
    assert_eq!(drain(&mut session).len(), 1);
    session.feed(b"{\"return\": {}, \"id\": \"icecore-00000007-0\"}").unwrap();
    assert_eq!(drain(&mut session)[0]["execute"], "stop");
}

#[test]
fn a_second_greeting_does_no_harm_before_the_negotiation_and_ends_the_session_after_it() {
    let mut session = Session::new(7);
    session.feed(GREETING.repeat(2).as_bytes()).unwrap();
    assert_eq!(drain(&mut session).len(), 1);
    session.feed(GREETING.as_bytes()).unwrap();
    let answer = success(&json!("icecore-00000007-0"), json!({}));
    assert!(matches!(session.feed(&answer).unwrap()[..], [Output::Ready(_)]));
    assert!(matches!(session.feed(GREETING.as_bytes()), Err(SessionError::Unexpected(_))));
}

#[test]
fn answers_go_to_their_questions_in_any_order() {
    let mut session = ready();
    let (first, first_wire) = run(&mut session, "a");
    let (second, second_wire) = run(&mut session, "b");
    let error = json!({"error": {"class": "GenericError", "desc": "no"}, "id": second_wire});
    let mut bytes = error.to_string().into_bytes();
    bytes.extend(success(&first_wire, json!(1)));
    let refused = Failure { class: "GenericError".into(), desc: "no".into() };
    let expected = [Output::Reply(second, Err(refused)), Output::Reply(first, Ok(json!(1)))];
    assert_eq!(session.feed(&bytes).unwrap(), expected);
    assert_eq!(session.pending(), 0);
}

#[test]
fn a_cancelled_command_is_withdrawn_or_buried() {
    let mut session = ready();
    let unsent = session.execute("a", Map::new()).unwrap();
    assert_eq!(session.cancel(unsent), Withdrawn::Yes);
    assert!(session.transmit().is_empty());
    let begun = session.execute("b", Map::new()).unwrap();
    session.transmitted(1);
    assert_eq!(session.cancel(begun), Withdrawn::No);
    let rest = session.transmit().len();
    assert!(rest > 0, "half a command must not stay half");
    session.transmitted(rest);
    let (sent, wire) = run(&mut session, "c");
    assert_eq!(session.cancel(sent), Withdrawn::No);
    assert_eq!(session.feed(&success(&wire, json!(3))), Ok(vec![Output::Late(sent, Ok(json!(3)))]));
    assert_eq!(session.pending(), 1, "the other tombstone stays");
}

#[test]
fn replies_of_nobody_are_dropped_up_to_a_limit() {
    let mut session = ready();
    let (id, wire) = run(&mut session, "a");
    let strays = [
        success(&json!("libvirt-12"), json!({})),
        success(&json!(1), json!({})),
        success(&json!("icecore-00000008-1"), json!({})),
        success(&json!("icecore-00000007-99"), json!({})),
        b"{\"return\": {}}".to_vec(),
        b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}".to_vec(),
    ];
    for stray in &strays {
        assert_eq!(session.feed(stray), Ok(vec![]));
    }
    let answer = success(&wire, json!(1));
    assert_eq!(session.feed(&answer), Ok(vec![Output::Reply(id, Ok(json!(1)))]));
    assert_eq!(session.feed(&answer), Ok(vec![]), "a second answer to one question");
    let flood = strays[0].repeat(MAX_STRAYS as usize);
    assert_eq!(session.feed(&flood), Err(SessionError::OutOfStep));
}

#[test]
fn an_answer_to_what_was_not_asked_ends_the_session() {
    let mut session = ready();
    session.execute("a", Map::new()).unwrap();
    let early = success(&json!("icecore-00000007-1"), json!({}));
    assert!(matches!(session.feed(&early), Err(SessionError::Unexpected(_))));
    assert!(session.transmit().is_empty(), "a failed session sends nothing");
    assert!(session.feed(b"{}").is_err(), "and stays failed");
}

#[test]
fn other_protocols_are_told_apart_from_qmp() {
    let strange = [
        "(qemu) ",
        "NBDMAGICIHAVEOPT",
        "SSH-2.0-x\r\n",
        "{\"return\": {}}",
        "{\"QMP\": {}}",
        "[1]",
    ];
    for bytes in strange {
        let error = Session::new(7).feed(bytes.as_bytes()).unwrap_err();
        assert!(matches!(error, SessionError::NotQmp(_)), "{bytes}: {error}");
    }
    let mut refused = Session::new(7);
    refused.feed(GREETING.as_bytes()).unwrap();
    drain(&mut refused);
    let error = json!({"error": {"class": "X", "desc": "no"}, "id": "icecore-00000007-0"});
    let error = refused.feed(error.to_string().as_bytes()).unwrap_err();
    assert!(matches!(error, SessionError::NotQmp(_)), "{error}");
}

#[test]
fn misshapen_messages_end_the_session() {
    for bytes in ["{}", "{\"return\": 1, \"error\": 2}", "x", "}", "{\"a\" 1}", "{\"event\": 5}"] {
        assert!(ready().feed(bytes.as_bytes()).is_err(), "{bytes}");
    }
    let mut session = ready();
    session.feed(b"{\"event\": \"STO").unwrap();
    assert_eq!(session.eof(), SessionError::Closed { mid_message: true });
    assert_eq!(ready().eof(), SessionError::Closed { mid_message: false });
}

#[test]
fn tombstones_fill_the_queue_too() {
    let mut session = ready();
    for _ in 0..MAX_PENDING {
        let (id, _) = run(&mut session, "a");
        session.cancel(id);
    }
    assert_eq!(session.execute("a", Map::new()), Err(QueueFull));
}

#[test]
fn unknown_events_are_handed_on() {
    let event = json!({"event": "NEW_IN_QEMU_12", "data": {"a": [1]}, "timestamp": {"seconds": 1}});
    let outputs = ready().feed(event.to_string().as_bytes()).unwrap();
    let expected = Event { name: "NEW_IN_QEMU_12".into(), data: json!({"a": [1]}) };
    assert_eq!(outputs, [Output::Event(expected)]);
}

#[derive(Debug, Clone)]
enum Op {
    Execute,
    Cancel(prop::sample::Index),
    Transmit(usize),
    Answer(prop::sample::Index),
    Event,
    Stray,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => Just(Op::Execute),
        2 => any::<prop::sample::Index>().prop_map(Op::Cancel),
        4 => (1usize..90).prop_map(Op::Transmit),
        4 => any::<prop::sample::Index>().prop_map(Op::Answer),
        1 => Just(Op::Event),
        1 => Just(Op::Stray),
    ];
    prop::collection::vec(op, 0..60)
}

/// What an honest QEMU would hold: bytes received, questions not yet answered.
#[derive(Default)]
struct Peer {
    received: Vec<u8>,
    asked: Vec<Value>,
    to_send: Vec<u8>,
}

impl Peer {
    fn receive(&mut self, bytes: &[u8]) {
        self.received.extend_from_slice(bytes);
        while let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
            let line: Vec<_> = self.received.drain(..=end).collect();
            self.asked.push(serde_json::from_slice(&line).unwrap());
        }
    }

    fn answer(&mut self, which: prop::sample::Index) {
        if !self.asked.is_empty() {
            let asked = self.asked.swap_remove(which.index(self.asked.len()));
            self.to_send.extend(success(&asked["id"], asked["execute"].clone()));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Whatever the order of answers and however the bytes are cut: each command gets its own
    /// answer, once; a cancelled one gets it late or never.
    #[test]
    fn each_command_gets_its_own_answer(ops in ops(), cut in 1usize..50) {
        let mut session = ready();
        let mut peer = Peer::default();
        let mut issued = BTreeMap::new();
        let mut cancelled = BTreeMap::new();
        let mut heard = Vec::new();
        for op in ops {
            match op {
                Op::Execute => {
                    let name = format!("command-{}", issued.len());
                    issued.insert(session.execute(&name, Map::new()).unwrap(), name);
                }
                Op::Cancel(which) if !issued.is_empty() => {
                    let id = *issued.keys().nth(which.index(issued.len())).unwrap();
                    if !heard.iter().any(|(other, _)| *other == id) && !cancelled.contains_key(&id) {
                        cancelled.insert(id, session.cancel(id));
                    }
                }
                Op::Cancel(_) => {}
                Op::Transmit(most) => {
                    let count = session.transmit().len().min(most);
                    peer.receive(&session.transmit()[..count]);
                    session.transmitted(count);
                }
                Op::Answer(which) => peer.answer(which),
                Op::Event => peer.to_send.extend(b"{\"event\": \"E\"}\r\n"),
                Op::Stray => peer.to_send.extend(b"{\"return\": {}, \"id\": \"x\"}\n"),
            }
            for piece in peer.to_send.chunks(cut) {
                for output in session.feed(piece).unwrap() {
                    match output {
                        Output::Reply(id, answer) => {
                            prop_assert!(!cancelled.contains_key(&id));
                            heard.push((id, answer));
                        }
                        Output::Late(id, answer) => {
                            prop_assert_eq!(cancelled.get(&id), Some(&Withdrawn::No));
                            heard.push((id, answer));
                        }
                        Output::Event(_) => {}
                        Output::Ready(_) => prop_assert!(false, "ready twice"),
                    }
                }
            }
            peer.to_send.clear();
        }
        for (index, (id, answer)) in heard.iter().enumerate() {
            prop_assert_eq!(answer, &Ok(json!(issued[id])));
            prop_assert!(heard[..index].iter().all(|(other, _)| other != id), "answered twice");
        }
    }

    #[test]
    fn no_bytes_are_worse_than_an_error(
        greeted: bool, pieces in prop::collection::vec(
            prop_oneof![
                "[{}\\[\\]\":, a-z0-9]{0,30}".prop_map(String::into_bytes),
                Just(GREETING.as_bytes().to_vec()),
                Just(b"{\"return\": {}}".to_vec()),
                prop::collection::vec(any::<u8>(), 0..20),
            ], 0..12),
    ) {
        let mut session = if greeted { ready() } else { Session::new(1) };
        for piece in pieces {
            if let Err(error) = session.feed(&piece) {
                prop_assert_eq!(session.feed(b"{\"event\": \"E\"}"), Err(error));
            }
        }
    }
}
