//! x
use crate::cli::args::DoctorArgs;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
/// x
pub async fn run(_: &Context, _: DoctorArgs) -> Outcome<u8> { Err(Failure::failed("a","b")) }
