//! x
use crate::cli::args::VmCommand;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
/// x
pub async fn run(_: &Context, _: VmCommand) -> Outcome<u8> { Err(Failure::failed("a","b")) }
