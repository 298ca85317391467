//! `icecore rollback`.
use crate::cli::args::RollbackArgs;
use crate::context::Context;
use crate::failure::{Failure, Outcome};
/// x
pub async fn run(_: &Context, _: RollbackArgs) -> Outcome<u8> { Err(Failure::failed("a","b")) }
