//! From noise to latents: one loop, and what differs between samplers.

use anyhow::Result;
use tch::{Tensor, no_grad};

use super::{denoiser::Denoiser, path::NoisePath, prediction::Prediction};
use crate::torch::FixedWeights;

/// A way from noise to z_0. It knows nothing of masks, guidance or text.
pub trait Sampler {
    /// Begins one walk along a noise path.
    ///
    /// # Errors
    /// If its settings do not fit the path.
    fn start(&self, path: &dyn NoisePath) -> Result<Box<dyn SamplerRun>>;

    /// The sampler and its settings in words, as they are stored with figures: `DDIM 50 steps, η = 1`.
    fn describe(&self) -> String;
}

/// One walk from noise to z_0. It may keep earlier predictions.
pub trait SamplerRun {
    /// The diffusion times at which the denoiser is called, in order.
    fn times(&self) -> &[f64];

    /// The next z `[B, C, F, h, w]`, from the prediction at the i-th of these times. `noise()` draws standard normal noise of
    /// the shape of z; after the last time, the result is z_0.
    fn step(&mut self, i: usize, prediction: &Prediction, noise: &dyn Fn() -> Tensor) -> Tensor;
}

/// Walks from standard normal noise `start`, `[B, C, F, h, w]`, to z_0 of the same shape, without gradients. `noise(i)` draws
/// the noise of step i; `on_step(i, steps)` is called after each step.
///
/// # Errors
/// If the sampler's settings do not fit the path.
pub fn sample(
    denoiser: &dyn Denoiser,
    sampler: &dyn Sampler,
    path: &dyn NoisePath,
    start: &Tensor,
    noise: &dyn Fn(usize) -> Tensor,
    on_step: &mut dyn FnMut(usize, usize),
) -> Result<Tensor> {
    let mut run = sampler.start(path)?;
    let times = run.times().to_vec();
    let mut z = match path.start_deviation() {
        1.0 => start.shallow_clone(),
        deviation => start * deviation,
    };
    let _weights = FixedWeights::new();
    for (i, &t) in times.iter().enumerate() {
        z = no_grad(|| {
            let prediction = denoiser.predict(&z, t);
            run.step(i, &prediction, &|| noise(i))
        });
        on_step(i + 1, times.len());
    }
    Ok(z)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{
        Ancestral, CosineLogSnr, Ddim, Ddpm, DpmSolver, Edm, Euler, Heun, NoiseSchedule, RectifiedFlow, RespacedDdim,
        RespacedDdpm, ScheduleConfig, UniPc, Variance,
    };

    /// The exact score of a Gaussian.
    struct Exact<'a>(&'a dyn NoisePath);
    const VARIANCE: f64 = 0.25;
    const MEAN: f64 = 0.7;
    impl Denoiser for Exact<'_> {
        fn predict(&self, z_t: &Tensor, t: f64) -> Prediction {
            let (alpha, sigma) = self.0.alpha_sigma(t);
            let spread = alpha * alpha * VARIANCE + sigma * sigma;
            let off = z_t - alpha * MEAN;
            let (z_0, noise) = (MEAN + &off * (alpha * VARIANCE / spread), off * (sigma / spread));
            Prediction { z_t: z_t.shallow_clone(), z_0, noise, variance: None }
        }
    }

    fn none(_: usize) -> Tensor {
        panic!("it draws noise")
    }

    /// The solvers' nodes go down from T − 1 to 0 without a repetition.
    #[test]
    fn nodes_fall_to_zero() {
        let schedule = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        for steps in [2, 3, 5, 10, 20, 50, 100, 250, 999, 1000] {
            let nodes = schedule.nodes(steps).unwrap();
            assert_eq!((nodes.len() as i64, nodes[0]), (steps, 999.0));
            assert_eq!(nodes.last(), Some(&0.0), "{steps} steps");
            assert!(nodes.windows(2).all(|w| w[0] > w[1]), "{steps}: {nodes:?}");
        }
        for steps in [0, 1, 1001] {
            assert!(DpmSolver { steps }.start(&schedule).is_err() && UniPc { steps }.start(&schedule).is_err());
        }
    }

    /// Along the exact score of a Gaussian, (z − √ᾱ·mean)/√(ᾱ·variance + 1 − ᾱ) is the same at all times, so the end of
    /// the ODE is known: twice the steps must divide a solver's error by four, DDIM's by two.
    #[test]
    fn solvers_are_of_second_order() {
        let config = ScheduleConfig { steps: 20_000, beta_start: 7.5e-5, beta_end: 7.75e-4, ..Default::default() };
        let schedule = NoiseSchedule::new(&config).unwrap();
        let start = Tensor::from_slice(&[-1.3, 0.4, 2.1]);
        let spread = |t: usize| (schedule.alpha_bar[t] * VARIANCE + 1.0 - schedule.alpha_bar[t]).sqrt();
        // the sampler's last step makes z_0 of z at time 0
        let last = schedule.steps() as usize - 1;
        let z = (&start - schedule.alpha_bar[last].sqrt() * MEAN) * (spread(0) / spread(last));
        let end = Exact(&schedule).predict(&(z + schedule.alpha_bar[0].sqrt() * MEAN), 0.0).z_0;
        let error = |sampler: &dyn Sampler| {
            let z = sample(&Exact(&schedule), sampler, &schedule, &start, &none, &mut |_, _| {}).unwrap();
            (z - &end).abs().max().double_value(&[])
        };
        let order = |make: &dyn Fn(i64) -> Box<dyn Sampler>| (error(&*make(20)) / error(&*make(80))).log2() / 2.0;
        let (ddim, dpm, unipc) = (
            order(&|steps| Box::new(Ddim { steps, eta: 0.0 })),
            order(&|steps| Box::new(DpmSolver { steps })),
            order(&|steps| Box::new(UniPc { steps })),
        );
        assert!((0.5..1.4).contains(&ddim), "DDIM is of order {ddim}");
        assert!(dpm > 1.7, "DPM-Solver++ is of order {dpm}");
        assert!(unipc > 1.7, "UniPC is of order {unipc}");
        let at = |sampler: &dyn Sampler| error(sampler);
        let (ddim, dpm, unipc) =
            (at(&Ddim { steps: 20, eta: 0.0 }), at(&DpmSolver { steps: 20 }), at(&UniPc { steps: 20 }));
        assert!(unipc < dpm && dpm < ddim, "20 steps: DDIM {ddim}, DPM-Solver++ {dpm}, UniPC {unipc}");
    }

    /// The same on straight paths, whose ODE ends at no noise, where the spread is that of the Gaussian.
    #[test]
    fn heun_is_of_second_order_and_euler_of_first() {
        let flow = RectifiedFlow::default();
        let shifted = RectifiedFlow { shift: 3.0, ..RectifiedFlow::default() };
        // EDM's last step is Euler's in any case, from a σ_min that bounds the error
        let edm = Edm { sigma_min: 1e-6, ..Edm::default() };
        let start = Tensor::from_slice(&[-1.3, 0.4, 2.1]);
        for (name, path) in [("flow", &flow as &dyn NoisePath), ("shifted", &shifted), ("edm", &edm)] {
            let (alpha, sigma) = path.alpha_sigma(path.noisiest());
            let spread = (alpha * alpha * VARIANCE + sigma * sigma).sqrt();
            let end = (&start * path.start_deviation() - alpha * MEAN) * (VARIANCE.sqrt() / spread) + MEAN;
            let error = |sampler: &dyn Sampler| {
                let z = sample(&Exact(path), sampler, path, &start, &none, &mut |_, _| {}).unwrap();
                (z - &end).abs().max().double_value(&[])
            };
            let order = |make: &dyn Fn(i64) -> Box<dyn Sampler>| (error(&*make(40)) / error(&*make(160))).log2() / 2.0;
            let euler = order(&|steps| Box::new(Euler { steps }));
            let heun = order(&|steps| Box::new(Heun { steps }));
            assert!((0.6..1.4).contains(&euler), "{name}: Euler is of order {euler}");
            assert!(heun > 1.7, "{name}: Heun is of order {heun}");
            // without noise DDIM is Euler's rule on straight paths
            let (ddim, euler) = (error(&Ddim { steps: 20, eta: 0.0 }), error(&Euler { steps: 20 }));
            assert!((ddim - euler).abs() < 1e-9, "{name}: {ddim} and {euler}");
            for sampler in [&DpmSolver { steps: 40 } as &dyn Sampler, &UniPc { steps: 40 }] {
                let (found, first) = (error(sampler), error(&Euler { steps: 40 }));
                assert!(found < 0.7 * first, "{name}: {} {found}, Euler {first}", sampler.describe());
            }
        }
    }

    /// With the exact score of a Gaussian the walk must arrive at that Gaussian.
    #[test]
    fn a_gaussian_is_sampled_exactly() {
        use crate::random::{Purpose, normal};
        let steps = NoiseSchedule::new(&ScheduleConfig::default()).unwrap();
        let config = ScheduleConfig { zero_terminal_snr: true, ..Default::default() };
        let to_noise = NoiseSchedule::new(&config).unwrap();
        let (flow, edm, cosine) = (RectifiedFlow::default(), Edm::default(), CosineLogSnr::default());
        let shape = [1, 1, 1, 100, 200];
        let runs: [(&str, &dyn NoisePath, Box<dyn Sampler>); 24] = [
            ("respaced ddpm", &steps, Box::new(RespacedDdpm { steps: 1000 })),
            ("respaced ddim 0", &steps, Box::new(RespacedDdim { steps: 250, eta: 0.0 })),
            ("respaced ddim 1", &steps, Box::new(RespacedDdim { steps: 250, eta: 1.0 })),
            ("dpm-solver", &steps, Box::new(DpmSolver { steps: 20 })),
            ("unipc", &steps, Box::new(UniPc { steps: 20 })),
            ("ddpm", &steps, Box::new(Ddpm { variance: Variance::Posterior })),
            ("ddpm beta", &steps, Box::new(Ddpm { variance: Variance::Beta })),
            ("ddim 0", &steps, Box::new(Ddim { steps: 100, eta: 0.0 })),
            ("ddim 1", &steps, Box::new(Ddim { steps: 250, eta: 1.0 })),
            ("heun", &steps, Box::new(Heun { steps: 20 })),
            ("zero SNR, ddim", &to_noise, Box::new(Ddim { steps: 250, eta: 0.0 })),
            ("zero SNR, ddpm", &to_noise, Box::new(Ddpm { variance: Variance::Posterior })),
            ("zero SNR, unipc", &to_noise, Box::new(UniPc { steps: 20 })),
            ("flow, heun", &flow, Box::new(Heun { steps: 20 })),
            ("flow, ddim 1", &flow, Box::new(Ddim { steps: 250, eta: 1.0 })),
            ("flow, unipc", &flow, Box::new(UniPc { steps: 40 })),
            ("edm, heun", &edm, Box::new(Heun { steps: 20 })),
            ("edm, ddim 1", &edm, Box::new(Ddim { steps: 250, eta: 1.0 })),
            ("cosine, dpm-solver", &cosine, Box::new(DpmSolver { steps: 40 })),
            ("cosine, ddim 1", &cosine, Box::new(Ddim { steps: 250, eta: 1.0 })),
            ("cosine, ancestral", &cosine, Box::new(Ancestral::default())),
            ("cosine, corrected", &cosine, Box::new(Ancestral { corrector: 0.1, ..Ancestral::default() })),
            ("ancestral", &steps, Box::new(Ancestral { gamma: 0.0, ..Ancestral::default() })),
            ("flow, ancestral", &flow, Box::new(Ancestral { gamma: 0.0, ..Ancestral::default() })),
        ];
        for (name, path, sampler) in runs {
            let z = sample(
                &Exact(path),
                &*sampler,
                path,
                &normal(1, Purpose::SampleStart, 0, 0, &shape),
                &|i| normal(1, Purpose::SampleStep, 0, i as u64, &shape),
                &mut |_, _| {},
            )
            .unwrap();
            let (mean, std) = (z.mean(None).double_value(&[]), z.std(true).double_value(&[]));
            assert!((mean - MEAN).abs() < 0.02 && (std - VARIANCE.sqrt()).abs() < 0.02, "{name}: {mean} ± {std}");
        }
    }
}
