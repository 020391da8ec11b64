//! What people read about finished runs.

mod drawing;
mod plot;
mod table;

pub use plot::{Plot, Series};
pub use table::FigureTable;
