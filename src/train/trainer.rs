//! The one training loop.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::{Device, Tensor};

use super::{Ema, Optimizer, logger::RunLogger, progress::Progress as ProgressBar};
use crate::{
    atomic_file::write_atomically,
    checkpoint::{self, Checkpoint, Progress},
    data::pictures,
    experiment::{OptimizerConfig, Precision, TrainerConfig},
    nn::Parameters,
    torch::Autocast,
};

/// What a step is made of.
pub struct Batch {
    /// `[B, …]` on the host; what it holds is the task's.
    pub data: Tensor,
    /// Encoded texts `[B, S, width]` on the network's device, for a network that is given any.
    pub text: Option<Tensor>,
    /// The number of each sample, counted over the whole training.
    pub samples: Vec<u64>,
    /// The sample after the last one.
    pub position: u64,
}

/// Something to look at.
pub struct Picture {
    pub name: &'static str,
    /// u8 `[N, 3, F, H, W]`
    pub clips: Tensor,
}

/// A network that is updated on its own.
pub struct Phase {
    /// Prefix of its tensors in a checkpoint; the first phase's is `model`.
    pub name: &'static str,
    /// What the norm of its gradient is called in the log.
    pub gradient_norm: &'static str,
    pub parameters: Parameters,
}

/// What differs between training an autoencoder and a denoiser.
pub trait Task {
    /// Name in checkpoints and errors.
    fn name(&self) -> &'static str;

    /// The networks, in the order in which a step updates them. The first one is averaged.
    fn phases(&self) -> Vec<Phase>;

    /// The next samples.
    ///
    /// # Errors
    /// Where the data cannot be read.
    fn next_batch(&mut self) -> Result<Batch>;

    /// Accumulates `scale` times the gradient of a phase's loss, and says its terms; the first is the loss.
    ///
    /// # Errors
    /// Where the batch does not fit the network.
    fn gradients(&mut self, phase: usize, batch: &Batch, step: i64, scale: f64) -> Result<Vec<(&'static str, f64)>>;

    /// What to show at this step, with the averaged weights in place.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    fn pictures(&mut self) -> Result<Vec<Picture>>;

    /// How many videos could not be used so far.
    fn skipped_videos(&self) -> usize {
        0
    }

    /// Measured values that belong to the network: stored in every checkpoint.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    fn measure(&mut self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }
}

/// Owns accumulation, clipping, the finite check, the average, logging, checkpoints and resume.
pub struct Trainer<T: Task> {
    pub task: T,
    run: PathBuf,
    config: TrainerConfig,
    optimizer_config: OptimizerConfig,
    experiment: Value,
    device: Device,
    phases: Vec<Phase>,
    optimizers: Vec<Optimizer>,
    ema: Option<Ema>,
    progress: Progress,
}

/// The checkpoint with which a run goes on, if there is one.
///
/// # Errors
/// Where the run is another task's, or no checkpoint can be read.
pub fn resume_point(run: &Path, task: &str) -> Result<Option<Checkpoint>> {
    match checkpoint::latest(run)? {
        Some((path, found)) => Ok(Some(found.expect(task, &path)?)),
        None => Ok(None),
    }
}

impl<T: Task> Trainer<T> {
    /// Starts a run, or goes on from `resume`. `experiment` is written into the run and its checkpoints.
    ///
    /// # Errors
    /// A folder that cannot be written; a checkpoint of another architecture.
    pub fn new(
        task: T,
        run: &Path,
        config: &TrainerConfig,
        optimizer_config: &OptimizerConfig,
        experiment: &impl serde::Serialize,
        device: Device,
        resume: Option<Checkpoint>,
    ) -> Result<Self> {
        let phases = task.phases();
        let mut optimizers: Vec<Optimizer> =
            phases.iter().map(|phase| Optimizer::new(optimizer_config.adam(), &phase.parameters)).collect();
        let mut ema = config.ema_decay.map(|decay| Ema::new(decay, &phases[0].parameters));
        let mut progress = Progress { step: 0, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
        if let Some(found) = resume {
            for (i, (phase, optimizer)) in phases.iter().zip(&mut optimizers).enumerate() {
                let (weights, state) = (found.part(phase.name), found.part(&format!("optimizer.{}", phase.name)));
                if i > 0 && weights.is_empty() {
                    tracing::warn!("{} has no {}: it starts anew", run.display(), phase.name);
                    continue;
                }
                phase.parameters.load(&weights).with_context(|| {
                    format!(
                        "{} was trained with other settings; give another --run, or delete it to start anew",
                        run.display()
                    )
                })?;
                // an imported run has none
                if state.is_empty() {
                    tracing::warn!("{} has no state of the {}'s optimizer: it starts anew", run.display(), phase.name);
                } else {
                    optimizer.load_state(&state)?;
                }
            }
            let average = found.part("ema");
            if average.is_empty() {
                ema = config.ema_decay.map(|decay| Ema::new(decay, &phases[0].parameters));
            } else if let Some(ema) = &mut ema {
                ema.load_state(found.progress.ema_updates, &average)?;
            }
            progress = found.progress;
        }
        let yaml = serde_yaml::to_string(experiment)?;
        write_atomically(&run.join("experiment.yaml"), |file| Ok(std::io::Write::write_all(file, yaml.as_bytes())?))?;
        Ok(Trainer {
            task,
            run: run.to_path_buf(),
            config: config.clone(),
            optimizer_config: optimizer_config.clone(),
            experiment: serde_json::to_value(experiment)?,
            device,
            phases,
            optimizers,
            ema,
            progress,
        })
    }

    /// Trains to the last step and returns how it went.
    ///
    /// # Errors
    /// Data that cannot be read; losses that stay non-finite; a full disk; out of memory, with what lowers it.
    pub fn train(mut self) -> Result<Progress> {
        let resumed = (self.progress.step > 0).then_some(self.progress.step);
        let mut log = RunLogger::open(&self.run, resumed)?;
        if let Some(step) = resumed {
            tracing::info!("going on from step {step} of {} in {}", self.config.steps, self.run.display());
        }
        let mut bar = ProgressBar::new(self.task.name(), self.config.steps as u64, self.progress.step as u64);
        let (before, start) = (self.progress.seconds, Instant::now());
        let mut window = Window::default();
        let mut bad_in_a_row = 0;
        let mut due = false;
        while self.progress.step < self.config.steps {
            let bad = self.step(&mut window)?;
            self.progress.seconds = before + start.elapsed().as_secs_f64();
            let step = self.progress.step;
            bad_in_a_row = if bad { bad_in_a_row + 1 } else { 0 };
            if bad_in_a_row >= self.config.max_bad_steps {
                self.stop(step, bad_in_a_row)?;
            }
            let last = step == self.config.steps;
            if step % self.config.log_every == 0 || last {
                let mut values = window.take(&self.config, self.progress.skipped_steps);
                values.push(("skipped_videos".to_string(), self.task.skipped_videos() as f64));
                let values: Vec<(&str, f64)> = values.iter().map(|(n, v)| (n.as_str(), *v)).collect();
                log.scalars(step, &values)?;
                bar.step(step as u64, &format!("loss {:.4}", values[0].1));
            } else {
                bar.step(step as u64, "");
            }
            if step % self.config.picture_every == 0 || last {
                self.show(&mut log, step)?;
            }
            // after a bad step the weights may be past saving: what is stored then was good at least once
            due |= step % self.config.checkpoint_every == 0 || last;
            if due && (!bad || last) {
                due = false;
                self.progress.seconds = before + start.elapsed().as_secs_f64();
                self.save()?;
            }
        }
        bar.finish();
        log.finish()?;
        Ok(self.progress)
    }

    /// One optimizer step of every phase; true if one was left out as not finite.
    fn step(&mut self, window: &mut Window) -> Result<bool> {
        let start = Instant::now();
        let mut batches = Vec::new();
        for _ in 0..self.config.accumulate {
            batches.push(self.task.next_batch()?);
        }
        window.waited += start.elapsed().as_secs_f64();
        let step = self.progress.step;
        let rate = self.optimizer_config.learning_rate_at(step, self.config.steps);
        let mut bad = false;
        for phase in 0..self.phases.len() {
            let optimizer = &mut self.optimizers[phase];
            optimizer.set_learning_rate(rate);
            optimizer.zero_grad()?;
            let mut finite = true;
            for batch in &batches {
                let scale = 1.0 / self.config.accumulate as f64;
                let _autocast = Autocast::bfloat16(self.device, self.config.precision == Precision::Bf16);
                let terms = self.task.gradients(phase, batch, step, scale).with_context(|| format!("step {step}"))?;
                finite &= terms.iter().all(|(_, value)| value.is_finite());
                window.add(&terms);
            }
            let norm = optimizer.clip_gradients(self.config.clip_gradient)?.to_device(Device::Cpu).double_value(&[]);
            window.add(&[(self.phases[phase].gradient_norm, norm)]);
            if finite && norm.is_finite() {
                optimizer.step()?;
                if let (0, Some(ema)) = (phase, &mut self.ema) {
                    ema.update(&self.phases[0].parameters)?;
                }
            } else {
                bad = true;
                tracing::warn!(
                    "step {step}: the {} loss or its gradient is not finite; the step is left out",
                    self.phases[phase].name
                );
            }
        }
        let last = batches.last().expect("accumulate is at least 1");
        self.progress.position = last.position;
        self.progress.skipped_steps += i64::from(bad);
        self.progress.step += 1;
        window.steps += 1;
        window.seconds += start.elapsed().as_secs_f64();
        window.rate = rate;
        Ok(bad)
    }

    fn stop(&self, step: i64, bad: i64) -> Result<()> {
        let last = checkpoint::list(&self.run)?.pop();
        let good = last.map_or("there is no checkpoint yet".to_string(), |path| {
            format!("the last good checkpoint is {}", path.display())
        });
        bail!(
            "loss or gradient was not finite in {bad} steps in a row (up to step {step}): training stops; {good}. \
             Lower optimizer.learning_rate, set trainer.clip_gradient, or lengthen the warm-ups, and start again"
        )
    }

    /// Runs `body` with the averaged weights in the network.
    fn averaged<R>(&mut self, body: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        let Some(ema) = &self.ema else { return body(&mut self.task) };
        let own = self.phases[0].parameters.trainable();
        let kept: Vec<Tensor> = own.iter().map(|(_, t)| t.detach().copy()).collect();
        let put = |values: &mut dyn Iterator<Item = Tensor>| {
            tch::no_grad(|| own.iter().zip(values).for_each(|((_, t), value)| t.shallow_clone().copy_(&value)));
        };
        put(&mut ema.named().iter().map(|(_, t)| t.shallow_clone()));
        let result = body(&mut self.task);
        put(&mut kept.into_iter());
        result
    }

    fn show(&mut self, log: &mut RunLogger, step: i64) -> Result<()> {
        for Picture { name, clips } in self.averaged(|task| task.pictures())? {
            let frames = clips.size()[2];
            let grid = pictures::grid(&clips, (frames / 8).max(1))?;
            let (height, width) = (grid.size()[0] as i32, grid.size()[1] as i32);
            log.image_png(step, name, &pictures::png(&grid)?, width, height)?;
            let gif = pictures::gif(&clips, 8.0)?;
            // the logical screen's size, little-endian, behind the six bytes of the signature
            let size = |at: usize| i32::from(u16::from_le_bytes([gif[at], gif[at + 1]]));
            log.gif(step, &format!("{name}_moving"), &gif, size(6), size(8))?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<()> {
        let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
        for (phase, optimizer) in self.phases.iter().zip(&self.optimizers) {
            let named = phase.parameters.named();
            tensors.extend(named.into_iter().map(|(n, t)| (format!("{}.{n}", phase.name), t)));
            let state = optimizer.state();
            tensors.extend(state.into_iter().map(|(n, t)| (format!("optimizer.{}.{n}", phase.name), t)));
        }
        if let Some(ema) = &self.ema {
            self.progress.ema_updates = ema.updates();
            tensors.extend(ema.named().iter().map(|(n, t)| (format!("ema.{n}"), t.shallow_clone())));
        }
        tensors.extend(self.averaged(|task| task.measure())?);
        let checkpoint = Checkpoint {
            task: self.task.name().to_string(),
            progress: self.progress.clone(),
            experiment: self.experiment.clone(),
            tensors,
        };
        checkpoint.write(&checkpoint::path(&self.run, self.progress.step))?;
        checkpoint::prune(&self.run, self.config.keep_checkpoints)
    }
}

/// Means over the steps since the last line of the log.
#[derive(Default)]
struct Window {
    sums: Vec<(&'static str, f64, i64)>,
    steps: i64,
    seconds: f64,
    waited: f64,
    rate: f64,
}

impl Window {
    fn add(&mut self, terms: &[(&'static str, f64)]) {
        for &(name, value) in terms {
            match self.sums.iter_mut().find(|(n, _, _)| *n == name) {
                Some((_, sum, count)) => {
                    *sum += value;
                    *count += 1;
                }
                None => self.sums.push((name, value, 1)),
            }
        }
    }

    fn take(&mut self, config: &TrainerConfig, skipped: i64) -> Vec<(String, f64)> {
        let window = std::mem::take(self);
        let mut values: Vec<(String, f64)> =
            window.sums.into_iter().map(|(name, sum, count)| (name.to_string(), sum / count as f64)).collect();
        let clips = (window.steps * config.batch * config.accumulate) as f64;
        values.push(("learning_rate".into(), window.rate));
        values.push(("clips_per_second".into(), clips / window.seconds));
        values.push(("seconds_waiting_for_data".into(), window.waited / window.steps.max(1) as f64));
        values.push(("skipped_steps".into(), skipped as f64));
        values
    }
}
