//! nbd-client
