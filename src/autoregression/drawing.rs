//! How a token is drawn from what a transformer says of it.

use anyhow::{Result, ensure};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::walk::Form;
use crate::random::{Purpose, stream};

/// How codes are drawn. The defaults are those of the released scripts; their README's commands have `top_p: 0.8`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CodeSampling {
    /// Only the likeliest so many tokens are drawn; `null` for all.
    pub top_k: Option<i64>,
    /// Of those, likeliest first, only the ones before which there is at most so much probability; `null` for all.
    pub top_p: Option<f64>,
    /// Latent frames that the network sees when it makes the next, one at least.
    pub window: i64,
    /// How gaps are filled: `consistent` with training, or as the `released` code does it, for released weights.
    pub form: Form,
}

impl Default for CodeSampling {
    fn default() -> Self {
        CodeSampling { top_k: Some(2048), top_p: Some(0.92), window: 1, form: Form::Consistent }
    }
}

impl CodeSampling {
    /// # Errors
    /// Names the number that makes no sense.
    pub fn validate(&self) -> Result<()> {
        let CodeSampling { top_k, top_p, window, .. } = *self;
        ensure!(top_k.is_none_or(|k| k >= 1), "top_k must be at least 1, not {}", top_k.unwrap_or(0));
        ensure!(top_p.is_none_or(|p| (0.0..=1.0).contains(&p)), "top_p is a probability, not {}", top_p.unwrap_or(0.0));
        ensure!(
            top_p.is_none() || top_k.is_some(),
            "top_p acts on what top_k leaves, as in the released code, and without top_k not at all: give top_k too (the size \
             of the vocabulary leaves all)"
        );
        ensure!(window >= 1, "window must be at least 1, not {window}");
        Ok(())
    }

    /// In words, as a figure says it.
    pub fn describe(&self) -> String {
        let CodeSampling { top_k, top_p, window, .. } = self;
        let of_k = top_k.map_or_else(|| "all codes".to_string(), |k| format!("top-k {k}"));
        let of_p = top_p.map_or_else(String::new, |p| format!(", top-p {p}"));
        format!("codes drawn one after the other, {of_k}{of_p}, window {window}")
    }

    /// The distribution of which a token is drawn: logits `[B, V]` → probabilities `[B, V]`. Without `top_k` neither filter
    /// acts.
    pub fn probabilities(&self, logits: &Tensor) -> Tensor {
        let Some(k) = self.top_k else { return logits.softmax(-1, None) };
        let (largest, _) = logits.topk(k.min(logits.size()[1]), -1, true, true);
        let out = |logits: &Tensor, out: &Tensor| logits.masked_fill(out, f64::NEG_INFINITY);
        let mut logits = out(logits, &logits.lt_tensor(&largest.narrow(1, largest.size()[1] - 1, 1)));
        if let Some(p) = self.top_p {
            let (sorted, order) = logits.sort(-1, true);
            let own = sorted.softmax(-1, None);
            let before = own.cumsum(-1, None) - &own;
            logits = logits.scatter(-1, &order, &out(&sorted, &before.gt(p)));
        }
        logits.softmax(-1, None)
    }

    /// The tokens `[B]` that numbers `[B]` in [0, 1) draw: each the first whose probability, with all before it, exceeds the
    /// number.
    pub fn draw(&self, logits: &Tensor, numbers: &Tensor) -> Tensor {
        let up_to = self.probabilities(logits).cumsum(-1, Kind::Double); // [B, V]
        let total = up_to.narrow(1, up_to.size()[1] - 1, 1);
        up_to.le_tensor(&(numbers.to_kind(Kind::Double).unsqueeze(1) * total)).sum_dim_intlist(
            [-1i64].as_slice(),
            false,
            Kind::Int64,
        )
    }
}

/// The numbers in [0, 1) that draw `count` tokens of one clip of a sample, `[count]` float32 on the host.
pub fn numbers(seed: u64, sample: u64, clip: u64, count: i64) -> Tensor {
    let mut random = stream(seed, Purpose::SampleStep, sample, clip);
    Tensor::from_slice(&(0..count).map(|_| random.random::<f32>()).collect::<Vec<f32>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(top_k: Option<i64>, top_p: Option<f64>) -> CodeSampling {
        CodeSampling { top_k, top_p, ..CodeSampling::default() }
    }

    fn probabilities(sampling: &CodeSampling) -> Vec<f64> {
        let logits = Tensor::from_slice(&[0.1f64, 0.4, 0.2, 0.3]).log().unsqueeze(0);
        Vec::<f64>::try_from(sampling.probabilities(&logits).flatten(0, -1).to_kind(Kind::Double)).unwrap()
    }

    /// By hand: of probabilities 0.1, 0.4, 0.2, 0.3 the likeliest are kept, and what is left sums to one. The first is kept
    /// whatever p is, and one whose predecessors have exactly p is.
    #[test]
    fn filters_keep_the_likeliest() {
        let seventh = |n: f64| n / 7.0;
        for (top_k, top_p, wanted) in [
            (None, None, [0.1, 0.4, 0.2, 0.3]),
            (Some(9), None, [0.1, 0.4, 0.2, 0.3]),
            (Some(2), None, [0.0, seventh(4.0), 0.0, seventh(3.0)]),
            (Some(4), Some(0.69), [0.0, seventh(4.0), 0.0, seventh(3.0)]),
            (Some(4), Some(0.71), [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]),
            (Some(4), Some(0.0), [0.0, 1.0, 0.0, 0.0]),
            // of the three that are left the first has 4/9
            (Some(3), Some(0.43), [0.0, 1.0, 0.0, 0.0]),
            // without k neither acts
            (None, Some(0.1), [0.1, 0.4, 0.2, 0.3]),
        ] {
            let found = probabilities(&of(top_k, top_p));
            let close = found.iter().zip(wanted).all(|(found, wanted)| (found - wanted).abs() < 1e-6);
            assert!(close, "{top_k:?} {top_p:?}: {found:?}");
        }
        assert!(of(None, Some(0.5)).validate().unwrap_err().to_string().contains("give top_k too"));
        assert!(of(Some(0), None).validate().is_err() && of(Some(5), Some(1.5)).validate().is_err());
    }

    /// As often as their probability says, and never what the filters took out, at the very ends of [0, 1) either.
    #[test]
    fn tokens_are_drawn_by_their_probability() {
        let sampling = of(Some(3), None);
        let logits = Tensor::from_slice(&[0.1f32, 0.4, 0.2, 0.3]).log().unsqueeze(0);
        let draws = numbers(7, 0, 0, 20_000);
        let tokens = sampling.draw(&logits.expand([20_000, 4], false), &draws);
        let shares: Vec<i64> = tokens.bincount(None::<&Tensor>, 4).try_into().unwrap();
        for (share, wanted) in shares.iter().zip([0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0]) {
            assert!((*share as f64 / 20_000.0 - wanted).abs() < 0.015, "{shares:?}");
        }
        assert_eq!(shares[0], 0);
        let ends = Tensor::from_slice(&[0.0f32, 1.0 - f32::EPSILON / 2.0]);
        let tokens = sampling.draw(&logits.expand([2, 4], false), &ends);
        assert_eq!(Vec::<i64>::try_from(tokens).unwrap(), [1, 3]);
    }
}
