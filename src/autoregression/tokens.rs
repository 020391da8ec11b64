//! Tokens: what stands for a code, a class, or the start of a sequence.

use tch::{Device, Kind, Reduction, Tensor};

use crate::{networks::Gpt, torch::upload};

/// The tokens of a transformer over codes: first one for each class, then one for each code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vocabulary {
    /// How many classes there are; 0 where a sequence does not begin with one.
    pub classes: i64,
    /// How many codes there are.
    pub codes: i64,
}

impl Vocabulary {
    /// How many tokens there are.
    pub fn size(&self) -> i64 {
        self.classes + self.codes
    }

    /// What sequences begin with, `[B]`: the token of each one's class, which is its number. Without classes it is the token
    /// 0, which is that of code 0 too, as in the released models.
    pub fn start(&self, labels: Option<&Tensor>, sequences: i64, device: Device) -> Tensor {
        let nothing = || Tensor::zeros([sequences], (Kind::Int64, device));
        labels.filter(|_| self.classes > 0).map_or_else(nothing, |labels| upload(labels, device))
    }

    /// Codes `[B, F, h, w]` → tokens `[B, F·h·w]`: frame by frame, and in each row by row.
    pub fn tokens(&self, codes: &Tensor) -> Tensor {
        codes.to_kind(Kind::Int64).flatten(1, -1) + self.classes
    }

    /// Tokens `[B, F·h·w]` → codes `[B, F, h, w]` of frames `[h, w]`. A token of a class, which may be drawn too, is the first
    /// code.
    pub fn codes(&self, tokens: &Tensor, [h, w]: [i64; 2]) -> Tensor {
        (tokens - self.classes).clamp(0, self.codes - 1).reshape([tokens.size()[0], -1, h, w])
    }
}

/// The logits `[B, N, V]` of all N tokens of clips, each of which follows from those before it, and the mean cross-entropy.
/// Of a model that fills gaps the first and the last latent frame see their own targets, so that its loss and that of another
/// model do not compare.
pub fn loss(network: &Gpt, start: &Tensor, tokens: &Tensor) -> (Tensor, Tensor) {
    let (b, n) = tokens.size2().expect("tokens [B, N]");
    let inputs = Tensor::cat(&[&start.reshape([b, 1]), &tokens.narrow(1, 0, n - 1)], 1);
    let logits = network.forward(&inputs);
    let each =
        logits.flatten(0, 1).cross_entropy_loss(&tokens.flatten(0, 1), None::<Tensor>, Reduction::Mean, -100, 0.0);
    (logits, each)
}
