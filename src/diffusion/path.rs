//! Paths from data to noise: z_t = α_t·z_0 + σ_t·ε, over a time that each path counts in its own way.

use std::cell::RefCell;

use anyhow::Result;
use rand::Rng;
use tch::{Device, Tensor};

use super::schedule::NoiseSchedule;
use crate::torch::upload;

/// How noise replaces data over time. Time is a real number, and each path has its own range; a schedule of T discrete
/// steps is the path with the times 0 … T−1.
pub trait NoisePath {
    /// (α, σ) of z_t = α·z_0 + σ·ε.
    fn alpha_sigma(&self, t: f64) -> (f64, f64);

    /// A random time for a training sample.
    fn draw(&self, random: &mut dyn Rng) -> f64;

    /// The time at which sampling begins.
    fn noisiest(&self) -> f64;

    /// The times that a sampler of so many steps visits, from the noisiest on, without the end at z_0.
    ///
    /// # Errors
    /// A number of steps that is not possible on this path.
    fn nodes(&self, steps: i64) -> Result<Vec<f64>>;

    /// The number by which the network is given a time: the argument of its time embedding.
    fn embed(&self, t: f64) -> f64;

    /// The time without noise, if the network can be evaluated there.
    fn clean(&self) -> Option<f64> {
        None
    }

    /// The factor by which z_t is multiplied before the network sees it.
    fn input_scale(&self, t: f64) -> f64 {
        let _ = t;
        1.0
    }

    /// The standard deviation of the data for which the path is made.
    fn data_deviation(&self) -> f64 {
        1.0
    }

    /// The standard deviation of z at the time where sampling begins.
    fn start_deviation(&self) -> f64 {
        1.0
    }

    /// The number of noise levels of given frames (conditional latent perturbation, paper, section 3.3). Level 0 is the
    /// cleanest.
    fn levels(&self) -> i64 {
        1000
    }

    /// The time of a level: where nothing else is said, levels divide the time up to the noisiest evenly.
    fn level_time(&self, level: i64) -> f64 {
        self.noisiest() * level as f64 / self.levels() as f64
    }

    /// λ = ln(α/σ), half of the logarithm of the signal-to-noise ratio.
    fn lambda(&self, t: f64) -> f64 {
        let (alpha, sigma) = self.alpha_sigma(t);
        (alpha / sigma).ln()
    }

    /// The schedule of discrete steps, if the path is one.
    fn discrete(&self) -> Option<&NoiseSchedule> {
        None
    }

    /// Signal and noise at a time, from which predictions are converted.
    fn rates(&self, t: f64) -> Rates {
        let (alpha, sigma) = self.alpha_sigma(t);
        Rates { alpha, sigma, deviation: self.data_deviation() }
    }
}

/// The settings of a path: what an experiment says under `schedule:`.
pub trait NoisePathSettings {
    /// # Errors
    /// Names the number that makes no sense.
    fn build(&self) -> Result<Box<dyn NoisePath>>;
}

/// Signal and noise at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// α, of z_0.
    pub alpha: f64,
    /// σ, of the noise.
    pub sigma: f64,
    /// The standard deviation of data.
    pub deviation: f64,
}

/// The times of a batch, one a clip or one a frame, with what follows from them: made on the host, uploaded at once.
pub struct Times {
    /// As in `embedded`, row by row.
    t: Vec<f64>,
    rates: Vec<Rates>,
    /// `[B]` or `[B, F]`, float64: the times as the network takes them, [`NoisePath::embed`].
    embedded: Tensor,
    /// `[B, 1, 1, 1, 1]` or `[B, 1, F, 1, 1]`, float64.
    alpha: Tensor,
    sigma: Tensor,
    /// Where the path scales what the network sees.
    scale: Option<Tensor>,
    /// What else was computed from them, by what it is.
    computed: RefCell<Vec<(&'static str, Tensor)>>,
}

impl Times {
    /// One time a clip.
    pub fn of_clips(path: &dyn NoisePath, t: &[f64], device: Device) -> Self {
        Self::new(path, t, &[t.len() as i64], device)
    }

    /// A time for each of so many frames of each clip, clip after clip.
    ///
    /// # Panics
    /// Where they are not so many for each clip.
    pub fn of_frames(path: &dyn NoisePath, t: &[f64], frames: i64, device: Device) -> Self {
        assert!(t.len() as i64 % frames == 0, "{} times are not {frames} for each clip", t.len());
        Self::new(path, t, &[t.len() as i64 / frames, frames], device)
    }

    /// The cleanest of frames that are given at a level.
    pub fn of_levels(path: &dyn NoisePath, levels: &[i64], device: Device) -> Self {
        let t: Vec<f64> = levels.iter().map(|&level| path.level_time(level)).collect();
        Self::of_clips(path, &t, device)
    }

    fn new(path: &dyn NoisePath, t: &[f64], shape: &[i64], device: Device) -> Self {
        let rates: Vec<Rates> = t.iter().map(|&t| path.rates(t)).collect();
        let scales: Vec<f64> = t.iter().map(|&t| path.input_scale(t)).collect();
        let table: Vec<f64> = t
            .iter()
            .map(|&t| path.embed(t))
            .chain(rates.iter().map(|r| r.alpha))
            .chain(rates.iter().map(|r| r.sigma))
            .chain(scales.iter().copied())
            .collect();
        let table = upload(&Tensor::from_slice(&table).reshape([4, -1]), device);
        let beside = beside_clips(shape);
        Times {
            t: t.to_vec(),
            rates,
            embedded: table.get(0).reshape(shape),
            alpha: table.get(1).reshape(beside),
            sigma: table.get(2).reshape(beside),
            scale: scales.iter().any(|&scale| scale != 1.0).then(|| table.get(3).reshape(beside)),
            computed: RefCell::default(),
        }
    }

    /// What is on the device of them.
    pub fn tensors(&mut self) -> Vec<&mut Tensor> {
        let Times { embedded, alpha, sigma, scale, computed, .. } = self;
        let computed = computed.get_mut().iter_mut().map(|(_, values)| values);
        [embedded, alpha, sigma].into_iter().chain(scale).chain(computed).collect()
    }

    /// The times themselves, clip after clip.
    pub fn on_host(&self) -> &[f64] {
        &self.t
    }

    /// `[B]` or `[B, F]`, float64: the times as the network takes them, [`NoisePath::embed`].
    pub fn embedded(&self) -> &Tensor {
        &self.embedded
    }

    /// α·z_0 + σ·noise (paper, equation 3).
    pub fn add_noise(&self, z_0: &Tensor, noise: &Tensor) -> Tensor {
        let (alpha, sigma) = self.like(z_0);
        alpha * z_0 + sigma * noise
    }

    /// (α, σ) of each time, in shapes that broadcast over tensors like z.
    pub fn like(&self, z: &Tensor) -> (Tensor, Tensor) {
        (self.alpha.to_kind(z.kind()), self.sigma.to_kind(z.kind()))
    }

    /// z_t as the network sees it: times [`NoisePath::input_scale`].
    pub fn scaled(&self, z_t: Tensor) -> Tensor {
        match &self.scale {
            Some(scale) => scale.to_kind(z_t.kind()) * z_t,
            None => z_t,
        }
    }

    /// N numbers computed on the host from each time, float64 in shapes that broadcast over tensors like z. `what` tells them from
    /// others; the second time they are those of the first.
    pub fn compute<const N: usize>(&self, what: &'static str, of: impl Fn(f64, &Rates) -> [f64; N]) -> [Tensor; N] {
        let known = self.computed.borrow().iter().find(|(name, _)| *name == what).map(|(_, t)| t.shallow_clone());
        let values = known.unwrap_or_else(|| {
            let each: Vec<[f64; N]> = self.t.iter().zip(&self.rates).map(|(&t, rates)| of(t, rates)).collect();
            let values = Tensor::from_slice(each.as_flattened()).reshape([-1, N as i64]).tr().contiguous();
            let values = upload(&values, self.embedded.device());
            self.computed.borrow_mut().push((what, values.shallow_clone()));
            values
        });
        let shape = beside_clips(&self.embedded.size());
        std::array::from_fn(|i| values.get(i as i64).reshape(shape))
    }
}

/// `[B, 1, 1, 1, 1]` or `[B, 1, F, 1, 1]`.
fn beside_clips(shape: &[i64]) -> [i64; 5] {
    [shape[0], 1, shape.get(1).copied().unwrap_or(1), 1, 1]
}

/// The number below which a normal variable lies with probability u, 0 < u < 1.
pub(super) fn normal_quantile(u: f64) -> f64 {
    Tensor::from(u).special_ndtri().double_value(&[])
}

/// # Errors
/// A walk of fewer steps than that.
pub(super) fn at_least(least: i64, steps: i64) -> Result<()> {
    anyhow::ensure!((least..=1_000_000).contains(&steps), "steps must be between {least} and 1,000,000, not {steps}");
    Ok(())
}
