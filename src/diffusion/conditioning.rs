//! Frames that a clip is made to fit: the masks of prediction and interpolation (paper, section 3.3),
//! and how given frames enter training and sampling.

use anyhow::{Context, Result, ensure};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{
    denoiser::{Denoiser, FrameConditioned, Guidance, Guided, NetworkDenoiser},
    path::{NoisePath, Times},
    prediction::Predict,
};
use crate::{
    networks::{Inputs, Network},
    torch::upload,
};

/// Which frames of a clip are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameMask {
    /// Nothing is given.
    Unconditional,
    /// The first k.
    Prefix(i64),
    /// The first and the last.
    Endpoints,
    /// 0, n, 2n, …
    EveryNth(i64),
}

impl FrameMask {
    /// The given ones of `frames` frames, in order.
    pub fn indices(self, frames: i64) -> Vec<i64> {
        match self {
            FrameMask::Unconditional => Vec::new(),
            FrameMask::Prefix(k) => (0..k).collect(),
            FrameMask::Endpoints => vec![0, frames - 1],
            FrameMask::EveryNth(n) => (0..frames).step_by(n as usize).collect(),
        }
    }

    /// `[1, F, 1, 1]`, float32 on the host: one where a frame is given.
    pub fn tensor(self, frames: i64) -> Tensor {
        mask(&self.indices(frames), frames)
    }
}

/// `[1, F, 1, 1]`: one at the given indices.
fn mask(given: &[i64], frames: i64) -> Tensor {
    let mask = Tensor::zeros([1, frames, 1, 1], (Kind::Float, Device::Cpu));
    mask.index_fill(1, &Tensor::from_slice(given), 1.0)
}

/// How a network with a mask channel is trained. The defaults are the released prediction model's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct FrameConditioning {
    /// Probability that the frames to interpolate between are given.
    pub interpolation: f64,
    /// Those are every n-th frame; without a number the first and the last.
    pub interpolation_every: Option<i64>,
    /// Probability, where it is not interpolation, that the first k frames are given.
    pub prediction: f64,
    /// k is drawn from these.
    pub prefixes: Vec<i64>,
    /// Conditional latent perturbation: given frames carry noise of a level drawn below this number of
    /// diffusion steps, and the network is told the level. `null` for clean frames.
    pub perturbation: Option<i64>,
    /// The loss leaves the given frames out.
    pub masked_loss: bool,
}

impl Default for FrameConditioning {
    fn default() -> Self {
        FrameConditioning {
            interpolation: 0.0,
            interpolation_every: None,
            prediction: 0.5,
            prefixes: vec![1],
            perturbation: Some(250),
            masked_loss: false,
        }
    }
}

impl FrameConditioning {
    /// For clips of `frames` latent frames and a noise path of so many levels.
    ///
    /// # Errors
    /// Names the number that does not fit.
    pub fn validate(&self, frames: i64, levels: i64) -> Result<()> {
        for (name, p) in [("interpolation", self.interpolation), ("prediction", self.prediction)] {
            ensure!((0.0..=1.0).contains(&p), "{name} is a probability, not {p}");
        }
        ensure!(
            self.interpolation == 0.0 || frames >= 3,
            "interpolation needs clips of at least 3 latent frames, these have {frames}"
        );
        if let Some(n) = self.interpolation_every {
            ensure!(n >= 2, "interpolation_every must be at least 2, not {n}: something must be left to make");
        }
        ensure!(self.prediction == 0.0 || !self.prefixes.is_empty(), "prefixes: prediction needs at least one");
        for &k in &self.prefixes {
            ensure!((1..frames).contains(&k), "prefixes: {k} given frames of a clip of {frames} latent frames");
        }
        if let Some(s) = self.perturbation {
            ensure!((1..=levels).contains(&s), "perturbation must lie in 1 … {levels}, not {s}");
        }
        Ok(())
    }

    /// Rows of the network's class embedding: one a level, and the released one more.
    pub fn levels(&self) -> Option<i64> {
        self.perturbation.map(|s| s + 1)
    }

    /// The mask of one training sample.
    pub fn draw(&self, generator: &mut impl Rng) -> FrameMask {
        if generator.random_bool(self.interpolation) {
            return self.interpolation_every.map_or(FrameMask::Endpoints, FrameMask::EveryNth);
        }
        if generator.random_bool(self.prediction) {
            return FrameMask::Prefix(self.prefixes[generator.random_range(0..self.prefixes.len())]);
        }
        FrameMask::Unconditional
    }
}

/// How strongly, and how clean, frames are given when sampling. The defaults are those of the released script.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default)]
pub struct GuidanceConfig {
    /// Weight w of the unconditional prediction's difference.
    pub weight: f64,
    /// How the two predictions are mixed.
    pub form: Guidance,
    /// Noise level s of the given frames, for networks that were trained with perturbation; `null` for clean frames.
    pub level: Option<i64>,
    /// Weight w_r of reconstruction guidance. The network is then not given the frames, and need not have been trained to be
    /// given any: at every step they are replaced by noisy ones, and the others are moved against the gradient of what the
    /// network misses of them, which takes the memory of a training step; 0 is plain replacement. `null`: the network is
    /// given the frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reconstruction: Option<f64>,
}

impl Default for GuidanceConfig {
    fn default() -> Self {
        GuidanceConfig { weight: 0.1, form: Guidance::CfgOriginal, level: Some(100), reconstruction: None }
    }
}

impl GuidanceConfig {
    /// Whether a network can be given frames so; `conditioning` is how it was trained to be given any.
    ///
    /// # Errors
    /// A level that the network does not know; a weight that is no number.
    pub fn validate(&self, conditioning: Option<&FrameConditioning>) -> Result<()> {
        ensure!(self.weight.is_finite(), "the guidance weight is {}", self.weight);
        if let Some(weight) = self.reconstruction {
            ensure!(weight >= 0.0 && weight.is_finite(), "reconstruction: the weight is {weight}; it is at least 0");
            return Ok(());
        }
        let conditioning = conditioning.context(
            "the run was trained without given frames (`conditioning`): give them by `reconstruction`, a weight of \
             reconstruction guidance",
        )?;
        match (self.level, conditioning.perturbation) {
            (Some(s), Some(most)) => ensure!((0..most).contains(&s), "level {s}: the network was trained below {most}"),
            (Some(s), None) => anyhow::bail!("level {s}: the network was trained on clean given frames"),
            (None, _) => {}
        }
        Ok(())
    }

    /// Whether the unconditional prediction has no part in the mixture.
    fn only_conditional(&self) -> bool {
        match self.form {
            Guidance::Interpolate => self.weight == 1.0,
            Guidance::CfgOriginal => self.weight == 0.0,
        }
    }
}

/// Frames that a clip must fit, when sampling.
pub struct GivenLatents<'a> {
    /// Their places in the clip.
    pub indices: &'a [i64],
    /// Clean, `[B, C, k, h, w]`.
    pub frames: &'a Tensor,
    /// Noise for them, of their shape, used once; read only where there is a level.
    pub noise: &'a Tensor,
    /// Weight, form and level of guidance.
    pub guidance: GuidanceConfig,
}

/// A text that clips must show, when sampling.
pub struct GivenTexts {
    /// Encoded, one a clip: `[B, S, context_width]`.
    pub contexts: Tensor,
    /// What guidance leads away from, of the same shape, and w in ε_u + w (ε_c − ε_u); none without guidance.
    pub guidance: Option<(Tensor, f64)>,
}

/// Classes that clips must show, when sampling.
pub struct GivenLabels {
    /// `[B]` int64.
    pub labels: Tensor,
    /// w in ε_u + w (ε_c − ε_u), away from no class; none without guidance.
    pub guidance: Option<f64>,
}

/// What the clips of a batch must fit and show, when sampling: any of these, together.
#[derive(Default)]
pub struct GivenToClips<'a> {
    /// Frames, to a network with a mask channel.
    pub frames: Option<GivenLatents<'a>>,
    /// The clean frames before and after the clips, `[B, C, past + future, h, w]`, to a network that takes such; zeros are
    /// frames that are not given.
    pub around: Option<Tensor>,
    /// Texts, to a network that attends to them.
    pub texts: Option<GivenTexts>,
    /// Classes, to a network that has a table of them.
    pub labels: Option<GivenLabels>,
    /// Further channels `[B, C_i, F, h, w]` with noise, and its time `[B]` as the network is told it, to a network that was
    /// built for them.
    pub concat: Option<(Tensor, Tensor)>,
}

/// The denoiser of a network for clips `[B, C, F, h, w]` of the shape of `like`, and what they are given. A network with a
/// mask channel is shown an empty mask, and told no level, where no frames are given; one with classes is told of no class.
/// Guidance leads away from the text and the class where either has a weight, which is the text's where both have one;
/// frames are then given on both of its sides.
/// Else it leads away from a clip without given frames.
///
/// # Errors
/// A `like` that is no batch of videos; given frames that do not fit into it; what the network cannot be given.
pub fn conditioned<'a>(
    network: &'a dyn Network,
    path: &'a dyn NoisePath,
    predict: Predict,
    like: &Tensor,
    given: GivenToClips,
) -> Result<Box<dyn Denoiser + 'a>> {
    let (b, _, f, _, _) = like.size5()?;
    let ports = network.ports();
    let GivenToClips { frames, around, texts, labels, concat } = given;
    ensure!(
        frames.as_ref().is_none_or(|frames| frames.guidance.reconstruction.is_none()),
        "reconstruction: these frames are not given to the network; put a `Reconstruction` around its denoiser"
    );
    ensure!(frames.is_none() || ports.mask, "this network has no mask channel: it cannot be given frames");
    ensure!(labels.is_none() || ports.classes.is_some(), "this network knows no classes: it cannot be given one");
    ensure!(
        around.as_ref().is_none_or(|around| around.size().get(2) == Some(&(ports.past + ports.future))),
        "the network takes {} frames before a clip and {} after it, and is given another number",
        ports.past,
        ports.future
    );
    let denoiser_given = |given: Inputs| NetworkDenoiser { network, path, predict, given };
    let guided = |conditional, unconditional, weight, form| Guided {
        conditional: denoiser_given(conditional),
        unconditional: denoiser_given(unconditional),
        weight,
        form,
        path,
    };

    // all that is given, and the same without what guidance leads away from
    let mut conditional = Inputs { around, ..Inputs::default() };
    let mut unconditional = conditional.clone();
    let mut weight = None;
    if let Some(GivenTexts { contexts, guidance }) = texts {
        weight = guidance.as_ref().map(|(_, weight)| *weight);
        unconditional.text = Some(guidance.map_or_else(|| contexts.shallow_clone(), |(negative, _)| negative));
        conditional.text = Some(contexts);
    }
    if let Some(GivenLabels { labels, guidance }) = labels {
        if guidance.is_none() {
            unconditional.label = Some(labels.shallow_clone());
        }
        weight = weight.or(guidance);
        conditional.label = Some(labels);
    }
    if let Some((channels, time)) = concat {
        for inputs in [&mut conditional, &mut unconditional] {
            inputs.concat = vec![channels.shallow_clone()];
            inputs.concat_time = Some(time.shallow_clone());
        }
    }
    let Some(given) = frames else {
        return Ok(match weight {
            Some(weight) => Box::new(guided(conditional, unconditional, weight, Guidance::Interpolate)),
            None => Box::new(denoiser_given(conditional)),
        });
    };
    let mask = upload(&mask(given.indices, f), like.device()).unsqueeze(0).expand([b, 1, f, 1, 1], false);
    let (frames, level) = match given.guidance.level {
        None => (given.frames.shallow_clone(), None),
        Some(s) => {
            let times = Times::of_levels(path, &vec![s; b as usize], like.device());
            let s = Tensor::full([b], s, (Kind::Int64, like.device()));
            (times.add_noise(given.frames, given.noise), Some(s))
        }
    };
    let places = upload(&Tensor::from_slice(given.indices), like.device());
    let frames =
        like.zeros_like().f_index_copy(2, &places, &frames).context("given frames do not fit into the clip")?;
    conditional.mask = Some(mask.shallow_clone());
    conditional.level = level;
    let inner = match weight {
        Some(weight) => {
            (unconditional.mask, unconditional.level) =
                (Some(mask.shallow_clone()), conditional.level.as_ref().map(Tensor::shallow_clone));
            guided(conditional, unconditional, weight, Guidance::Interpolate)
        }
        None if given.guidance.only_conditional() => {
            return Ok(Box::new(FrameConditioned { inner: denoiser_given(conditional), frames, mask }));
        }
        None => {
            let GuidanceConfig { weight, form, .. } = given.guidance;
            guided(conditional, unconditional, weight, form)
        }
    };
    Ok(Box::new(FrameConditioned { inner, frames, mask }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, stream};

    #[test]
    fn masks_give_what_they_say() {
        assert!(FrameMask::Unconditional.indices(5).is_empty());
        assert_eq!(FrameMask::Prefix(2).indices(5), [0, 1]);
        assert_eq!(FrameMask::Endpoints.indices(5), [0, 4]);
        assert_eq!(FrameMask::EveryNth(2).indices(6), [0, 2, 4]);
        let mask = FrameMask::Endpoints.tensor(4).flatten(0, -1);
        assert_eq!(Vec::<f32>::try_from(mask).unwrap(), [1.0, 0.0, 0.0, 1.0]);
    }

    #[test]
    fn masks_come_as_often_as_asked() {
        let conditioning = FrameConditioning {
            interpolation: 0.5,
            prediction: 0.6,
            prefixes: vec![1, 2],
            ..FrameConditioning::default()
        };
        let mut counts = [0.0; 4];
        for sample in 0..4000 {
            let drawn = conditioning.draw(&mut stream(3, Purpose::FrameMask, sample, 0));
            counts[match drawn {
                FrameMask::Endpoints => 0,
                FrameMask::Prefix(1) => 1,
                FrameMask::Prefix(2) => 2,
                FrameMask::Unconditional => 3,
                other => panic!("{other:?}"),
            }] += 1.0 / 4000.0;
        }
        for (found, wanted) in counts.into_iter().zip([0.5f64, 0.15, 0.15, 0.2]) {
            assert!((found - wanted).abs() < 0.03, "{counts:?}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let good = FrameConditioning { interpolation: 0.5, ..FrameConditioning::default() };
        good.validate(5, 1000).unwrap();
        for (bad, word) in [
            (FrameConditioning { interpolation: 1.5, ..good.clone() }, "probability"),
            (FrameConditioning { prefixes: vec![5], ..good.clone() }, "prefixes"),
            (FrameConditioning { prefixes: vec![], ..good.clone() }, "prefixes"),
            (FrameConditioning { interpolation_every: Some(1), ..good.clone() }, "interpolation_every"),
            (FrameConditioning { perturbation: Some(1001), ..good.clone() }, "perturbation"),
        ] {
            let error = bad.validate(5, 1000).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let level = |level| GuidanceConfig { level, ..GuidanceConfig::default() };
        assert!(level(Some(250)).validate(Some(&good)).is_err() && level(Some(249)).validate(Some(&good)).is_ok());
        assert!(level(Some(0)).validate(Some(&FrameConditioning { perturbation: None, ..good })).is_err());
        let reconstruction = |weight| GuidanceConfig { reconstruction: weight, ..GuidanceConfig::default() };
        assert!(reconstruction(None).validate(None).unwrap_err().to_string().contains("reconstruction guidance"));
        assert!(reconstruction(Some(9.0)).validate(None).is_ok() && reconstruction(Some(-1.0)).validate(None).is_err());
    }
}
