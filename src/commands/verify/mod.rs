//! `lvdm verify`: runs cases that independent implementations computed, and compares.

mod autoencoder;
mod case;
mod diffusion;
mod extractors;
mod latte;
mod paths;
mod stable_diffusion;
mod straight;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tch::{Device, Tensor};

use crate::{experiment::Mistake, torch::DeviceName};

use case::{Case, Distance, distance};

/// What a component computed, by the names of the case's `out.*`.
type Outputs = Vec<(&'static str, Tensor)>;

/// One line of the table.
struct Row {
    component: String,
    worst: Distance,
    bound: f64,
}

/// Compare this build with what reference implementations computed
#[derive(Debug, clap::Args)]
pub struct Verify {
    /// Case files (safetensors)
    #[arg(required = true)]
    cases: Vec<PathBuf>,
    /// Checkpoint for cases that name one (default: the named file beside the case)
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Where to compute
    #[arg(long, default_value = "cpu")]
    device: DeviceName,
    /// Precision of networks, losses and samplers
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Dtype,
}

#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Dtype {
    F32,
    /// bfloat16 products and convolutions, float32 weights
    Bf16,
}

impl Verify {
    /// Prints a row a case.
    ///
    /// # Errors
    /// [`Mistake`] where a file is not a case or names an unknown component; another error where a case fails.
    pub fn run(self) -> Result<()> {
        let device = self.device.open()?;
        let width = self.cases.iter().map(|c| file_name(c).len()).max().unwrap_or(0).max(4);
        say!("{:width$}  {:22} {:>9} {:>9} {:>7}  ", "case", "component", "abs", "rel", "bound");
        let (mut failed, mut unusable) = (0, 0);
        for path in &self.cases {
            let name = file_name(path);
            let case = Case::read(path, self.weights.as_deref(), device, self.dtype == Dtype::Bf16);
            let row = case.and_then(|case| match components(&case.component) {
                None => bail!("unknown component `{}`", case.component),
                Some(component) => Ok((case, component)),
            });
            let (case, component) = match row {
                Ok(found) => found,
                Err(error) => {
                    unusable += 1;
                    say!("{name:width$}  not a case: {error:#}");
                    continue;
                }
            };
            match run_case(&case, component) {
                Ok(Row { component, worst: Distance { absolute, relative }, bound }) => {
                    let ok = relative <= bound; // false for NaN
                    failed += usize::from(!ok);
                    let verdict = if ok { "ok" } else { "FAIL" };
                    say!("{name:width$}  {component:22} {absolute:9.2e} {relative:9.2e} {bound:7.0e}  {verdict}");
                }
                Err(error) => {
                    failed += 1;
                    say!("{name:width$}  {:18} FAIL: {error:#}", case.component);
                }
            }
        }
        if unusable > 0 {
            return Err(Mistake(format!("{unusable} of {} files cannot be verified", self.cases.len())).into());
        }
        if failed > 0 {
            bail!("{failed} of {} cases failed", self.cases.len());
        }
        Ok(())
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
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
        "diffusion_trace" => exact(diffusion::trace, 1e-4),
        _ => return None,
    })
}

fn run_case(case: &Case, component: Component) -> Result<Row> {
    let results = (component.run)(case)?;
    let mut worst = Distance { absolute: 0.0, relative: 0.0 };
    let mut compared = 0;
    for (name, reference) in case.expected() {
        let (_, result) = results
            .iter()
            .find(|(n, _)| *n == name)
            .with_context(|| format!("nothing computes the expected `out.{name}`"))?;
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
    Ok(Row { component: case.component.clone(), worst, bound })
}

/// What a tensor holds, on the host.
fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::try_from(tensor.to_device(Device::Cpu).to_kind(tch::Kind::Double).flatten(0, -1))?)
}

/// A scalar result.
fn scalar(value: f64) -> Tensor {
    Tensor::from(value).to_device(Device::Cpu)
}

/// L2 norm over the gradients of all parameters.
fn gradient_norm(parameters: &crate::nn::Parameters) -> Tensor {
    let square = |p: &Tensor| {
        let gradient = p.grad();
        if gradient.defined() { gradient.to_kind(tch::Kind::Double).square().sum(None).double_value(&[]) } else { 0.0 }
    };
    scalar(parameters.trainable().iter().map(|(_, p)| square(p)).sum::<f64>().sqrt())
}

/// How far each named parameter went from where it was, in the order of `names` (aliases accepted).
fn moved(
    parameters: &crate::nn::Parameters,
    before: &[(String, Tensor)],
    now: &[(String, Tensor)],
    names: &[String],
) -> Result<Tensor> {
    let aliases = parameters.aliases();
    let distances: Result<Vec<f64>> = names
        .iter()
        .map(|name| {
            let own = aliases.iter().find(|(alias, _)| alias == name).map_or(name, |(_, own)| own);
            let of = |list: &[(String, Tensor)]| list.iter().find(|(n, _)| n == own).map(|(_, t)| t.shallow_clone());
            match (of(before), of(now)) {
                (Some(a), Some(b)) => Ok((a - b).square().sum(None).sqrt().double_value(&[])),
                _ => bail!("the case names a parameter `{name}` that the network does not have"),
            }
        })
        .collect();
    Ok(Tensor::from_slice(&distances?))
}
