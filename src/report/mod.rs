//! What people read about finished runs.

mod drawing;
pub mod page;
mod plot;
mod table;

pub use plot::{Plot, Scale, Series};
pub use table::FigureTable;
