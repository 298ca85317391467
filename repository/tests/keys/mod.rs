//! What opens the repositories of a test program: nothing, or a key. The program `encrypted` runs the
//! tests of the others once more, on encrypted repositories.

#![allow(dead_code, reason = "each test uses its part")]

use icecore_repository::{InitOptions, KeyMaterial, OpenOptions};

fn is_encrypted() -> bool {
    env!("CARGO_CRATE_NAME") == "encrypted"
}

fn keys() -> Vec<KeyMaterial> {
    let key = || KeyMaterial::from_key_file(vec![0x5a; 32].into()).unwrap();
    is_encrypted().then(key).into_iter().collect()
}

/// The defaults of this program.
pub fn init_options() -> InitOptions {
    InitOptions { keys: keys(), ..InitOptions::default() }
}

/// The defaults of this program.
pub fn open_options() -> OpenOptions {
    OpenOptions { keys: keys(), ..OpenOptions::default() }
}
