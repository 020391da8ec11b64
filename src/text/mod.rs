//! From a caption to what a network attends to: tokens, then CLIP's text transformer.

mod captions;
mod clip_text;
mod text_encoder;
mod tokenizer;

pub use clip_text::{ClipText, ClipTextConfig, TextActivation};
pub use text_encoder::{TextEncoder, TextEncoderConfig};
pub use tokenizer::{Tokenizer, TokenizerFiles};
