//! The icecore binary.
fn main() {}
