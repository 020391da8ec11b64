//! TATS' transformers over codes: their logits and loss, the filter of what is drawn, and the walks that draw.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tch::{Tensor, no_grad};

use super::{case::Case, outputs::Outputs};
use crate::{
    autoregression::{CodeSampling, Form, Vocabulary, fill_gap, loss, slide},
    networks::{Gpt, GptConfig, Sequences},
    nn::Parameters,
    torch::Autocast,
};

/// The released names of the settings.
#[derive(Deserialize)]
struct ReleasedGpt {
    n_codes: i64,
    n_classes: i64,
    block_size: i64,
    n_layer: i64,
    n_head: i64,
    n_embd: i64,
    n_unmasked: i64,
}

impl ReleasedGpt {
    fn vocabulary(&self) -> Vocabulary {
        Vocabulary { classes: self.n_classes, codes: self.n_codes }
    }

    fn build(&self, case: &Case) -> Result<Gpt> {
        let config = GptConfig { layers: self.n_layer, heads: self.n_head, width: self.n_embd, recompute: false };
        config.validate()?;
        let sequences =
            Sequences { vocabulary: self.vocabulary().size(), length: self.block_size, unmasked: self.n_unmasked };
        let parameters = Parameters::new(case.device(), 0);
        let network = Gpt::new(&parameters.root(), &config, sequences);
        case.fill(&parameters, "transformer.", false)?;
        Ok(network)
    }
}

pub fn gpt(case: &Case) -> Result<Outputs> {
    let config: ReleasedGpt = case.config()?;
    let network = config.build(case)?;
    let tokens = config.vocabulary().tokens(&case.input("codes")?);
    let start = config.vocabulary().start(case.optional("label").as_ref(), tokens.size()[0], case.device());
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let (logits, loss) = no_grad(|| loss(&network, &start, &tokens));
    Ok(vec![("logits", logits), ("loss", loss)])
}

#[derive(Deserialize)]
struct FilterCase {
    top_k: Option<i64>,
    top_p: Option<f64>,
}

pub fn filter(case: &Case) -> Result<Outputs> {
    let FilterCase { top_k, top_p } = case.config()?;
    let sampling = CodeSampling { top_k, top_p, ..CodeSampling::default() };
    Ok(vec![("probabilities", sampling.probabilities(&case.input("logits")?))])
}

#[derive(Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
enum SamplingCase {
    Autoregressive {
        #[serde(flatten)]
        network: ReleasedGpt,
        latent_frames: i64,
        temporal_sample_pos: i64,
        side: i64,
    },
    Hierarchical {
        autoregressive: ReleasedGpt,
        interpolation: ReleasedGpt,
        sample_length: i64,
        temporal_sample_pos: i64,
        side: i64,
    },
}

/// Draws the likeliest token each time, and keeps what it was taken from.
fn greedy(kept: &mut Vec<Tensor>) -> impl FnMut(&Tensor) -> Tensor + '_ {
    |logits| {
        kept.push(logits.shallow_clone());
        logits.argmax(-1, false)
    }
}

pub fn sampling(case: &Case) -> Result<Outputs> {
    let label = case.input("label")?;
    let start = |gpt: &ReleasedGpt| gpt.vocabulary().start(Some(&label), label.size()[0], case.device());
    let _autocast = Autocast::bfloat16(case.device(), case.half);
    let mut steps = Vec::new();
    match case.config()? {
        SamplingCase::Autoregressive { network, latent_frames, temporal_sample_pos, side } => {
            let sizes = [latent_frames, side * side, temporal_sample_pos];
            let tokens = slide(&network.build(case)?, &start(&network), None, sizes, &mut greedy(&mut steps));
            let codes = network.vocabulary().codes(&tokens, [side; 2]);
            Ok(vec![("codes", codes), ("logits", Tensor::stack(&steps, 0))])
        }
        SamplingCase::Hierarchical { autoregressive, interpolation, sample_length, temporal_sample_pos, side } => {
            let s = side * side;
            let filler = interpolation.build(case)?;
            ensure!(
                autoregressive.vocabulary() == interpolation.vocabulary(),
                "two networks of different codes or classes"
            );
            let gap = interpolation.block_size / s - 1;
            ensure!(
                gap >= 2 && sample_length % gap == 0,
                "sample_length {sample_length} does not divide into gaps of {gap}"
            );
            let sizes = [sample_length / gap + 1, s, temporal_sample_pos];
            let sparse =
                slide(&autoregressive.build(case)?, &start(&autoregressive), None, sizes, &mut greedy(&mut steps));
            let frames = sparse.split(s, 1);
            let (mut all, mut between) = (Vec::new(), Vec::new());
            for ends in frames.windows(2) {
                let ends = [&ends[0], &ends[1]];
                let filled = fill_gap(&filler, &start(&interpolation), ends, Form::Released, &mut greedy(&mut between));
                all.extend([ends[0].shallow_clone(), filled]);
            }
            all.push(frames.last().context("no latent frame")?.shallow_clone());
            let codes = interpolation.vocabulary().codes(&Tensor::cat(&all, 1), [side; 2]);
            if steps.is_empty() || between.is_empty() {
                bail!("sample_length {sample_length} has no gap");
            }
            Ok(vec![
                ("codes", codes),
                ("logits", Tensor::stack(&steps, 0)),
                ("logits_interpolation", Tensor::stack(&between, 0)),
            ])
        }
    }
}
