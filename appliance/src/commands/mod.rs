//! One file a command: flags in, work done by the other modules, report out.

pub mod backup;
pub mod chain;
pub mod check;
pub mod config;
pub mod copy;
pub mod diff;
pub mod doctor;
pub mod export;
pub mod gc;
pub mod generate;
pub mod hook;
pub mod job;
pub mod key;
pub mod point;
pub mod prune;
pub mod quota;
pub mod record;
pub mod repo;
pub mod repo_open;
pub mod restore;
pub mod rollback;
pub mod schedule;
pub mod schedule_run;
pub mod status;
pub mod vm;
pub mod vm_create;
