//! What people read about finished runs.

mod axis;
mod curves;
mod drawing;
pub mod page;
mod plot;
mod table;

pub use axis::Scale;
pub use curves::draw_curves;
pub use plot::{Plot, Series};
pub use table::FigureTable;
