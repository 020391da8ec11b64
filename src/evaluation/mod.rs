//! Evaluation: clips of a run or out of files against real ones under a protocol, beside baselines.
//!
//! ```no_run
//! use lvdm::{distributed::Ranks, evaluation::{VideoPaths, evaluate}, metrics::Metric};
//! use tch::Device;
//!
//! # fn main() -> anyhow::Result<()> {
//! let paths = VideoPaths { real: "videos".into(), generated: "runs/mine".into(), clips: Some(256), ..VideoPaths::default() };
//! let evaluation = evaluate(&paths.experiment()?, Device::cuda_if_available(), &Ranks::alone())?;
//! println!("FVD {:?}", evaluation.figures["samples"].value(Metric::FVD));
//! # Ok(())
//! # }
//! ```
//!
//! The way of a figure: the real clips and the generated clips stream through the extractors of all
//! metrics (`MetricGroup`, `Extraction`), features of real clips come
//! out of the cache where it holds them, a `Measurement` compares them, and an [`Evaluation`]
//! is what `figures.json` holds. A metric or an extractor is added in [`crate::metrics`] or [`crate::extractors`]; nothing
//! here knows one by name.

mod baselines;
mod card;
mod evaluate;
mod extraction;
mod feature_cache;
mod generated_clips;
mod long;
mod measurement;
mod metric_group;
mod paths;
mod previews;
mod real_clips;
mod reconstruction;
mod sampled;
mod sensitivity;
mod warnings;
mod windows;

pub use card::{Card, card};
pub use evaluate::{Evaluation, SETS, evaluate, evaluate_model};
pub use long::{LongEvaluation, MeasuredCurve, evaluate_long};
pub use paths::VideoPaths;
pub use reconstruction::{Reconstruction, ReconstructionOptions, Spread};
pub use sensitivity::Sensitivity;
