//! `cargo xtask demo`: a running guest is backed up while it writes, loses its data, comes back.

mod figures;
mod scene;

use clap::Args;

use crate::demo::figures::Figures;
use crate::demo::scene::Scene;
use crate::setup;
use crate::step::{Result, cargo, shown, timed};

/// Show it on a real guest.
#[derive(Args)]
pub struct Demo {
    /// Leave the guest, the repository and the sockets there to play with
    #[arg(long)]
    keep: bool,
}

impl Demo {
    /// Sets up, builds, and plays the scene.
    pub fn run(&self) -> Result<()> {
        setup::for_demo()?;
        timed("build", || shown(&mut cargo(&["build", "--release", "-p", "icecore"])))?;
        let mut figures = Figures::default();
        let mut scene = timed("boot the guest", Scene::set)?;
        timed("let it write; full point", || scene.full_point(&mut figures))?;
        timed("let it write; incremental point", || scene.incremental_point(&mut figures))?;
        timed("destroy data in the guest", || scene.destroy(&mut figures))?;
        timed("roll back, boot again", || scene.roll_back(&mut figures))?;
        timed("check the repository", || scene.check(&mut figures))?;
        println!("\n{figures}");
        scene.end(self.keep)
    }
}
