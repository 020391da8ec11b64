//! The one training loop.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{
    Ema, Optimizer,
    logger::RunLogger,
    progress::Progress as ProgressBar,
    record::{Pending, Record, Window},
    saver::Saver,
};
use crate::{
    atomic_file::write_atomically,
    checkpoint::{self, Checkpoint, Progress},
    data::pictures,
    distributed::{OnSignal, Ranks, ask_to_stop, catch_signals, stop_is_asked},
    experiment::{OptimizerConfig, Precision, TrainerConfig},
    nn::Parameters,
    torch::{Autocast, Autotune, GradientBuckets, Readback, caught, clip_global_norm, memory_so_far},
};

/// What a step is made of.
pub struct Batch {
    /// `[B, …]`; what it holds is the task's.
    pub data: Tensor,
    /// Encoded texts `[B, S, width]`, for a network that is given any.
    pub text: Option<Tensor>,
    /// `[B]` int64: each sample's class, for a network that is given labels; the number of classes means none.
    pub labels: Option<Tensor>,
    /// The number of each sample, counted over the whole training.
    pub samples: Vec<u64>,
    /// The sample after the last one.
    pub position: u64,
}

/// Something to look at.
pub struct Picture {
    /// For messages.
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
    /// What this phase trains.
    pub parameters: Parameters,
}

/// Terms of a loss by name: scalars on the network's device, out of the graph. The first is the loss.
pub type Terms = Vec<(&'static str, Tensor)>;

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

    /// Accumulates `scale` times the gradient of a phase's loss, and says its terms, without waiting for the device.
    ///
    /// # Errors
    /// Where the batch does not fit the network.
    fn gradients(&mut self, phase: usize, batch: &Batch, step: i64, scale: f64) -> Result<Terms>;

    /// Whether a phase's gradients are anything but zero at this step: only then are they reduced over ranks.
    fn takes_part(&self, _phase: usize, _step: i64) -> bool {
        true
    }

    /// What to show at this step, with the averaged weights in place.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    fn pictures(&mut self) -> Result<Vec<Picture>>;

    /// How many videos the data set lists that have no file, or no caption where it gives captions: the same on all ranks.
    fn missing_videos(&self) -> usize {
        0
    }

    /// The videos that this rank could not use so far, by their numbers in the data set.
    fn skipped_videos(&self) -> Vec<i64> {
        Vec::new()
    }

    /// Measured values that belong to the network: stored in every checkpoint.
    ///
    /// # Errors
    /// As [`Self::gradients`].
    fn measure(&mut self) -> Result<Vec<(String, Tensor)>> {
        Ok(Vec::new())
    }
}

/// Owns accumulation, the reduction over ranks, clipping, the finite check, the average, logging, checkpoints and resume.
///
/// No step waits for the device. Whether its numbers are finite is decided there, where a bad step moves nothing; the
/// host reads them when the first pass of the next step is queued, and at once where a log, a picture or a checkpoint
/// needs them.
pub struct Trainer<T: Task> {
    /// What is trained.
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
    pending: Vec<Pending>,
    /// How many of the last steps were, as far as they are read.
    bad_in_a_row: i64,
    /// The log's means as far as the checkpoint had them.
    window: Window,
    ranks: Ranks,
    /// Of each phase; none where this process is alone.
    buckets: Vec<Option<GradientBuckets>>,
    /// Over all ranks: whether one was asked to save and leave, and the videos that could not be used.
    stop: bool,
    skipped_videos: BTreeSet<i64>,
    /// How many of them this rank has told the others.
    skipped_here: usize,
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
        let mut window = Window::default();
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
            window.restore(&found.part("window"));
            progress = found.progress;
        }
        let buckets = phases.iter().map(|_| None).collect();
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
            pending: Vec::new(),
            bad_in_a_row: 0,
            window,
            ranks: Ranks::alone(),
            buckets,
            stop: false,
            skipped_videos: BTreeSet::new(),
            skipped_here: 0,
        })
    }

    /// Shares the training with other processes, which must have been given the same.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn over(mut self, ranks: &Ranks) -> Result<Self> {
        self.ranks = ranks.clone();
        for (phase, buckets) in self.phases.iter().zip(&mut self.buckets) {
            let parameters: Vec<Tensor> = phase.parameters.trainable().into_iter().map(|(_, t)| t).collect();
            *buckets = ranks.buckets(&parameters)?;
        }
        Ok(self)
    }

    /// Trains to the last step, as long as it may, or until asked to stop, and returns how it went. Rank 0 alone writes,
    /// and where nothing is left to do nothing is written. Whoever may come from elsewhere must be kept out of the folder
    /// by a [`checkpoint::RunLock`]. Meanwhile signals save and leave.
    ///
    /// # Errors
    /// Data that cannot be read; losses that stay non-finite; a last checkpoint that cannot be written; ranks that are
    /// gone, or whose weights differ; out of memory, with what lowers it.
    pub fn train(mut self) -> Result<Progress> {
        let mut left = self.is_out_of_time()?;
        if left || self.progress.step >= self.config.steps {
            return Ok(self.progress);
        }
        let _catching = catch_signals(OnSignal::Save)?;
        let _autotune = Autotune::begin();
        let mut record = if self.ranks.is_first() { Some(self.record()?) } else { None };
        let resumed = self.progress.step;
        self.ensure_same()?;
        let (before, start) = (self.progress.seconds, Instant::now());
        let mut window = std::mem::take(&mut self.window);
        let mut due = false;
        while self.progress.step < self.config.steps && !left {
            self.ranks.at_step(self.progress.step);
            let batches = match self.fetch(&mut window) {
                Ok(batches) => batches,
                Err(error) => {
                    if let Some(record) = record.as_mut().filter(|_| self.progress.step > resumed && self.alone()) {
                        let kept = self.settle(&mut window).and_then(|()| self.save(record, &window));
                        match kept.and_then(|()| record.saver.finish()) {
                            Ok(()) => tracing::warn!("step {} is kept", self.progress.step),
                            Err(why) => tracing::warn!("step {} cannot be kept: {why:#}", self.progress.step),
                        }
                    }
                    return Err(error);
                }
            };
            let began = Instant::now();
            self.step(&batches, &mut window)?;
            self.progress.seconds = before + start.elapsed().as_secs_f64();
            let step = self.progress.step;
            let out_of_time = self.is_out_of_time()?;
            let last = step == self.config.steps || out_of_time;
            let logs = step % self.config.log_every == 0 || last;
            let shows = step % self.config.picture_every == 0 || last;
            // after a bad step the weights may be past saving: what is stored then was good at least once
            due |= step % self.config.checkpoint_every == 0 || last || self.stop;
            if logs || shows || due {
                self.settle(&mut window)?;
            }
            window.seconds += began.elapsed().as_secs_f64();
            if self.bad_in_a_row >= self.config.max_bad_steps {
                if let Some(record) = &mut record {
                    record.saver.finish()?;
                }
                self.too_many_bad()?;
            }
            let message = if logs {
                let clips = self.config.batch * self.config.accumulate * self.ranks.size() as i64;
                let mut values = window.take(clips, self.progress.skipped_steps);
                // each once, however many ranks met it
                let skipped_videos = self.task.missing_videos() + self.skipped_videos.len();
                values.push(("skipped_videos".to_string(), skipped_videos as f64));
                // of this process since it began
                values
                    .extend(memory_so_far(self.device).map(|bytes| ("peak_memory_gb".to_string(), bytes as f64 / 1e9)));
                let values: Vec<(&str, f64)> = values.iter().map(|(n, v)| (n.as_str(), *v)).collect();
                if let Some(record) = &mut record {
                    record.log.scalars(step, &values);
                }
                format!("loss {:.4}", values[0].1)
            } else {
                String::new()
            };
            if let Some(record) = &mut record {
                record.bar.step(step as u64, &message);
            }
            if shows {
                self.on_first(&mut record, |trainer, record| {
                    if let Err(error) = trainer.show(&mut record.log, step) {
                        record.missing_pictures += 1;
                        tracing::warn!("step {step}: there is no picture of it: {error:#}; training goes on");
                    }
                    Ok(())
                })?;
            }
            let bad = self.bad_in_a_row > 0;
            left = out_of_time || (self.stop && !bad);
            if due && (!bad || last) {
                due = false;
                self.progress.seconds = before + start.elapsed().as_secs_f64();
                self.ensure_same()?;
                self.on_first(&mut record, |trainer, record| trainer.save(record, &window))?;
            }
        }
        self.ranks.on_first(|| {
            let Some(Record { log, bar, mut saver, missing_pictures }) = record else { return Ok(()) };
            bar.finish();
            let saved = saver.finish();
            log.finish();
            if missing_pictures > 0 {
                tracing::warn!("of {missing_pictures} steps there is no picture");
            }
            saved
        })?;
        Ok(self.progress)
    }

    /// What rank 0 does with its record; it may take long.
    fn on_first(
        &mut self,
        record: &mut Option<Record>,
        body: impl FnOnce(&mut Self, &mut Record) -> Result<()>,
    ) -> Result<()> {
        let ranks = self.ranks.clone();
        ranks.on_first(|| record.as_mut().map_or(Ok(()), |record| body(self, record)))
    }

    /// By rank 0's clock.
    fn is_out_of_time(&self) -> Result<bool> {
        match self.config.minutes {
            None => Ok(false),
            Some(_) => Ok(self.ranks.of_first(i64::from(self.config.is_out_of_time(self.progress.seconds)))? > 0),
        }
    }

    fn alone(&self) -> bool {
        self.ranks.size() == 1
    }

    /// Opens what rank 0 writes.
    fn record(&self) -> Result<Record> {
        let yaml = serde_yaml::to_string(&self.experiment)?;
        write_atomically(&self.run.join("experiment.yaml"), |file| {
            Ok(std::io::Write::write_all(file, yaml.as_bytes())?)
        })?;
        let resumed = (self.progress.step > 0).then_some(self.progress.step);
        let log = RunLogger::open(&self.run, resumed)?;
        if let Some(step) = resumed {
            tracing::info!("going on from step {step} of {} in {}", self.config.steps, self.run.display());
        }
        let rest = self.config.minutes.map(|minutes| (60.0 * minutes - self.progress.seconds).max(0.0));
        let bar = ProgressBar::new(self.task.name(), self.config.steps as u64, self.progress.step as u64)
            .within(rest.map(|seconds| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)));
        Ok(Record { log, bar, saver: Saver::new(&self.run, self.config.keep_checkpoints)?, missing_pictures: 0 })
    }

    /// Checks that all ranks hold the same weights.
    fn ensure_same(&self) -> Result<()> {
        if self.alone() {
            return Ok(());
        }
        let of = |phase: &Phase| {
            let named = phase.parameters.trainable().into_iter();
            named.map(|(name, tensor)| (format!("{}.{name}", phase.name), tensor)).collect::<Vec<_>>()
        };
        let weights: Vec<(String, Tensor)> = self.phases.iter().flat_map(of).collect();
        self.ranks.ensure_same(&format!("step {}", self.progress.step), &weights)
    }

    /// While it lives, networks run at the training's precision: what is trained, and the frozen ones that batches and
    /// pictures come out of. What is measured for a checkpoint stays in float32 (TF32 where the training has it), since
    /// all that is built on the run relies on it.
    fn autocast(&self) -> Autocast {
        Autocast::bfloat16(self.device, self.config.precision == Precision::Bf16)
    }

    /// What a step is made of.
    fn fetch(&mut self, window: &mut Window) -> Result<Vec<Batch>> {
        let start = Instant::now();
        let _precision = self.autocast();
        let batches = (0..self.config.accumulate).map(|_| self.task.next_batch()).collect::<Result<_>>()?;
        window.waited += start.elapsed().as_secs_f64();
        window.seconds += start.elapsed().as_secs_f64();
        Ok(batches)
    }

    /// Queues one optimizer step of every phase.
    fn step(&mut self, batches: &[Batch], window: &mut Window) -> Result<()> {
        let step = self.progress.step;
        let rate = self.optimizer_config.learning_rate_at(step, self.config.steps);
        for phase in 0..self.phases.len() {
            self.optimizers[phase].set_learning_rate(rate);
            self.optimizers[phase].zero_grad()?;
            let mut terms = Vec::new();
            let buckets = self.buckets[phase].as_ref().filter(|_| self.task.takes_part(phase, step));
            for (i, batch) in batches.iter().enumerate() {
                let scale = 1.0 / self.config.accumulate as f64;
                let _precision = self.autocast();
                // one reduction a step, of what all its passes have accumulated
                if let Some(buckets) = buckets.filter(|_| i + 1 == batches.len()) {
                    buckets.arm();
                }
                let found = self.task.gradients(phase, batch, step, scale).with_context(|| format!("step {step}"))?;
                terms.extend(found);
            }
            if let Some(buckets) = buckets {
                self.ranks.finish(buckets)?;
            }
            if phase == 0 {
                self.settle(window)?;
            }
            let (mut names, terms): (Vec<_>, Vec<_>) = terms.into_iter().unzip();
            let terms = self.ranks.mean(&Tensor::stack(&terms, 0).to_kind(Kind::Double))?;
            let optimizer = &mut self.optimizers[phase];
            let gradients = optimizer.gradients();
            let norm = clip_global_norm(&gradients, self.config.clip_gradient)?.to_device(self.device);
            names.push(self.phases[phase].gradient_norm);
            let values = Tensor::cat(&[terms, norm.to_kind(Kind::Double).reshape([1])], 0);
            optimizer.step(&gradients, Some(&values.isfinite().all().logical_not().to_kind(Kind::Float)))?;
            self.pending.push(Pending { phase, step, names, values: Readback::of(&values)? });
        }
        // what else the ranks must agree on
        let skipped = self.task.skipped_videos();
        let told = [f64::from(u8::from(stop_is_asked())), (skipped.len() - self.skipped_here) as f64];
        let agreed = self.ranks.sum(&told)?;
        self.stop = agreed[0] > 0.0;
        if self.stop {
            ask_to_stop();
        }
        if agreed[1] > 0.0 {
            self.skipped_here = skipped.len();
            for numbers in self.ranks.share(self.ranks.size(), |_| Ok(Tensor::from_slice(&skipped)))? {
                self.skipped_videos.extend(Vec::<i64>::try_from(numbers)?);
            }
        }
        let last = batches.last().expect("accumulate is at least 1");
        self.progress.position = last.position;
        self.progress.step += 1;
        window.steps += 1;
        window.rate = rate;
        Ok(())
    }

    /// Waits for the numbers of the last step, and does what depends on them: the log's means, and, where they are
    /// finite, the average.
    fn settle(&mut self, window: &mut Window) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let mut bad = false;
        for Pending { phase, step, names, values } in std::mem::take(&mut self.pending) {
            let values = values.wait().with_context(|| format!("step {step}"))?;
            let values: Vec<f64> = values.try_into()?;
            for (name, value) in names.into_iter().zip(&values) {
                window.add(name, *value);
            }
            if values.iter().all(|value| value.is_finite()) {
                if let (0, Some(ema)) = (phase, &mut self.ema) {
                    ema.update(&self.phases[0].parameters)?;
                }
                continue;
            }
            bad = true;
            if self.ranks.is_first() {
                tracing::warn!(
                    "step {step}: the {} loss or its gradient is not finite; the step is left out",
                    self.phases[phase].name
                );
            }
        }
        self.bad_in_a_row = if bad { self.bad_in_a_row + 1 } else { 0 };
        self.progress.skipped_steps += i64::from(bad);
        Ok(())
    }

    fn too_many_bad(&self) -> Result<()> {
        let step = self.progress.step - i64::from(!self.pending.is_empty());
        let last = checkpoint::list(&self.run)?.pop();
        let good = last.map_or("there is no checkpoint yet".to_string(), |path| {
            format!("the last good checkpoint is {}", path.display())
        });
        bail!(
            "loss or gradient was not finite in {} steps in a row (up to step {step}): training stops; {good}. \
             Lower optimizer.learning_rate, set trainer.clip_gradient, or lengthen the warm-ups, and start again",
            self.bad_in_a_row
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
        let precision = self.autocast();
        // caught in here, so that the weights are put back
        let shown = self.averaged(|task| caught(|| task.pictures()))?;
        drop(precision);
        for Picture { name, clips } in shown {
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

    fn save(&mut self, record: &mut Record, window: &Window) -> Result<()> {
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
        tensors.extend(window.stored());
        let checkpoint = Checkpoint {
            task: self.task.name().to_string(),
            progress: self.progress.clone(),
            experiment: self.experiment.clone(),
            tensors,
        };
        record.saver.save(checkpoint, checkpoint::path(&self.run, self.progress.step))
    }
}
