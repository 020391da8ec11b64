//! The one training loop.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{
    Ema, Optimizer, StepAround,
    logger::RunLogger,
    progress::Progress as ProgressBar,
    record::{Pending, Record, Window},
    saver::Saver,
    task::{Batch, Drawn, Picture, Task, TrainedNetwork},
};
use crate::{
    atomic_file::write_atomically,
    checkpoint::{self, Checkpoint, Progress},
    data::pictures,
    distributed::{OnSignal, Ranks, Shards, ask_to_stop, catch_signals, stop_is_asked},
    experiment::{OptimizerConfig, Precision, TrainerConfig},
    run_files::EXPERIMENT_FILE,
    torch::{
        Autocast, Autotune, GradientBuckets, Readback, RoundedWeights, StepGraphs, StepInputs, caught, global_norm,
        memory_so_far,
    },
};

/// The passes of a step, and what each takes besides its batch.
struct Passes<D>(Vec<(Batch, Option<D>)>);

impl<D: Drawn> StepInputs for Passes<D> {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        let mut all = Vec::new();
        for (batch, drawn) in &mut self.0 {
            all.extend(batch.tensors());
            all.extend(drawn.iter_mut().flat_map(Drawn::tensors));
        }
        all
    }
}

/// Owns accumulation, the reduction over ranks, clipping, the finite check, the average, logging, checkpoints and resume.
///
/// No step waits for the device. The device itself decides whether a step's loss and gradient are finite; where they are
/// not, the step changes nothing. The host reads these numbers when the first pass of the next step is queued, or at once
/// where a log, a picture or a checkpoint needs them.
pub struct Trainer<T: Task> {
    /// What is trained.
    pub task: T,
    run: PathBuf,
    config: TrainerConfig,
    optimizer_config: OptimizerConfig,
    experiment: Value,
    device: Device,
    networks: Vec<TrainedNetwork>,
    optimizers: Vec<Optimizer>,
    ema: Option<Ema>,
    progress: Progress,
    pending: Vec<Pending>,
    /// How many of the last steps in a row had a loss or gradient that was not finite, as far as the host has read them.
    bad_in_a_row: i64,
    /// The means of the log that the checkpoint held, until the loop takes them over.
    window: Window,
    ranks: Ranks,
    /// The gradients of each network, where they are reduced over ranks; none where this process is alone.
    buckets: Vec<Option<GradientBuckets>>,
    /// What the passes of each network take in bfloat16.
    rounded: Vec<RoundedWeights>,
    /// The recorded steps of each network.
    graphs: Vec<StepGraphs>,
    /// What a step of each network tells, in order.
    names: Vec<Vec<&'static str>>,
    /// Whether any rank was asked to save and leave.
    stop: bool,
    /// The videos that any rank could not use.
    skipped_videos: BTreeSet<i64>,
    /// How many of these this rank has already reported to the others.
    reported_skipped: usize,
}

impl<T: Task> Trainer<T> {
    /// Starts a run, or goes on from `resume`, together with the other ranks, which must be given the same. `experiment` is
    /// written into the run and its checkpoints.
    ///
    /// # Errors
    /// A checkpoint of another architecture. LibTorch's own.
    pub fn new(
        task: T,
        run: &Path,
        config: &TrainerConfig,
        optimizer_config: &OptimizerConfig,
        experiment: &impl serde::Serialize,
        ranks: &Ranks,
        resume: Option<Checkpoint>,
    ) -> Result<Self> {
        let networks = task.networks();
        let sharing = if config.shard_optimizer { ranks.clone() } else { Ranks::alone() };
        let shared_out = |network: &TrainedNetwork| Rc::new(Shards::new(&sharing, &network.parameters.trainable()));
        let shards: Vec<Rc<Shards>> = networks.iter().map(shared_out).collect();
        let optimizer = |(i, network): (usize, &TrainedNetwork)| {
            Optimizer::over(optimizer_config.adam(), &network.parameters, &shards[i])
                .decaying(|name| task.decays(i, name))
        };
        let mut optimizers: Vec<Optimizer> = networks.iter().enumerate().map(optimizer).collect();
        let mut ema = Ema::of(config, &networks[0].parameters, &shards[0]);
        let mut progress = Progress { step: 0, position: 0, ema_updates: 0, skipped_steps: 0, seconds: 0.0 };
        let mut window = Window::default();
        if let Some(found) = resume {
            for (i, (network, optimizer)) in networks.iter().zip(&mut optimizers).enumerate() {
                let (weights, state) = (found.part(network.name), found.part(&format!("optimizer.{}", network.name)));
                if i > 0 && weights.is_empty() {
                    tracing::warn!("{} has no {}: it starts anew", run.display(), network.name);
                    continue;
                }
                network.parameters.load(&weights).with_context(|| {
                    format!(
                        "{} was trained with other settings; give another --run, or delete it to start anew",
                        run.display()
                    )
                })?;
                // an imported run has none
                if state.is_empty() {
                    tracing::warn!(
                        "{} has no state of the {}'s optimizer: it starts anew",
                        run.display(),
                        network.name
                    );
                } else {
                    optimizer.load_state(&state)?;
                }
            }
            let average = found.part("ema");
            if average.is_empty() {
                ema = Ema::of(config, &networks[0].parameters, &shards[0]);
            } else if let Some(ema) = &mut ema {
                ema.load_state(found.progress.ema_updates, &average)?;
            }
            window.restore(&found.part("window"));
            progress = found.progress;
        }
        let reduced = |network: &TrainedNetwork| {
            let parameters: Vec<Tensor> = network.parameters.trainable().into_iter().map(|(_, t)| t).collect();
            ranks.buckets(&parameters, config.reduce_dtype.kind())
        };
        let buckets = networks.iter().map(reduced).collect::<Result<_>>()?;
        let rounded = networks.iter().map(|_| RoundedWeights::new()).collect();
        let graphs = networks.iter().map(|_| StepGraphs::default()).collect();
        let names = networks.iter().map(|_| Vec::new()).collect();
        Ok(Trainer {
            task,
            run: run.to_path_buf(),
            config: config.clone(),
            optimizer_config: optimizer_config.clone(),
            experiment: serde_json::to_value(experiment)?,
            device: networks[0].parameters.device(),
            networks,
            optimizers,
            ema,
            progress,
            pending: Vec::new(),
            bad_in_a_row: 0,
            window,
            ranks: ranks.clone(),
            buckets,
            rounded,
            graphs,
            names,
            stop: false,
            skipped_videos: BTreeSet::new(),
            reported_skipped: 0,
        })
    }

    /// Bytes of the optimizers' state and of the average that this rank holds.
    pub fn bytes_held(&self) -> usize {
        let bytes = |named: &[(String, Tensor)]| -> usize {
            named.iter().map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes()).sum()
        };
        let states: usize = self.optimizers.iter().map(|optimizer| bytes(&optimizer.state())).sum();
        states + self.ema.as_ref().map_or(0, |ema| bytes(ema.named()))
    }

    /// Trains until the last step, until the time is over, or until it is asked to stop, and returns how far it came. Only rank 0
    /// writes, and nothing is written where nothing is left to do. A [`checkpoint::RunLock`] must keep other processes out of
    /// the folder. While it trains, signals mean that it saves and leaves.
    ///
    /// # Errors
    /// Data that cannot be read; losses that stay non-finite; a last checkpoint that cannot be written; ranks that are
    /// gone, or whose weights differ; out of memory, with what lowers it.
    pub fn train(mut self) -> Result<Progress> {
        let mut finished = self.is_out_of_time()?;
        if finished || self.progress.step >= self.config.steps {
            return Ok(self.progress);
        }
        let _catching = catch_signals(OnSignal::Save)?;
        let _autotune = Autotune::begin();
        let mut record = if self.ranks.is_first() { Some(self.record()?) } else { None };
        let resumed = self.progress.step;
        self.ensure_same()?;
        let (before, start) = (self.progress.seconds, Instant::now());
        let mut window = std::mem::take(&mut self.window);
        let mut checkpoint_due = false;
        while self.progress.step < self.config.steps && !finished {
            self.ranks.at_step(self.progress.step);
            let batches = match self.fetch(&mut window) {
                Ok(batches) => batches,
                Err(error) => {
                    if let Some(record) = record.as_mut().filter(|_| self.progress.step > resumed && self.alone()) {
                        let saved = self.settle_last(&mut window).and_then(|()| {
                            let gathered = self.gather()?;
                            self.save(record, &window, gathered)
                        });
                        match saved.and_then(|()| record.saver.finish()) {
                            Ok(()) => tracing::warn!("the checkpoint of step {} is saved", self.progress.step),
                            Err(why) => {
                                tracing::warn!("the checkpoint of step {} cannot be saved: {why:#}", self.progress.step)
                            }
                        }
                    }
                    return Err(error);
                }
            };
            let began = Instant::now();
            self.step(batches, &mut window)?;
            self.progress.seconds = before + start.elapsed().as_secs_f64();
            let step = self.progress.step;
            let out_of_time = self.is_out_of_time()?;
            let last = step == self.config.steps || out_of_time;
            let logs = step % self.config.log_every == 0 || last;
            let shows = step % self.config.picture_every == 0 || last;
            // after a bad step the weights may be past saving: what is stored then was good at least once
            checkpoint_due |= step % self.config.checkpoint_every == 0 || last || self.stop;
            if logs || shows || checkpoint_due {
                self.settle_last(&mut window)?;
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
                let average = self.ema.as_ref().map(Ema::whole).transpose()?;
                self.on_first(&mut record, |trainer, record| {
                    if let Err(error) = trainer.show(&mut record.log, step, average.as_deref()) {
                        record.missing_pictures += 1;
                        tracing::warn!("step {step}: there is no picture of it: {error:#}; training goes on");
                    }
                    Ok(())
                })?;
            }
            let bad = self.bad_in_a_row > 0;
            finished = out_of_time || (self.stop && !bad);
            if checkpoint_due && (!bad || last) {
                checkpoint_due = false;
                self.progress.seconds = before + start.elapsed().as_secs_f64();
                self.ensure_same()?;
                let gathered = self.gather()?;
                self.on_first(&mut record, |trainer, record| trainer.save(record, &window, gathered))?;
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

    /// Does on rank 0 what may take long, while the other ranks wait.
    fn on_first(
        &mut self,
        record: &mut Option<Record>,
        body: impl FnOnce(&mut Self, &mut Record) -> Result<()>,
    ) -> Result<()> {
        let ranks = self.ranks.clone();
        ranks.on_first(|| record.as_mut().map_or(Ok(()), |record| body(self, record)))
    }

    /// Whether the time that the training may take is over, by rank 0's clock.
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
        write_atomically(&self.run.join(EXPERIMENT_FILE), |file| {
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
        let trainable = |network: &TrainedNetwork| {
            let named = network.parameters.trainable().into_iter();
            named.map(|(name, tensor)| (format!("{}.{name}", network.name), tensor)).collect::<Vec<_>>()
        };
        let weights: Vec<(String, Tensor)> = self.networks.iter().flat_map(trainable).collect();
        self.ranks.ensure_same(&format!("step {}", self.progress.step), &weights)
    }

    /// While this lives, networks run at the training's precision: those that are trained and the frozen ones that batches and
    /// pictures come from. What is measured for a checkpoint stays in float32 (TF32 where the training allows it), since
    /// everything built on the run relies on it.
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

    /// Queues one optimizer step of every network.
    fn step(&mut self, batches: Vec<Batch>, window: &mut Window) -> Result<()> {
        let step = self.progress.step;
        let rate = self.optimizer_config.learning_rate_at(step, self.config.steps);
        let position = batches.last().expect("accumulate is at least 1").position;
        let previous = std::mem::take(&mut self.pending);
        let mut passes = Passes(Vec::new());
        for batch in batches {
            passes.0.push((batch, None));
        }
        for network in 0..self.networks.len() {
            self.optimizers[network].set_learning_rate(rate);
            for (batch, drawn) in &mut passes.0 {
                *drawn = Some(self.task.draw(network, batch).with_context(|| format!("step {step}"))?);
            }
            let repeats = self.alone() && self.optimizers[network].repeats();
            let values = match self.task.form(step).filter(|_| repeats) {
                Some(form) => {
                    let mut graphs = std::mem::take(&mut self.graphs[network]);
                    let values = graphs.run(form, &mut passes, &mut |passes| self.queue(network, passes));
                    self.graphs[network] = graphs;
                    values
                }
                None => self.queue(network, &passes),
            };
            let values = Readback::of(&values.with_context(|| format!("step {step}"))?)?;
            self.pending.push(Pending { network, step, names: self.names[network].clone(), values });
        }
        self.settle(previous, window)?;
        // what else the ranks must agree on
        let skipped = self.task.skipped_videos();
        let own = [f64::from(u8::from(stop_is_asked())), (skipped.len() - self.reported_skipped) as f64];
        let agreed = self.ranks.sum(&own)?;
        self.stop = agreed[0] > 0.0;
        if self.stop {
            ask_to_stop();
        }
        if agreed[1] > 0.0 {
            self.reported_skipped = skipped.len();
            for numbers in self.ranks.share(self.ranks.size(), |_| Ok(Tensor::from_slice(&skipped)))? {
                self.skipped_videos.extend(Vec::<i64>::try_from(numbers)?);
            }
        }
        self.progress.position = position;
        self.progress.step += 1;
        window.steps += 1;
        window.rate = rate;
        Ok(())
    }

    /// Queues a network's passes and the step that they lead to. The terms of the losses and the norm of the gradient come back
    /// in float64, in the order of their names.
    fn queue(&mut self, network: usize, passes: &Passes<T::Drawn>) -> Result<Tensor> {
        let step = self.progress.step;
        let moving = self.networks[network].parameters.moving();
        let before: Vec<Tensor> = moving.iter().map(Tensor::copy).collect();
        let mut terms = Vec::new();
        let buckets = self.buckets[network].as_ref().filter(|_| self.task.takes_part(network, step));
        for (i, (batch, drawn)) in passes.0.iter().enumerate() {
            let scale = 1.0 / self.config.accumulate as f64;
            let _precision = self.autocast();
            let _weights = self.rounded[network].pass(self.device);
            // one reduction a step, of what all its passes have accumulated
            if let Some(buckets) = buckets.filter(|_| i + 1 == passes.0.len()) {
                buckets.arm();
            }
            let drawn = drawn.as_ref().expect("it is drawn before the step is queued");
            terms.extend(self.task.gradients(network, (batch, drawn), step, scale)?);
        }
        if let Some(buckets) = buckets {
            self.ranks.finish(buckets)?;
        }
        self.task.after_passes(network, step);
        let (mut names, terms): (Vec<_>, Vec<_>) = terms.into_iter().unzip();
        names.push(self.networks[network].gradient_norm);
        self.names[network] = names;
        let terms = self.ranks.mean(&Tensor::stack(&terms, 0).to_kind(Kind::Double))?;
        let optimizer = &mut self.optimizers[network];
        let gradients = optimizer.gradients();
        let norm = global_norm(&gradients)?.to_device(self.device);
        let values = Tensor::cat(&[terms, norm.to_kind(Kind::Double).reshape([1])], 0);
        let average = self.ema.as_ref().filter(|_| network == 0);
        optimizer
            .step(&gradients, StepAround { checked: Some(&values), max_norm: self.config.clip_gradient, average })?;
        if !moving.is_empty() {
            let is_bad = values.isfinite().all().logical_not();
            for (now, before) in moving.iter().zip(&before) {
                now.shallow_clone().copy_(&before.where_self(&is_bad, now));
            }
        }
        drop(gradients);
        optimizer.zero_grad()?;
        Ok(values)
    }

    /// Waits for the numbers of a step, and does what depends on them: the log's means.
    fn settle(&mut self, pending: Vec<Pending>, window: &mut Window) -> Result<()> {
        if pending.is_empty() {
            return Ok(());
        }
        let mut bad = false;
        for Pending { network, step, names, values } in pending {
            let values = values.wait().with_context(|| format!("step {step}"))?;
            let values: Vec<f64> = values.try_into()?;
            for (name, value) in names.into_iter().zip(&values) {
                window.add(name, *value);
            }
            if values.iter().all(|value| value.is_finite()) {
                if let (0, Some(ema)) = (network, &mut self.ema) {
                    ema.count();
                }
                continue;
            }
            bad = true;
            if self.ranks.is_first() {
                tracing::warn!(
                    "step {step}: the {} loss or its gradient is not finite; the step is left out",
                    self.networks[network].name
                );
            }
        }
        self.bad_in_a_row = if bad { self.bad_in_a_row + 1 } else { 0 };
        self.progress.skipped_steps += i64::from(bad);
        Ok(())
    }

    /// [`Self::settle`] of the last step.
    fn settle_last(&mut self, window: &mut Window) -> Result<()> {
        let last = std::mem::take(&mut self.pending);
        self.settle(last, window)
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

    /// Runs `body` with the averaged weights in the network, if there are any.
    fn averaged<R>(
        &mut self,
        average: Option<&[(String, Tensor)]>,
        body: impl FnOnce(&mut T) -> Result<R>,
    ) -> Result<R> {
        let Some(average) = average else { return body(&mut self.task) };
        let own = self.networks[0].parameters.trainable();
        let raw: Vec<Tensor> = own.iter().map(|(_, t)| t.detach().copy()).collect();
        let put = |values: &mut dyn Iterator<Item = Tensor>| {
            tch::no_grad(|| own.iter().zip(values).for_each(|((_, t), value)| t.shallow_clone().copy_(&value)));
        };
        put(&mut average.iter().map(|(_, t)| t.shallow_clone()));
        let result = body(&mut self.task);
        put(&mut raw.into_iter());
        result
    }

    fn show(&mut self, log: &mut RunLogger, step: i64, average: Option<&[(String, Tensor)]>) -> Result<()> {
        let precision = self.autocast();
        // caught in here, so that the weights are put back
        let shown = self.averaged(average, |task| caught(|| task.pictures()))?;
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

    /// What ranks may have shared out, whole on rank 0. All of them must come here.
    fn gather(&self) -> Result<Gathered> {
        let mut optimizers = Vec::new();
        for (network, optimizer) in self.networks.iter().zip(&self.optimizers) {
            let state = optimizer.whole_state()?.into_iter();
            optimizers.extend(state.map(|(n, t)| (format!("optimizer.{}.{n}", network.name), t)));
        }
        Ok(Gathered { optimizers, average: self.ema.as_ref().map(Ema::whole).transpose()? })
    }

    fn save(&mut self, record: &mut Record, window: &Window, gathered: Gathered) -> Result<()> {
        let mut tensors: BTreeMap<String, Tensor> = gathered.optimizers.into_iter().collect();
        for network in &self.networks {
            let named = network.parameters.named();
            tensors.extend(named.into_iter().map(|(n, t)| (format!("{}.{n}", network.name), t)));
        }
        if let Some(ema) = &self.ema {
            self.progress.ema_updates = ema.updates();
        }
        tensors.extend(self.averaged(gathered.average.as_deref(), |task| task.measure())?);
        tensors.extend(gathered.average.into_iter().flatten().map(|(n, t)| (format!("ema.{n}"), t)));
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

/// What a checkpoint stores besides the networks, by name.
struct Gathered {
    optimizers: Vec<(String, Tensor)>,
    average: Option<Vec<(String, Tensor)>>,
}
