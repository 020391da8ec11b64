//! Clips as sequences of codes, made one after the other (Ge et al. 2022, arXiv 2204.03638): the tokens that stand for codes
//! and classes, the loss, how a token is drawn, and the walks that make clips of any length.

mod drawing;
mod tokens;
mod walk;

pub use drawing::{CodeSampling, numbers};
pub use tokens::{Vocabulary, loss};
pub use walk::{Form, fill_gap, slide};
