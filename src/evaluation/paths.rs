//! An evaluation of two paths, where no experiment file says what to compare.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{
    checkpoint,
    data::{DataConfig, DatasetConfig, decode_workers},
    experiment::{EvaluationConfig, EvaluationExperiment, Experiment, Generated, Precision, UserError, protocol},
    extractors::ExtractorConfig,
    metrics::Metric,
    run_files::is_run,
};

/// Real videos, generated ones, and how they are compared. What is not said is the protocol's, the run's, or a default.
#[derive(Debug, Clone, Default)]
pub struct VideoPaths {
    /// A folder of videos or of folders of pictures, an index (`.jsonl`), a numpy array (`.npz`, `.npy`: uint8
    /// `[N, F, H, W, 3]`), a packed file.
    pub real: PathBuf,
    /// One split of the real videos, which are an index.
    pub split: Option<String>,
    /// Generated videos in the same ways, or a diffusion run, which is sampled.
    pub generated: PathBuf,
    /// A protocol's name or file; without one as many clips as are asked for, of the size that is given here.
    pub protocol: Option<String>,
    /// Clips of each set; without a number the protocol's, or as many as there are, at most 2048.
    pub clips: Option<i64>,
    /// Frames of a clip; else 16, or the run's.
    pub frames: Option<i64>,
    /// Every n-th frame of the real videos; else the protocol's, the run's, or 1.
    pub frame_stride: Option<i64>,
    /// Height and width of a clip; else 256, or the run's.
    pub resolution: Option<i64>,
    /// Whose features are compared; else the protocol's extractor, or I3D.
    pub extractor: Option<ExtractorConfig>,
    /// Which metrics; else FVD and KVD.
    pub metrics: Option<Vec<Metric>>,
    /// Which real clips.
    pub seed: u64,
    /// Folder for the figures; else one in `runs/evaluation` for these videos and these settings.
    pub out: Option<PathBuf>,
}

impl VideoPaths {
    /// The experiment that they stand for.
    ///
    /// # Errors
    /// [`UserError`]: paths that hold no videos, settings that do not fit together.
    pub fn experiment(&self) -> Result<EvaluationExperiment> {
        let VideoPaths { real, generated, .. } = self;
        let run = is_run(generated).then(|| trained_on(generated)).transpose()?;
        let config = self.protocol.as_deref().map(protocol).transpose()?;
        let (frames, resolution) = match (&config, &run) {
            (Some(config), _) => (config.frames, config.resolution),
            (None, Some(data)) => (data.frames, data.resolution),
            (None, None) => (16, 256),
        };
        let asked = config.as_ref().and_then(|config| config.frame_stride);
        let stride = self.frame_stride.or(asked).or(run.as_ref().map(|data| data.frame_stride)).unwrap_or(1);
        let data = |path: &Path, frame_stride| -> Result<DataConfig> {
            Ok(DataConfig {
                dataset: DatasetConfig::at(path).map_err(|error| UserError(format!("{error:#}")))?,
                frames: self.frames.unwrap_or(frames),
                frame_stride,
                resolution: self.resolution.unwrap_or(resolution),
                flip: false,
                workers: decode_workers(),
            })
        };
        let mut real = data(real, stride)?;
        if let Some(split) = &self.split {
            real.dataset = real.dataset.of_split(split).map_err(|error| UserError(format!("{error:#}")))?;
        }
        let (generated, found) = match run {
            Some(_) => (
                Generated::Run {
                    run: generated.into(),
                    sampler: None,
                    batch: 16,
                    precision: Precision::default(),
                    tf32: false,
                    guidance: None,
                },
                i64::MAX,
            ),
            None => {
                let data = data(generated, 1)?;
                let found = data.videos()?.videos.len() as i64;
                if found < 2 {
                    let text =
                        format!("{} holds one video; a distance between sets needs 2 at least", generated.display());
                    return Err(UserError(text).into());
                }
                (Generated::Clips { data }, found)
            }
        };
        let evaluation = EvaluationConfig {
            protocol: self.protocol.clone(),
            clips: self.clips.or(config.is_none().then(|| found.min(2048))),
            extractor: self.extractor.clone(),
            metrics: self.metrics.clone(),
        };
        let out = match &self.out {
            Some(out) => out.clone(),
            None => own_folder(&evaluation, &real, &generated, self.seed)?,
        };
        let experiment = EvaluationExperiment { seed: self.seed, evaluation, real, generated, train: None, out };
        experiment.validate().map_err(|error| UserError(format!("{error:#}")))?;
        Ok(experiment)
    }
}

/// The clips that a run was trained on, of whatever family it is.
fn trained_on(run: &Path) -> Result<DataConfig> {
    let (path, head) = checkpoint::open_head(run)?;
    serde_json::from_value(head.experiment["data"].clone())
        .with_context(|| format!("the data stored in {}", path.display()))
}

/// A folder that no other videos and no other settings have: figures never take the place of different ones.
fn own_folder(evaluation: &EvaluationConfig, real: &DataConfig, generated: &Generated, seed: u64) -> Result<PathBuf> {
    let (DataConfig { frames, frame_stride, resolution, .. }, real) = (real, real.videos()?.fingerprint()?);
    let protocol = evaluation.protocol.as_deref().map(protocol).transpose()?;
    let (path, generated) = match generated {
        Generated::Run { run, .. } => (run.as_path(), json!(generated)),
        Generated::Clips { data } => (data.dataset.path(), json!(data.videos()?.fingerprint()?)),
    };
    let mut settings = json!(evaluation);
    // without metrics of its own an evaluation has the folder that it had before metrics could be chosen
    if let (None, Some(settings)) = (&evaluation.metrics, settings.as_object_mut()) {
        settings.remove("metrics");
    }
    let asked = json!([protocol, settings, frames, frame_stride, resolution, real, generated, seed]);
    let hash = format!("{:x}", Sha256::digest(asked.to_string()));
    let name = path.file_stem().map_or("generated".into(), |name| name.to_string_lossy());
    Ok(Path::new("runs/evaluation").join(format!("{name}-{}", &hash[..8])))
}
