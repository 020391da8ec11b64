//! Training: the loop, what it logs and what it shows.

pub mod logger;
pub mod progress;
