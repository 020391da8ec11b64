//! What people read about finished runs.

mod drawing;
mod plot;

pub use plot::{Plot, Series};
