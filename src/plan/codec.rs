//! The codec of a denoiser that is planned: by its run's own settings, or by the experiment that would make the run.

use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};

use super::PlanOptions;
use crate::{
    checkpoint,
    codecs::CodecConfig,
    experiment::{AutoencoderExperiment, DiffusionSpace, UserError, read},
    run_files::AUTOENCODER_FILE,
};

/// A codec, and how it is known.
#[derive(Debug, Clone)]
pub(super) struct PlannedCodec {
    /// Its settings; none where pixels are denoised.
    pub settings: Option<CodecConfig>,
    /// Where they were found, where that is not the run itself.
    pub note: Option<String>,
}

/// The codec of a denoiser's space, for an experiment that stands in `file`.
pub(super) fn codec(file: &Path, space: &DiffusionSpace, options: &PlanOptions) -> Result<PlannedCodec> {
    let DiffusionSpace::Latents(run) = space else {
        return Ok(PlannedCodec { settings: None, note: None });
    };
    if run.exists() {
        let inside = run.join(AUTOENCODER_FILE);
        let (path, found) = checkpoint::open_head(if inside.is_file() { &inside } else { run })?;
        let found = found.expect("autoencoder", &path)?;
        let settings = CodecConfig::stored(found.experiment["autoencoder"].clone())
            .with_context(|| format!("the autoencoder stored in {}", path.display()))?;
        let note =
            options.codec.is_some().then(|| format!("The codec is that of {}, not --autoencoder.", run.display()));
        return Ok(PlannedCodec { settings: Some(settings), note });
    }
    if let Some(experiment) = experiment_of(file, run).filter(|path| path.is_file()) {
        let settings = read::<AutoencoderExperiment>(&experiment, &[])?.autoencoder;
        let note = format!("{} is not there: its codec is the one of {}.", run.display(), experiment.display());
        return Ok(PlannedCodec { settings: Some(settings), note: Some(note) });
    }
    if let Some(settings) = options.codec.clone() {
        let kind = serde_json::to_value(&settings)?["kind"].as_str().unwrap_or_default().to_string();
        let note = format!("{} is not there: its codec is the {kind} that --autoencoder says.", run.display());
        return Ok(PlannedCodec { settings: Some(settings), note: Some(note) });
    }
    let text = format!(
        "autoencoder: there is no {}, and no experiment that would make it; say which codec it will have: \
         --autoencoder FILE (an experiment of `lvdm train autoencoder`), or its settings, as --autoencoder \
         '{{kind: image_autoencoder}}' for that of Stable Diffusion",
        run.display()
    );
    Err(UserError(text).into())
}

/// `experiments/x/diffusion.yaml` and `runs/x/autoencoder` → `experiments/x/autoencoder.yaml`: where the experiment of a run
/// stands that has its usual name.
fn experiment_of(file: &Path, run: &Path) -> Option<PathBuf> {
    let parts: Vec<Component> = file.components().collect();
    let root = parts.iter().rposition(|part| part.as_os_str() == "experiments")?;
    let below = run.strip_prefix("runs").ok()?;
    let root: PathBuf = parts[..=root].iter().collect();
    let mut file = root.join(below).into_os_string();
    file.push(".yaml");
    Some(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_experiment_of_a_run_stands_where_its_name_says() {
        let of = |file: &str, run: &str| experiment_of(Path::new(file), Path::new(run));
        assert_eq!(
            of("/a/experiments/ucf101/diffusion.yaml", "runs/ucf101/autoencoder"),
            Some("/a/experiments/ucf101/autoencoder.yaml".into())
        );
        assert_eq!(of("experiments/x.yaml", "runs/sd/vae-1.5"), Some("experiments/sd/vae-1.5.yaml".into()));
        assert_eq!(of("mine.yaml", "runs/ucf101/autoencoder"), None);
        assert_eq!(of("experiments/x.yaml", "/elsewhere/autoencoder"), None);
    }
}
