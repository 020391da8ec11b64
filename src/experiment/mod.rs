//! What an experiment file says: typed, strict, overridable.

mod autoencoder;
mod diffusion;
mod evaluate;
mod file;
mod keys;
mod labels;
mod load;
mod long_video;
mod protocols;
mod superresolution;
mod training;
mod transformer;
mod user_error;
mod validate;

pub use autoencoder::AutoencoderExperiment;
pub use diffusion::{DiffusionExperiment, DiffusionSpace, SUPERRESOLUTION, TEXT_GUIDANCE, TextConditioning, Trained};
pub use evaluate::{EvaluationExperiment, Generated};
pub use keys::{Key, Keys};
pub use labels::{ClassList, LabelConditioning};
pub use load::{parse, read};
pub use long_video::{Curve, CurveSource, LongEvaluationExperiment, LongVideoConfig, WholeVideoConfig};
pub use protocols::{EvaluationConfig, built_in_protocols, protocol};
pub use superresolution::SuperResolution;
pub use training::{Decay, Numerics, OptimizerConfig, OptimizerKind, Precision, ReduceDtype, TrainerConfig};
pub use transformer::{SequenceLabels, TransformerExperiment};
pub use user_error::UserError;
pub use validate::Experiment;
