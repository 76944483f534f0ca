//! Brings models to the local cache.
