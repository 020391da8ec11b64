//! Prompts → what cross-attention sees: tokenizer and CLIP's text encoder together, frozen.

use std::{cell::RefCell, collections::BTreeMap};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor, no_grad};

use super::{ClipText, ClipTextConfig, Tokenizer, TokenizerFiles};
use crate::nn::{Parameters, full_precision};

/// What a text encoder looks like. Without a tokenizer (an imported checkpoint may have none) it cannot read prompts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TextEncoderConfig {
    /// The network.
    pub text_encoder: ClipTextConfig,
    /// The words it knows.
    #[serde(default)]
    pub tokenizer: Option<TokenizerFiles>,
}

/// A frozen text encoder.
pub struct TextEncoder {
    tokenizer: Tokenizer,
    clip: ClipText,
    config: ClipTextConfig,
    /// The empty prompt comes with every step of training and every guided sample.
    empty: RefCell<Option<Tensor>>,
}

impl TextEncoder {
    /// # Errors
    /// Settings or weights that do not fit together; no tokenizer, or one with more tokens than the encoder.
    pub fn new(config: &TextEncoderConfig, weights: BTreeMap<String, Tensor>, device: Device) -> Result<Self> {
        let TextEncoderConfig { text_encoder: clip, tokenizer } = config;
        let Some(files) = tokenizer else {
            anyhow::bail!("this text encoder came without a tokenizer: import it again with --tokenizer FOLDER")
        };
        clip.validate()?;
        let tokenizer = Tokenizer::new(files)?;
        fits(&tokenizer, clip)?;
        let parameters = Parameters::unfilled(device);
        let network = ClipText::new(&parameters.root(), clip);
        parameters.fill(weights)?;
        parameters.freeze();
        Ok(TextEncoder { tokenizer, clip: network, config: clip.clone(), empty: RefCell::default() })
    }

    /// Width of what it gives for a token.
    pub fn width(&self) -> i64 {
        self.config.width
    }

    /// Rows of the encoder, and tokens of the tokenizer.
    pub fn vocabulary(&self) -> [i64; 2] {
        [self.config.vocabulary, self.tokenizer.vocabulary()]
    }

    /// Prompts → `[N, positions, width]`, never in half precision. Those that are longer than the encoder are cut, with a warning.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn encode<S: AsRef<str>>(&self, prompts: &[S]) -> Result<Tensor> {
        let rows: Vec<Tensor> = prompts
            .iter()
            .map(|prompt| if prompt.as_ref().is_empty() { self.empty() } else { self.encode_one(prompt.as_ref()) })
            .collect::<Result<_>>()?;
        Ok(Tensor::cat(&rows, 0))
    }

    /// The empty prompt, `[1, positions, width]`.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn empty(&self) -> Result<Tensor> {
        if self.empty.borrow().is_none() {
            *self.empty.borrow_mut() = Some(self.encode_one("")?);
        }
        Ok(self.empty.borrow().as_ref().expect("put there above").shallow_clone())
    }

    /// One by one: what is encoded once and kept is to the bit what is encoded beside others.
    fn encode_one(&self, prompt: &str) -> Result<Tensor> {
        let tokens = self.tokenizer.tokens(prompt, self.config.positions)?;
        let encoded = no_grad(|| self.clip.forward(&Tensor::from_slice(&tokens).unsqueeze(0)))?;
        Ok(full_precision(&encoded))
    }
}

/// # Errors
/// A tokenizer whose numbers the encoder has no rows for.
fn fits(tokenizer: &Tokenizer, clip: &ClipTextConfig) -> Result<()> {
    ensure!(
        tokenizer.vocabulary() <= clip.vocabulary,
        "the tokenizer has {} tokens, the text encoder {}",
        tokenizer.vocabulary(),
        clip.vocabulary
    );
    ensure!(clip.positions >= 2, "a text encoder of {} positions has no room for start and end", clip.positions);
    Ok(())
}
