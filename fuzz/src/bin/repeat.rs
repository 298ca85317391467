//! `repeat TARGET TIMES`: one target over its checked-in inputs, so often; under a counter of
//! instructions this is what its parsers cost, on a busy machine too.

use std::path::Path;

use icecore_fuzz::TARGETS;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let name = arguments.next().expect("the name of a target");
    let times: u32 = arguments.next().and_then(|n| n.parse().ok()).expect("a number of times");
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a known target");
    let inputs = icecore_fuzz::inputs(&Path::new(icecore_fuzz::CORPUS).join(name));
    for _ in 0..times {
        inputs.iter().for_each(|input| target(input));
    }
}
