//! io-engine
