//! Latents, and captions and classes with them, that were encoded once: the raw latents of many clips in one file, as what
//! their codec makes them.

use std::{path::Path, sync::Arc};

use anyhow::{Context, Result, ensure};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::{Batch, ahead::Ahead, labels::class_numbers};
use crate::{
    codecs::{EncodedKind, LatentSpace, Normalization},
    data::{DataConfig, Loader, READING, normalise, reading::warn_of_former_reading},
    distributed::Ranks,
    experiment::{Numerics, UserError},
    random::{Purpose, stream},
    safetensors::{TensorRows, check_digest, read_metadata, write_safetensors_atomically},
    text::TextEncoder,
    torch::{Readback, pinned, upload},
};

/// What a file of latents says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Origin {
    data: DataConfig,
    scale: f64,
    shift: f64,
    /// How exactly the encoders computed.
    #[serde(default)]
    numerics: Numerics,
    /// How their videos were read.
    #[serde(default)]
    reading: u32,
    /// What the latents are; files that do not say hold Gaussians. Codes are numbers of vectors, which are exact.
    #[serde(default)]
    encoded: EncodedKind,
    /// The names of their classes, of which each latent has the number; none where the data have no classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    classes: Option<Vec<String>>,
}

/// The name of the tensor of latents of a kind, of a codec with or without a codebook.
fn tensor_of(kind: EncodedKind, has_codebook: bool) -> &'static str {
    match (has_codebook, kind) {
        (true, _) => "codes",
        (false, EncodedKind::Gaussian) => "moments",
        (false, EncodedKind::Exact) => "latents",
    }
}

/// Encodes the first `count` samples of the data's order and writes them: of a codec that encodes to Gaussians `moments`
/// `[N, 2C, F', h, w]`, means and then logarithms of variances; of another `latents` `[N, C, F', h, w]`, or, where it has a
/// codebook, `codes` `[N, F', h, w]` int64; with a text encoder also `context` `[N, S, width]`, and `context_empty` of the empty prompt; of data with classes also `label`
/// `[N]` int64, numbers of the names in its notes. With more samples than
/// videos, a video gives several clips. Ranks share the clips; rank 0 writes. Encoding is paid for once and every later
/// training builds on it, so that float32 is worth its time here, whatever precision those trainings have.
///
/// # Errors
/// Data that cannot be read or has no captions; a full disk.
#[expect(clippy::too_many_arguments, reason = "all that a file of latents depends on")]
pub fn pack_latents(
    space: &LatentSpace,
    text: Option<&TextEncoder>,
    data: &DataConfig,
    count: u64,
    seed: u64,
    numerics: Numerics,
    out: &Path,
    ranks: &Ranks,
    on_clip: &mut dyn FnMut(u64),
) -> Result<()> {
    let batch = 8.min(count.max(1));
    let mut loader = Loader::of_rank(data, batch as i64, seed, 0, ranks.rank(), ranks.size())?;
    let classes = loader.classes().map(<[String]>::to_vec);
    // by which the text encoder is known again: exact in any case
    let empty = text.map(|text| text.empty()).transpose()?;
    let _numerics = numerics.begin(space.device());
    // the same passes of the networks on any number of ranks, so that the latents are the same to the bit
    let encode = |i: usize| {
        let next = loader.next()?;
        let clips = next.clips.narrow(0, 0, batch.min(count - i as u64 * batch) as i64);
        let made = space.encode(&normalise(&upload(&clips, space.device())));
        let latents = made.codes().map_or_else(|| made.stacked(), Tensor::shallow_clone);
        let mut encoded = vec![Readback::of(&latents)?.wait()?];
        if let Some(names) = &classes {
            let classes = next.classes.iter().take(clips.size()[0] as usize).map(Option::as_deref);
            encoded.push(Tensor::from_slice(&class_numbers(names, classes)?));
        }
        if let Some(text) = text {
            let captions: Option<Vec<String>> = next.captions.into_iter().take(clips.size()[0] as usize).collect();
            let captions = captions.context("these videos have no captions")?;
            encoded.push(Readback::of(&text.encode(&captions)?)?.wait()?);
        }
        Ok(encoded)
    };
    let (mut latents, mut labels, mut context, mut done) = (Vec::new(), Vec::new(), Vec::new(), 0);
    ranks.collect(count.div_ceil(batch) as usize, encode, |_, encoded| {
        let mut encoded = encoded.into_iter();
        latents.extend(encoded.next());
        if classes.is_some() {
            labels.extend(encoded.next());
        }
        context.extend(encoded.next());
        done += latents.last().map_or(0, |encoded| encoded.size()[0] as u64);
        on_clip(done);
        Ok(())
    })?;
    if !ranks.is_first() {
        return Ok(());
    }
    let Normalization { scale, shift } = space.normalization;
    let (reading, encoded) = (data.dataset.reading()?.unwrap_or(READING), space.settings().encodes_to());
    let data = DataConfig { workers: 1, ..data.clone() };
    let has_codebook = space.settings().codebook().is_some();
    let mut tensors = vec![(tensor_of(encoded, has_codebook), Tensor::cat(&latents, 0))];
    if classes.is_some() {
        tensors.push(("label", Tensor::cat(&labels, 0)));
    }
    let origin = Origin { data, scale, shift, numerics, reading, encoded, classes };
    if let Some(empty) = empty {
        tensors.push(("context", Tensor::cat(&context, 0)));
        tensors.push(("context_empty", empty));
    }
    write_safetensors_atomically(out, &tensors, &serde_json::to_value(origin)?)
}

/// A file of latents, drawn from in the order of a seed. They stay in it: a step's are read some steps before.
pub struct LatentFile {
    kind: EncodedKind,
    /// `[C, F', h, w]`
    shape: Vec<i64>,
    /// Whether it holds the codes of latents in their place.
    holds_codes: bool,
    /// The names of classes.
    classes: Option<Vec<String>>,
    batches: Ahead<Batch>,
}

/// What the batches of a file of latents are read from.
struct Rows {
    latents: TensorRows,
    context: Option<TensorRows>,
    /// The number of each latent's class.
    labels: Option<TensorRows>,
    seed: u64,
    batch: u64,
    position: u64,
    rank: u64,
    ranks: u64,
    order: (u64, Vec<u64>),
    device: Device,
}

impl LatentFile {
    /// One rank's share: of batch · ranks consecutive samples its own `batch`. The first rank alone reads the whole file,
    /// once, to see that it is not damaged.
    ///
    /// # Errors
    /// A file that `lvdm encode` did not write, or wrote for another autoencoder or text encoder; a damaged one.
    pub fn open(
        path: &Path,
        space: &LatentSpace,
        text: Option<&TextEncoder>,
        batch: i64,
        seed: u64,
        position: u64,
        ranks: &Ranks,
    ) -> Result<Self> {
        let not = || format!("{} does not hold latents of `lvdm encode`", path.display());
        let origin = origin_of(path)?;
        let kind = origin.encoded;
        let holds_codes = space.settings().codebook().is_some();
        let name = tensor_of(kind, holds_codes);
        let latents = TensorRows::open(path, name)?.with_context(not)?;
        let size = latents.size();
        ensure!(size.len() == if holds_codes { 4 } else { 5 } && size[0] > 0, "{}: `{name}` of shape {size:?}", not());
        let shape = match holds_codes {
            true => [&[space.settings().latent_channels()], &size[1..]].concat(),
            false => [&[size[1] / kind.tensors()], &size[2..]].concat(),
        };
        let Normalization { scale, shift } = space.normalization;
        if (origin.scale, origin.shift) != (scale, shift) {
            return Err(UserError(format!(
                "{} was encoded by another autoencoder (scale {}, shift {}) than the one given (scale {scale}, shift {shift}): pack it again",
                path.display(), origin.scale, origin.shift
            ))
            .into());
        }
        let context = match text {
            None => None,
            Some(text) => Some(encoded_texts(text, path)?),
        };
        if ranks.is_first() {
            warn_of_former_reading(path, origin.data.dataset.reading_of(origin.reading), "lvdm encode");
        }
        let labels = TensorRows::open(path, "label")?.zip(origin.classes);
        ranks.on_first(|| check_digest(path))?;
        let (labels, classes) = labels.unzip();
        let mut rows = Rows {
            latents,
            context,
            labels,
            seed,
            batch: batch as u64,
            position,
            rank: ranks.rank() as u64,
            ranks: ranks.size() as u64,
            order: (u64::MAX, Vec::new()),
            device: space.device(),
        };
        let batches = Ahead::new(Arc::default(), move || rows.next_batch())?;
        Ok(LatentFile { kind, shape, holds_codes, classes, batches })
    }

    /// `[C, F, h, w]` of a latent.
    pub fn shape(&self) -> &[i64] {
        &self.shape
    }

    /// Whether what it gives are codes, int64 `[B, F', h, w]`, in place of latents.
    pub fn holds_codes(&self) -> bool {
        self.holds_codes
    }

    /// What its latents are.
    pub fn kind(&self) -> EncodedKind {
        self.kind
    }

    /// The names of the classes, of which [`Batch::labels`] are numbers; none of latents without classes.
    pub fn classes(&self) -> Option<&[String]> {
        self.classes.as_deref()
    }

    /// The next samples.
    ///
    /// # Errors
    /// A file that is no longer whole.
    pub fn next_batch(&mut self) -> Result<Batch> {
        self.batches.next()
    }
}

impl Rows {
    fn next_batch(&mut self) -> Result<Batch> {
        let count = self.latents.size()[0] as u64;
        let first = self.position + self.rank * self.batch;
        let samples: Vec<u64> = (first..first + self.batch).collect();
        let rows: Vec<i64> = samples
            .iter()
            .map(|&n| {
                let epoch = n / count;
                if self.order.0 != epoch {
                    let mut order: Vec<u64> = (0..count).collect();
                    order.shuffle(&mut stream(self.seed, Purpose::Shuffle, epoch, 0));
                    self.order = (epoch, order);
                }
                self.order.1[(n % count) as usize] as i64
            })
            .collect();
        self.position += self.batch * self.ranks;
        let read = |of: &TensorRows| Ok::<_, anyhow::Error>(pinned(of.read(&rows)?, self.device));
        Ok(Batch {
            data: read(&self.latents)?,
            text: self.context.as_ref().map(read).transpose()?,
            labels: self.labels.as_ref().map(|labels| labels.read(&rows)).transpose()?,
            samples,
            position: self.position,
        })
    }
}

/// The names of the classes in a file of latents; none of one without classes.
///
/// # Errors
/// A file that `lvdm encode` did not write.
pub(super) fn classes_in(path: &Path) -> Result<Option<Vec<String>>> {
    Ok(origin_of(path)?.classes)
}

fn origin_of(path: &Path) -> Result<Origin> {
    let not = || format!("{} does not hold latents of `lvdm encode`", path.display());
    serde_json::from_value(read_metadata(path)?.with_context(not)?).with_context(not)
}

/// The captions in a file of latents: by this text encoder, as what it makes of the empty prompt shows.
fn encoded_texts(text: &TextEncoder, path: &Path) -> Result<TensorRows> {
    let stored = |name| TensorRows::open(path, name);
    let (Some(context), Some(empty)) = (stored("context")?, stored("context_empty")?) else {
        return Err(UserError(format!("{} holds no captions: pack it again with --text RUN", path.display())).into());
    };
    let empty = empty.read(&[0])?;
    let own = text.empty()?.to_device(Device::Cpu);
    if own.size() != empty.size() || !own.allclose(&empty, 1e-3, 1e-4, false) {
        let path = path.display();
        return Err(
            UserError(format!("{path} was encoded by another text encoder than text.encoder: pack it again")).into()
        );
    }
    Ok(context)
}
