//! Decisions of an operator's policy: what is due, what stays, what a project may use.
//!
//! The cores here read no clock and no file; what they are told of the world is an argument.

pub mod calendar;
pub mod notify;
pub mod quota;
pub mod retention;
pub mod schedule;
pub mod window;
