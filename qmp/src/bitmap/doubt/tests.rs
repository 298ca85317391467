//! The verdict, case by case and against every way in which trust could be misplaced.

use super::*;
use crate::bitmap::NamePart;
use proptest::prelude::*;

const SIZE: u64 = 64 << 20;

fn name(point: &str) -> BitmapName {
    let part = |text: &str| NamePart::new(text).unwrap();
    BitmapName { repository: part("r"), chain: part("c"), point: part(point), disk: part("vda") }
}

fn bitmap(point: &str) -> Bitmap {
    Bitmap {
        name: name(point).to_string(),
        granularity_bytes: 65536,
        dirty_bytes: 131_072,
        recording: true,
        busy: false,
        persistent: true,
        inconsistent: false,
    }
}

fn parent() -> ParentDisk {
    ParentDisk {
        bitmap: Some(name("p1")),
        granularity: Granularity::DEFAULT,
        size_bytes: SIZE,
        identity: Identity("id=vda".into()),
    }
}

fn expect(parent: ParentState) -> Expectation {
    Expectation { parent }
}

fn judge(expected: &Expectation, bitmaps: &[Bitmap], size_bytes: u64, identity: &str) -> Verdict {
    let identity = Identity(identity.into());
    verdict(expected, Observation { bitmaps, size_bytes, identity: &identity })
}

fn doubt_of(change: impl FnOnce(&mut Expectation, &mut Bitmap)) -> Doubt {
    let mut expected = expect(ParentState::Found(parent()));
    let mut observed = bitmap("p1");
    change(&mut expected, &mut observed);
    match judge(&expected, &[bitmap("p0"), observed], SIZE, "id=vda") {
        Verdict::Whole(doubt) => doubt,
        trusting @ Verdict::Incremental { .. } => panic!("{trusting:?}"),
    }
}

#[test]
fn a_flawless_bitmap_is_read() {
    let expected = expect(ParentState::Found(parent()));
    let others = [bitmap("p0"), bitmap("p1")];
    let incremental = |grown| Verdict::Incremental { bitmap: name("p1"), grown };
    assert_eq!(judge(&expected, &others, SIZE, "id=vda"), incremental(None));
    assert_eq!(judge(&expected, &others, SIZE + 5, "id=vda"), incremental(Some(SIZE..SIZE + 5)));
}

#[test]
fn every_doubt_has_its_reason() {
    let inconsistent = Doubt::BitmapInconsistent;
    assert_eq!(doubt_of(|_, b| b.inconsistent = true), inconsistent(Flaw::NotStored));
    assert_eq!(doubt_of(|_, b| b.recording = false), inconsistent(Flaw::NotRecording));
    assert_eq!(doubt_of(|_, b| b.busy = true), inconsistent(Flaw::Busy));
    assert_eq!(doubt_of(|_, b| b.granularity_bytes = 4096), Doubt::GranularityChanged);
    assert_eq!(doubt_of(|_, b| b.name.push('x')), Doubt::BitmapMissing);
    assert_eq!(doubt_of(|e, _| e.parent = ParentState::None), Doubt::FirstPoint);
    assert_eq!(doubt_of(|e, _| e.parent = ParentState::Missing), Doubt::ParentMissing);
    assert_eq!(doubt_of(|e, _| e.parent = ParentState::Corrupt), Doubt::ParentCorrupt);
    let other = ParentDisk { identity: Identity("id=vdb".into()), ..parent() };
    assert_eq!(doubt_of(|e, _| e.parent = ParentState::Found(other)), Doubt::DiskReplaced);
    let larger = ParentDisk { size_bytes: SIZE + 1, ..parent() };
    assert_eq!(doubt_of(|e, _| e.parent = ParentState::Found(larger)), Doubt::SizeChanged);
    let bare = ParentDisk { bitmap: None, ..parent() };
    assert_eq!(doubt_of(|e, _| e.parent = ParentState::Found(bare)), Doubt::BitmapMissing);
    assert_eq!(Doubt::from(SentinelClean { range: 0..1 }), Doubt::Contradiction);
}

prop_compose! {
    fn any_bitmap()(
        point in "p[01]", granularity_bytes in prop_oneof![Just(65536u64), Just(4096)],
        dirty_bytes: u64, recording in weighted(), busy in rare(), persistent: bool,
        inconsistent in rare(),
    ) -> Bitmap {
        let name = name(&point).to_string();
        Bitmap { name, granularity_bytes, dirty_bytes, recording, busy, persistent, inconsistent }
    }
}

fn weighted() -> impl Strategy<Value = bool> {
    prop::bool::weighted(0.8)
}

fn rare() -> impl Strategy<Value = bool> {
    prop::bool::weighted(0.2)
}

fn any_parent() -> impl Strategy<Value = ParentState> {
    let sizes = prop_oneof![Just(SIZE - 512), Just(SIZE), Just(SIZE + 512)];
    let found = (any::<bool>(), sizes, "id=vd[ab]").prop_map(|(bitmap, size_bytes, identity)| {
        let bitmap = bitmap.then(|| name("p1"));
        let identity = Identity(identity);
        ParentState::Found(ParentDisk { bitmap, size_bytes, identity, ..parent() })
    });
    prop_oneof![
        1 => Just(ParentState::None),
        1 => Just(ParentState::Missing),
        1 => Just(ParentState::Corrupt),
        9 => found,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    /// Incremental exactly when every condition of trust holds, written out independently.
    #[test]
    fn trust_needs_every_condition(
        parent in any_parent(), bitmaps in prop::collection::vec(any_bitmap(), 0..3),
    ) {
        let expected = Expectation { parent };
        let found = judge(&expected, &bitmaps, SIZE, "id=vda");
        let usable = |b: &&Bitmap| b.name == name("p1").to_string();
        let good = |b: &Bitmap| {
            b.recording && !b.busy && !b.inconsistent && b.granularity_bytes == 65536
        };
        let trusted = match &expected.parent {
            ParentState::Found(parent) => parent.bitmap.is_some()
                && parent.size_bytes <= SIZE
                && parent.identity.0 == "id=vda"
                && bitmaps.iter().find(usable).is_some_and(good),
            _ => false,
        };
        prop_assert_eq!(matches!(found, Verdict::Incremental { .. }), trusted, "{:?}", found);
        if let (Verdict::Incremental { bitmap, grown }, ParentState::Found(parent)) = (found, expected.parent) {
            prop_assert_eq!(Some(bitmap), parent.bitmap);
            prop_assert_eq!(grown.map_or(0, |g| g.end - g.start), SIZE - parent.size_bytes);
        }
    }
}
