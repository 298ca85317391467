//! Limits on what a host asks of a store: bytes a second, requests a second, requests at all.
//!
//! What is limited is the bulk: packs and maps. Coordination, manifests and listings are counted and
//! never wait, so that no heartbeat is late and no commit is left half way because of a limit.
//! `pay` is pure, time is an argument; the decorator lies still.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{
    ObjectEntry, ObjectLock, ObjectName, ObjectWriter, Store, StoreError, StoreErrorKind, Traffic,
};
use crate::names::{PACKS, RUNS};

/// Sent and received bytes a second, as digits with an optional K, M, G, T.
const RATE_VARIABLE: &str = "ICECORE_STORE_RATE";
/// Requests a second.
const REQUEST_RATE_VARIABLE: &str = "ICECORE_STORE_REQUEST_RATE";
/// Requests of one run.
const BUDGET_VARIABLE: &str = "ICECORE_STORE_REQUESTS_MAX";

/// What a run may ask of a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of content a second, both ways together.
    pub bytes_per_second: Option<u64>,
    /// Requests a second.
    pub requests_per_second: Option<u64>,
    /// Requests at all; the first one beyond fails.
    pub requests_max: Option<u64>,
}

impl Limits {
    /// From variables, however they are looked up.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn from(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let number = |name: &str| match variable(name) {
            None => Ok(None),
            Some(text) => match size(text.trim().trim_end_matches("/s")) {
                Some(number) if number > 0 => Ok(Some(number)),
                _ => Err(format!("{name} is {text:?}: write a number above 0, as in 500 or 20M")),
            },
        };
        Ok(Self {
            bytes_per_second: number(RATE_VARIABLE)?,
            requests_per_second: number(REQUEST_RATE_VARIABLE)?,
            requests_max: number(BUDGET_VARIABLE)?,
        })
    }
}

fn size(text: &str) -> Option<u64> {
    let shift = match text.bytes().last()? {
        b'K' => 10,
        b'M' => 20,
        b'G' => 30,
        b'T' => 40,
        _ => return text.parse().ok(),
    };
    text[..text.len() - 1].parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The store with the limits that this process's environment names; the same one where it names none.
pub(super) fn from_environment(store: Arc<dyn Store>) -> Result<Arc<dyn Store>, StoreError> {
    let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
    let limits = Limits::from(&variable).map_err(|why| {
        StoreError::new(StoreErrorKind::Unsupported, "open", "the store", store.location(), why)
    })?;
    if limits == Limits::default() {
        return Ok(store);
    }
    Ok(Arc::new(Limited::new(store, limits, Arc::new(RealTime(Instant::now())))))
}

/// A clock that never jumps, and lying still.
pub trait Time: fmt::Debug + Send + Sync {
    /// Since some moment.
    fn elapsed(&self) -> Duration;
    /// Lies still.
    fn pause(&self, duration: Duration);
}

#[derive(Debug)]
struct RealTime(Instant);

impl Time for RealTime {
    fn elapsed(&self) -> Duration {
        self.0.elapsed()
    }

    fn pause(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}

/// What is paid for at a steady rate, afterwards: whoever comes next waits until it is paid.
#[derive(Debug, Clone, Copy, Default)]
struct Debt {
    paid_at: Duration,
}

impl Debt {
    /// Takes on a cost at `now`, where so many units are paid a second.
    fn pay(&mut self, now: Duration, cost: u64, per_second: u64) {
        let nanos = u128::from(cost) * 1_000_000_000 / u128::from(per_second.max(1));
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        self.paid_at = self.paid_at.max(now).saturating_add(takes);
    }

    /// How long until all is paid.
    fn rest(&self, now: Duration) -> Duration {
        self.paid_at.saturating_sub(now)
    }
}

#[derive(Debug, Default)]
struct Account {
    bytes: Debt,
    requests: Debt,
    /// As far as they are noted here.
    asked: u64,
}

#[derive(Debug)]
struct Counter {
    store: Arc<dyn Store>,
    limits: Limits,
    account: Mutex<Account>,
    time: Arc<dyn Time>,
}

impl Counter {
    /// Notes what was asked for. A store that counts its requests itself is believed: an operation
    /// may be several of them, of which some come later, in threads of its own.
    fn note(&self, requests: u64, bytes: u64) {
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.time.elapsed();
        let asked = match self.store.traffic() {
            Some(traffic) => traffic.requests().max(account.asked),
            None => account.asked + requests,
        };
        let new = asked - account.asked;
        account.asked = asked;
        if let Some(rate) = self.limits.bytes_per_second {
            account.bytes.pay(now, bytes, rate);
        }
        if let Some(rate) = self.limits.requests_per_second {
            account.requests.pay(now, new, rate);
        }
    }

    /// Says when no request for bulk is left.
    fn must_have_left(&self) -> Result<(), String> {
        let account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        match self.limits.requests_max.filter(|max| account.asked >= *max) {
            Some(max) => {
                Err(format!("the {max} requests that {BUDGET_VARIABLE} allows are used up"))
            }
            None => Ok(()),
        }
    }

    /// Lies still until what was asked for so far is paid.
    fn wait(&self) {
        loop {
            let account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
            let now = self.time.elapsed();
            let rest = account.bytes.rest(now).max(account.requests.rest(now));
            drop(account);
            if rest.is_zero() {
                return;
            }
            self.time.pause(rest);
        }
    }
}

/// A store that asks no more of the one under it than it may.
#[derive(Debug)]
pub struct Limited {
    inner: Arc<dyn Store>,
    counter: Arc<Counter>,
}

impl Limited {
    /// In front of a store.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>, limits: Limits, time: Arc<dyn Time>) -> Self {
        let store = Arc::clone(&inner);
        let counter = Counter { store, limits, account: Mutex::default(), time };
        Self { inner, counter: Arc::new(counter) }
    }

    /// One operation: waits if it concerns bulk, and notes what it came to.
    fn ask<T>(
        &self,
        name: &ObjectName,
        action: &'static str,
        bytes: usize,
        operation: impl FnOnce() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if is_bulk(name) {
            // What was sent in the background since.
            self.counter.note(0, 0);
            self.counter.must_have_left().map_err(|why| {
                let kind = StoreErrorKind::OverBudget;
                StoreError::new(kind, action, name.as_str(), self.inner.location(), why)
            })?;
            self.counter.wait();
        }
        self.counted(bytes, operation)
    }

    fn counted<T>(&self, bytes: usize, operation: impl FnOnce() -> T) -> T {
        let done = operation();
        self.counter.note(1, bytes as u64);
        done
    }
}

fn is_bulk(name: &ObjectName) -> bool {
    name.as_str().starts_with(PACKS) || name.as_str().starts_with(RUNS)
}

struct LimitedWriter {
    counter: Arc<Counter>,
    inner: Box<dyn ObjectWriter>,
}

impl ObjectWriter for LimitedWriter {
    fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        // An object that was begun is finished: only the rates count, not the budget.
        self.counter.wait();
        self.counter.note(0, bytes.len() as u64);
        self.inner.write(bytes)
    }

    fn finish(self: Box<Self>) -> Result<u64, StoreError> {
        let finished = self.inner.finish();
        self.counter.note(1, 0);
        finished
    }
}

impl Store for Limited {
    fn location(&self) -> &str {
        self.inner.location()
    }

    fn create(&self, name: &ObjectName) -> Result<Box<dyn ObjectWriter>, StoreError> {
        let inner = self.ask(name, "create", 0, || self.inner.create(name))?;
        if !is_bulk(name) {
            return Ok(inner);
        }
        Ok(Box::new(LimitedWriter { counter: Arc::clone(&self.counter), inner }))
    }

    fn put(&self, name: &ObjectName, bytes: &[u8]) -> Result<(), StoreError> {
        self.ask(name, "create", bytes.len(), || self.inner.put(name, bytes))
    }

    fn read_exact(
        &self,
        name: &ObjectName,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<(), StoreError> {
        let bytes = buffer.len();
        self.ask(name, "read", bytes, || self.inner.read_exact(name, offset, buffer))
    }

    fn len(&self, name: &ObjectName) -> Result<u64, StoreError> {
        self.ask(name, "look at", 0, || self.inner.len(name))
    }

    fn exists(&self, name: &ObjectName) -> Result<bool, StoreError> {
        self.ask(name, "look at", 0, || self.inner.exists(name))
    }

    fn read(&self, name: &ObjectName, bytes_max: u64) -> Result<Vec<u8>, StoreError> {
        let content = self.ask(name, "read", 0, || self.inner.read(name, bytes_max))?;
        self.counter.note(0, content.len() as u64);
        Ok(content)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        self.counted(0, || self.inner.list(prefix))
    }

    fn names(&self, prefix: &str) -> Result<Vec<ObjectName>, StoreError> {
        self.counted(0, || self.inner.names(prefix))
    }

    fn delete(&self, names: &[ObjectName]) -> Result<(), StoreError> {
        self.counted(0, || self.inner.delete(names))
    }

    fn settle(&self, prefix: &str) -> Result<(), StoreError> {
        self.inner.settle(prefix)
    }

    fn leftovers(&self) -> Result<Vec<String>, StoreError> {
        self.counted(0, || self.inner.leftovers())
    }

    fn remove_leftovers(&self, leftovers: &[String]) -> Result<(), StoreError> {
        self.counted(0, || self.inner.remove_leftovers(leftovers))
    }

    fn lock(&self) -> Option<&dyn ObjectLock> {
        self.inner.lock()
    }

    fn traffic(&self) -> Option<Traffic> {
        self.inner.traffic()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::MemoryStore;

    /// Passes only where somebody lies still.
    #[derive(Debug, Default)]
    struct FakeTime(Mutex<Duration>);

    impl Time for FakeTime {
        fn elapsed(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn pause(&self, duration: Duration) {
            *self.0.lock().unwrap() += duration;
        }
    }

    fn limited(limits: Limits) -> (Limited, Arc<FakeTime>) {
        let time = Arc::new(FakeTime::default());
        (Limited::new(Arc::new(MemoryStore::new()), limits, Arc::clone(&time) as Arc<_>), time)
    }

    fn name(text: &str) -> ObjectName {
        ObjectName::new(text).unwrap()
    }

    #[test]
    fn limits_are_numbers_above_zero() {
        let with =
            |value: &str| Limits::from(&|name| (name == RATE_VARIABLE).then(|| value.to_owned()));
        assert_eq!(with("20M/s").unwrap().bytes_per_second, Some(20 << 20));
        assert_eq!(with("1500").unwrap().bytes_per_second, Some(1500));
        for wrong in ["0", "fast", "-1", "M", "99999999999T", "1.5M"] {
            assert!(with(wrong).unwrap_err().contains(RATE_VARIABLE), "{wrong}");
        }
        assert_eq!(Limits::from(&|_| None).unwrap(), Limits::default());
    }

    #[test]
    fn bytes_of_bulk_take_their_time_both_ways_and_coordination_does_not_wait() {
        let (store, time) = limited(Limits { bytes_per_second: Some(1000), ..Limits::default() });
        for number in 0..5 {
            store.put(&name(&format!("packs/{number}")), &[1; 2000]).unwrap();
        }
        // The last one is not waited for by anybody yet.
        assert_eq!(time.elapsed(), Duration::from_secs(8));
        store.put(&name("coordination/beats/x.1"), &[1; 500]).unwrap();
        store.put(&name("points/x"), &[1; 500]).unwrap();
        assert_eq!(time.elapsed(), Duration::from_secs(8), "somebody waited who must not");
        store.read_exact(&name("packs/0"), 0, &mut [0; 10]).unwrap();
        assert_eq!(time.elapsed(), Duration::from_secs(11), "what went before counts");
        let mut writer = store.create(&name("packs/streamed")).unwrap();
        (0..3).for_each(|_| writer.write(&[2; 1000]).unwrap());
        writer.finish().unwrap();
        assert_eq!(time.elapsed(), Duration::from_millis(13_010));
    }

    #[test]
    fn requests_come_at_their_rate() {
        let (store, time) = limited(Limits { requests_per_second: Some(10), ..Limits::default() });
        store.put(&name("packs/0"), b"x").unwrap();
        (0..20).for_each(|_| assert_eq!(store.len(&name("packs/0")).unwrap(), 1));
        assert_eq!(time.elapsed(), Duration::from_secs(2));
    }

    #[test]
    fn a_budget_ends_bulk_and_lets_a_commit_through() {
        let (store, _) = limited(Limits { requests_max: Some(3), ..Limits::default() });
        store.put(&name("packs/0"), b"x").unwrap();
        let writer = store.create(&name("packs/1")).unwrap();
        store.list("packs/").unwrap();
        let error = store.put(&name("packs/2"), b"x").unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::OverBudget);
        assert!(error.to_string().contains("3 requests"), "{error}");
        writer.finish().unwrap();
        store.put(&name("points/x"), b"x").unwrap();
        store.delete(&[name("coordination/writers/x")]).unwrap();
    }

    proptest! {
        /// In no stretch of time more is paid for than the rate allows, and nobody waits for what
        /// was paid long ago.
        #[test]
        fn a_debt_is_paid_at_its_rate(
            costs in prop::collection::vec((0..5000_u64, 0..3000_u64), 1..40),
            rate in 1..10_000_u64,
        ) {
            let (mut debt, mut now, mut sum) = (Debt::default(), Duration::ZERO, 0);
            for (cost, idle) in costs {
                let rest = debt.rest(now);
                now += rest;
                // All that was taken on before is paid by now.
                prop_assert!(now.as_secs_f64() * rate as f64 >= sum as f64 - 1.0);
                debt.pay(now, cost, rate);
                sum += cost;
                let takes = cost as f64 / rate as f64;
                prop_assert!((debt.rest(now).as_secs_f64() - takes).abs() < 1e-6);
                now += Duration::from_millis(idle);
            }
        }
    }
}
