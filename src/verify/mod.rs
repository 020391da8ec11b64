//! Cases that independent implementations computed, against this build.

mod autoencoder;
mod case;
mod diffusion;
mod extractors;
mod latte;
mod mcvd;
mod outputs;
mod paths;
mod stable_diffusion;
mod straight;
mod tats;
mod transformer;

use std::path::Path;

use anyhow::{Context, Result, bail};
use tch::{Device, Kind};

use case::{Case, distance};
use outputs::Outputs;

pub use case::Distance;

/// How close a build came to a case.
pub struct Verdict {
    /// Of all the case's outputs the one that is farthest off.
    pub worst: Distance,
    /// How far off, relative to the output's size, it may be.
    pub bound: f64,
}

impl Verdict {
    /// Whether the case passes; what is not a number does not.
    pub fn is_ok(&self) -> bool {
        self.worst.relative <= self.bound
    }
}

/// A case that can be computed.
pub struct Runnable {
    case: Case,
    component: Component,
}

impl Runnable {
    /// Reads a case file. `weights` is the checkpoint for a case that names one, by default the named file beside the case; with
    /// `half`, networks, losses and samplers compute in bfloat16.
    ///
    /// # Errors
    /// A file that is not a case, or names an unknown component.
    pub fn read(path: &Path, weights: Option<&Path>, device: Device, half: bool) -> Result<Self> {
        let case = Case::read(path, weights, device, half)?;
        match components(&case.component) {
            None => bail!("unknown component `{}`", case.component),
            Some(component) => Ok(Runnable { case, component }),
        }
    }

    /// What the case is of.
    pub fn component(&self) -> &str {
        &self.case.component
    }

    /// Computes the case and compares.
    ///
    /// # Errors
    /// A case that lacks something or expects what nothing computes.
    pub fn run(&self) -> Result<Verdict> {
        let results = (self.component.run)(&self.case)?;
        compare(&self.case, &self.component, &results)
    }
}

/// How a component is computed, and how close it must come in float32 and in bfloat16.
struct Component {
    run: fn(&Case) -> Result<Outputs>,
    bound: f64,
    half_bound: f64,
}

fn components(name: &str) -> Option<Component> {
    let exact = |run, bound| Component { run, bound, half_bound: bound };
    let network = |run| Component { run, bound: 1e-4, half_bound: 2e-2 };
    Some(match name {
        "autoencoder" => network(autoencoder::autoencoder),
        "patch_discriminator" => network(autoencoder::patch_discriminator),
        "video_discriminator" => network(autoencoder::video_discriminator),
        "autoencoder_loss" => network(autoencoder::loss),
        "autoencoder_trace" => exact(autoencoder::trace, 1e-4),
        "tats_vqgan" => network(tats::vqgan),
        "tats_loss" => network(tats::loss),
        "vector_quantizer_ema" => network(tats::codebook),
        "unet3d" => network(diffusion::unet),
        "diffusion_loss" => network(diffusion::loss),
        "sampler" => Component { run: diffusion::sampler, bound: 1e-4, half_bound: 5e-2 },
        "schedule" => exact(diffusion::schedule, 1e-6),
        "flow_loss" => network(straight::flow_loss),
        "flow_sampling" => Component { run: straight::flow_sampling, bound: 1e-4, half_bound: 5e-2 },
        "edm_loss" => network(straight::edm_loss),
        "flow_times" => exact(paths::flow_times, 1e-6),
        "edm_precondition" => exact(paths::edm_precondition, 1e-6),
        "min_snr_weight" => exact(paths::min_snr_weight, 1e-6),
        "v_prediction" => exact(paths::v_prediction, 1e-6),
        "zero_terminal_snr" => exact(paths::zero_terminal_snr, 1e-6),
        "i3d" => exact(extractors::i3d, 1e-3),
        "lpips" => network(extractors::lpips),
        "vgg16_frames" => exact(extractors::vgg16_frames, 1e-4),
        "video_mae_v2" => exact(extractors::video_mae_v2, 1e-5),
        "v_jepa" => exact(extractors::v_jepa, 1e-5),
        "video_metrics" => exact(extractors::video_metrics, 1e-3),
        "feature_metrics" => exact(extractors::feature_metrics, 1e-3),
        "sd_unet" => network(stable_diffusion::unet),
        "sd_vae" => network(stable_diffusion::autoencoder),
        "clip_text" => network(stable_diffusion::text_encoder),
        "latte" => Component { run: latte::network, bound: 2e-5, half_bound: 2e-2 },
        "learned_sigma_loss" => network(latte::loss),
        "learned_sigma_sampling" => Component { run: latte::sampling, bound: 1e-4, half_bound: 5e-2 },
        "mcvd_unet" => network(mcvd::network),
        "mcvd_loss" => network(mcvd::loss),
        "mcvd_schedule" => exact(mcvd::schedule, 1e-6),
        "mcvd_sampling" => Component { run: mcvd::sampling, bound: 1e-4, half_bound: 5e-2 },
        "gpt" => network(transformer::gpt),
        "top_k_top_p" => exact(transformer::filter, 1e-4),
        // in bf16 one other token changes all that follow
        "tats_sampling" => Component { run: transformer::sampling, bound: 1e-4, half_bound: f64::INFINITY },
        "diffusion_trace" => exact(diffusion::trace, 1e-4),
        _ => return None,
    })
}

fn compare(case: &Case, component: &Component, results: &Outputs) -> Result<Verdict> {
    let mut worst = Distance { absolute: 0.0, relative: 0.0 };
    let mut compared = 0;
    for (name, reference) in case.expected() {
        let (_, result) = results
            .iter()
            .find(|(n, _)| *n == name)
            .with_context(|| format!("nothing computes the expected `out.{name}`"))?;
        // codes have no bound in half precision: one that flips changes all after it
        if case.half && result.kind() == Kind::Int64 {
            continue;
        }
        let found = distance(result, reference).with_context(|| format!("out.{name}"))?;
        compared += 1;
        // NaN is the worst, and stays it
        let worse = found.relative.is_nan() || found.relative > worst.relative;
        if worse && !worst.relative.is_nan() {
            worst = found;
        }
    }
    if compared == 0 {
        bail!("the case expects nothing (no `out.*`)");
    }
    let bound = if case.half { component.half_bound } else { component.bound };
    Ok(Verdict { worst, bound })
}
