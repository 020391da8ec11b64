//! What people read about finished runs: a page, plots, and tables.

mod axis;
mod collect;
mod curve;
mod curves;
mod drawing;
mod efficiency;
mod look;
mod number;
pub mod page;
mod plan;
mod plot;
mod repeats;
mod series;
mod table;

pub use axis::Scale;
pub use collect::{collect, write_page};
pub use curves::draw_curves;
pub use efficiency::{Cost, efficiency_table};
pub use number::with_commas;
pub use plan::PlanTable;
pub use plot::Plot;
pub use series::Series;
pub use table::FigureTable;
