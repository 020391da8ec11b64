//! The interface between the training loop and the trainings: of autoencoders, of denoisers and of transformers over codes.

use anyhow::Result;
use tch::Tensor;

use crate::nn::Parameters;

/// The samples of one forward and backward pass.
pub struct Batch {
    /// `[B, …]`: clips u8 `[B, 3, F, H, W]` for an autoencoder; for a denoiser what a codec encoded them to, as
    /// [`Encoded::stacked`](crate::codecs::Encoded::stacked) gives it; for a transformer codes, int64 `[B, F', h, w]`.
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

impl Batch {
    /// What is on the device of it.
    pub(super) fn tensors(&mut self) -> Vec<&mut Tensor> {
        [Some(&mut self.data), self.text.as_mut(), self.labels.as_mut()].into_iter().flatten().collect()
    }
}

/// What a pass takes besides its batch: all that is drawn at random or computed on the host, brought to the device.
pub trait Drawn {
    /// All of it.
    fn tensors(&mut self) -> Vec<&mut Tensor>;
}

impl Drawn for () {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        Vec::new()
    }
}

impl Drawn for Tensor {
    fn tensors(&mut self) -> Vec<&mut Tensor> {
        vec![self]
    }
}

/// Clips for the log, to look at.
pub struct Picture {
    /// For messages.
    pub name: &'static str,
    /// u8 `[N, 3, F, H, W]`
    pub clips: Tensor,
}

/// A network that is updated on its own.
pub struct TrainedNetwork {
    /// Prefix of its tensors in a checkpoint; the first network's is `model`.
    pub name: &'static str,
    /// What the norm of its gradient is called in the log.
    pub gradient_norm: &'static str,
    /// What this network trains.
    pub parameters: Parameters,
}

/// Terms of a loss by name: scalars on the network's device, out of the graph. The first is the loss.
pub type Terms = Vec<(&'static str, Tensor)>;

/// What differs from one kind of training to another.
pub trait Task {
    /// What a pass takes besides its batch.
    type Drawn: Drawn;

    /// Name in checkpoints and errors.
    fn name(&self) -> &'static str;

    /// The networks, in the order in which a step updates them. The first one is averaged.
    fn networks(&self) -> Vec<TrainedNetwork>;

    /// The samples of the next pass.
    ///
    /// # Errors
    /// Where the data cannot be read.
    fn next_batch(&mut self) -> Result<Batch>;

    /// What a pass of a network takes besides this batch.
    ///
    /// # Errors
    /// Where the batch does not fit the network.
    fn draw(&self, network: usize, batch: &Batch) -> Result<Self::Drawn>;

    /// Adds `scale` times the gradient of a network's loss to its parameters' gradients, and returns the terms of the loss.
    /// The host does not wait for the device.
    ///
    /// # Errors
    /// Where the batch does not fit the network.
    fn gradients(&mut self, network: usize, pass: (&Batch, &Self::Drawn), step: i64, scale: f64) -> Result<Terms>;

    /// At steps of one form [`Self::gradients`] queues the same work for every batch of the same shapes: then a GPU may record
    /// such a step and launch it as a whole from then on. None for a step that is like no other.
    fn form(&self, _step: i64) -> Option<i64> {
        None
    }

    /// Called once a step when all passes of a network are done, before its parameters move. What moves without a gradient
    /// and is the sum of a step's passes does so here.
    fn after_passes(&mut self, _network: usize, _step: i64) {}

    /// Whether a network's gradients are anything but zero at this step: only then are they reduced over ranks.
    fn takes_part(&self, _network: usize, _step: i64) -> bool {
        true
    }

    /// Whether weight decay acts on a network's parameter of this name.
    fn decays(&self, _network: usize, _parameter: &str) -> bool {
        true
    }

    /// Clips for the log. The averaged weights are in place while it is called.
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
