//! Training of a transformer over the codes of a frozen autoencoder.

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Tensor};

use super::{Batch, LatentFile, Picture, Task, Terms, TrainedNetwork, ahead::ClipsAhead, labels::class_numbers};
use crate::{
    autoregression::loss,
    codecs::LatentSpace,
    data::{Loader, normalise},
    distributed::Ranks,
    experiment::{ClassList, TransformerExperiment},
    models::{Asked, Assignment, ClipId, CodeTransformer, Seeds, VideoModel},
    networks::Gpt,
    nn::Parameters,
    torch::{Readback, backward, upload},
};

const SHOWN: u64 = 4;

enum Source {
    Clips(ClipsAhead),
    Codes(LatentFile),
}

/// One sequence a clip, one loss.
pub struct TransformerTask {
    model: CodeTransformer,
    parameters: Parameters,
    source: Source,
    /// The names of the classes, of which labels are the numbers.
    classes: Option<Vec<String>>,
    seed: u64,
    /// Codes and labels of the last batch.
    last: Option<(Tensor, Option<Tensor>)>,
    device: Device,
}

impl TransformerTask {
    /// `position` is the first sample of the data, of which each rank has its share.
    ///
    /// # Errors
    /// Data that is not there or does not fit the network; a codec without a codebook.
    pub fn new(
        experiment: &TransformerExperiment,
        space: LatentSpace,
        device: Device,
        position: u64,
        ranks: &Ranks,
    ) -> Result<Self> {
        let (data, seed, batch) = (&experiment.data, experiment.seed, experiment.trainer.batch);
        let latent = space.latent_shape(data.frames, data.resolution, data.resolution)?;
        let parameters = Parameters::new(device, seed);
        let source = match &experiment.latents {
            None => {
                let loader = Loader::of_rank(data, batch, seed, position, ranks.rank(), ranks.size())?;
                Source::Clips(ClipsAhead::new(loader, device)?)
            }
            Some(file) => {
                let codes = LatentFile::open(file, &space, None, batch, seed, position, ranks)?;
                ensure!(
                    codes.shape() == &latent[..],
                    "{} holds codes of latents {:?}, the experiment's data gives {latent:?}",
                    file.display(),
                    codes.shape()
                );
                Source::Codes(codes)
            }
        };
        let classes = match experiment.labels.as_ref().map(|labels| &labels.classes) {
            None => None,
            Some(Some(ClassList::Names(names))) => Some(names.clone()),
            Some(_) => bail!("labels.classes: the names of the classes are not known"),
        };
        let mut model = CodeTransformer::new(experiment, space, &parameters)?;
        model.set_numerics(experiment.trainer.precision.into());
        Ok(TransformerTask { model, parameters, source, classes, seed, last: None, device })
    }

    /// The numbers of classes by their names, `[B]` int64 on the device.
    fn labels<'a>(&self, classes: impl Iterator<Item = Option<&'a str>>) -> Result<Option<Tensor>> {
        let numbers = self.classes.as_ref().map(|names| class_numbers(names, classes)).transpose()?;
        Ok(numbers.map(|numbers| upload(&Tensor::from_slice(&numbers), self.device)))
    }
}

impl Task for TransformerTask {
    type Drawn = ();

    fn name(&self) -> &'static str {
        "transformer"
    }

    fn networks(&self) -> Vec<TrainedNetwork> {
        vec![TrainedNetwork { name: "model", gradient_norm: "gradient_norm", parameters: self.parameters.clone() }]
    }

    fn next_batch(&mut self) -> Result<Batch> {
        let batch = match &mut self.source {
            Source::Codes(file) => {
                let mut batch = file.next_batch()?;
                let names = file.classes().map(<[String]>::to_vec);
                batch.data = upload(&batch.data, self.device);
                batch.labels = match (batch.labels, names) {
                    (Some(numbers), Some(names)) => {
                        let numbers: Vec<i64> = (&numbers).try_into()?;
                        self.labels(numbers.iter().map(|&number| names.get(number as usize).map(String::as_str)))?
                    }
                    _ => None,
                };
                batch
            }
            Source::Clips(loader) => {
                let batch = loader.next()?;
                let encoded = self.model.space.encode(&normalise(&upload(&batch.clips, self.device)));
                let data = encoded.codes().context("autoencoder: it has no codebook")?.shallow_clone();
                let labels = self.labels(batch.classes.iter().map(Option::as_deref))?;
                Batch { data, text: None, labels, samples: batch.samples, position: batch.position }
            }
        };
        let data = batch.data.slice(1, None, None, self.model.latent_stride);
        self.last = Some((data.shallow_clone(), batch.labels.as_ref().map(Tensor::shallow_clone)));
        Ok(Batch { data, ..batch })
    }

    fn missing_videos(&self) -> usize {
        match &self.source {
            Source::Clips(loader) => loader.left_out(),
            Source::Codes(_) => 0,
        }
    }

    fn skipped_videos(&self) -> Vec<i64> {
        match &self.source {
            Source::Clips(loader) => loader.skipped().iter().map(|&video| video.into()).collect(),
            Source::Codes(_) => Vec::new(),
        }
    }

    fn draw(&self, _network: usize, _batch: &Batch) -> Result<()> {
        Ok(())
    }

    fn gradients(&mut self, _network: usize, (batch, ()): (&Batch, &()), _step: i64, scale: f64) -> Result<Terms> {
        let vocabulary = &self.model.vocabulary;
        let start = vocabulary.start(batch.labels.as_ref(), batch.data.size()[0], self.device);
        let (_, loss) = loss(&self.model.network, &start, &vocabulary.tokens(&batch.data));
        backward(&(&loss * scale));
        Ok(vec![("loss", loss.detach())])
    }

    fn form(&self, _step: i64) -> Option<i64> {
        Some(0)
    }

    fn decays(&self, _network: usize, parameter: &str) -> bool {
        Gpt::decays(parameter)
    }

    /// Samples; of a transformer that fills gaps, clips of the last batch whose middle it made.
    fn pictures(&mut self) -> Result<Vec<Picture>> {
        if !self.model.fills_gaps() {
            let assignment = Assignment::within(&self.model.accepts(), Asked::default());
            let (shown, seeds) = ((0..SHOWN).collect::<Vec<u64>>(), Seeds::One(self.seed));
            let clips = assignment.videos(&self.model, &shown, &seeds, &mut |_, _| {})?;
            return Ok(vec![Picture { name: "samples", clips }]);
        }
        let (codes, labels) = self.last.as_ref().context("no batch was read yet")?;
        let shown = codes.size()[0].min(SHOWN as i64);
        let clips: Vec<ClipId> = (0..shown as u64).map(|sample| ClipId { seed: self.seed, sample, clip: 0 }).collect();
        let last = codes.size()[1] - 1;
        let ends = Tensor::cat(&[codes.narrow(1, 0, 1), codes.narrow(1, last, 1)], 1).narrow(0, 0, shown);
        let classes: Option<Vec<i64>> = match labels {
            Some(labels) => Some(Readback::of(&labels.narrow(0, 0, shown))?.wait()?.try_into()?),
            None => None,
        };
        let filled = self.model.filled(&clips, &ends, classes.as_deref(), &mut |_, _| {})?;
        Ok(vec![Picture { name: "interpolations", clips: self.model.decode(&filled)? }])
    }
}
