//! Blocks of frames between the frames around them: prediction, generation and interpolation by one network (MCVD, Voleti et
//! al. 2022, arXiv 2205.09853, section 3).

use anyhow::{Result, ensure};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

/// What of a clip a network makes, and how it is trained: of `past` + block + `future` latent frames it makes the block, and
/// the past and the future are each given or, in training by chance, zero. With both it interpolates, with the past
/// it predicts, with neither it generates. It is not told which.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlockConditioning {
    /// Latent frames at the beginning of a clip of `data` that are not made but given.
    pub past: i64,
    /// Those at its end.
    #[serde(default)]
    pub future: i64,
    /// Probability that a training sample goes without its past.
    #[serde(default)]
    pub mask_past: f64,
    /// Probability, independent of that, that it goes without its future.
    #[serde(default)]
    pub mask_future: f64,
    /// Latent frames of a video that is sampled, where nobody says another length; as many as a clip of `data` has where it is not
    /// said.
    #[serde(default)]
    pub video_frames: Option<i64>,
}

impl BlockConditioning {
    /// For clips of `frames` latent frames.
    ///
    /// # Errors
    /// Names the number that does not fit.
    pub fn validate(&self, frames: i64) -> Result<()> {
        let Self { past, future, mask_past, mask_future, video_frames } = *self;
        ensure!(past >= 1, "past must be at least 1, not {past}: blocks follow from each other");
        ensure!(future >= 0, "future must not be negative");
        ensure!(
            past.saturating_add(future) < frames,
            "past = {past} and future = {future} leave nothing to make of a clip of {frames} latent frames: lengthen \
             data.frames"
        );
        ensure!(video_frames.is_none_or(|frames| frames >= 1), "video_frames must be at least 1");
        for (name, p) in [("mask_past", mask_past), ("mask_future", mask_future)] {
            ensure!((0.0..=1.0).contains(&p), "{name} is a probability, not {p}");
        }
        Ok(())
    }

    /// Whether the past can be a first frame alone.
    ///
    /// # Errors
    /// A past of several frames.
    pub fn check_first_frame(&self) -> Result<()> {
        ensure!(self.past == 1, "it is given {} frames before a block, and not a first frame alone", self.past);
        Ok(())
    }

    /// Latent frames that are given at most.
    pub fn around(&self) -> i64 {
        self.past + self.future
    }

    /// Whether the past and the future of a training sample are given.
    pub fn draw(&self, random: &mut impl Rng) -> [bool; 2] {
        [self.mask_past, self.mask_future].map(|masked| !random.random_bool(masked))
    }

    /// Of whole clips `[B, C, F, h, w]` the block.
    pub fn block(&self, z: &Tensor) -> Tensor {
        z.narrow(2, self.past, z.size()[2] - self.around())
    }

    /// Of whole clips `[B, C, F, h, w]` the frames around the block, `[B, C, past + future, h, w]`, zero where a mask of
    /// [`Self::mask`] is.
    pub fn frames_around(&self, z: &Tensor, mask: &Tensor) -> Tensor {
        let future = z.narrow(2, z.size()[2] - self.future, self.future);
        Tensor::cat(&[z.narrow(2, 0, self.past), future], 2) * mask.to_kind(z.kind())
    }

    /// The masks of samples whose past and future are given or not, `[B, 1, past + future, 1, 1]` float32 on the host: one
    /// where a frame is given.
    pub fn mask(&self, given: &[[bool; 2]]) -> Tensor {
        let row = |&[past, future]: &[bool; 2]| {
            let part = |is_given, frames| Tensor::full([1, frames, 1, 1], f64::from(u8::from(is_given)), CPU);
            Tensor::cat(&[part(past, self.past), part(future, self.future)], 1)
        };
        Tensor::stack(&given.iter().map(row).collect::<Vec<_>>(), 0)
    }

    /// What the block after `block` is given as its past: the newest frames of the past before, `[B, C, past, h, w]`, and of
    /// the block.
    pub fn next_past(&self, past: &Tensor, block: &Tensor) -> Tensor {
        let all = Tensor::cat(&[past, block], 2);
        all.narrow(2, all.size()[2] - self.past, self.past)
    }
}

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, stream};

    fn frames(numbers: &[f32]) -> Tensor {
        Tensor::from_slice(numbers).reshape([1, 1, -1, 1, 1])
    }

    fn numbers(z: &Tensor) -> Vec<f64> {
        z.flatten(0, -1).try_into().unwrap()
    }

    #[test]
    fn a_clip_is_past_block_and_future() {
        let blocks = BlockConditioning { past: 2, future: 1, mask_past: 0.0, mask_future: 0.0, video_frames: None };
        let z = frames(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(numbers(&blocks.block(&z)), [3.0, 4.0]);
        for (given, wanted) in
            [([true, true], [1.0, 2.0, 5.0]), ([true, false], [1.0, 2.0, 0.0]), ([false; 2], [0.0; 3])]
        {
            assert_eq!(numbers(&blocks.frames_around(&z, &blocks.mask(&[given]))), wanted);
        }
        assert!(blocks.validate(4).is_ok() && blocks.validate(3).is_err());
    }

    /// A block that is longer than the past, as long, and shorter.
    #[test]
    fn the_past_moves_on() {
        let blocks = BlockConditioning { past: 3, future: 0, mask_past: 0.0, mask_future: 0.0, video_frames: None };
        let next = |block: &[f32]| numbers(&blocks.next_past(&frames(&[1.0, 2.0, 3.0]), &frames(block)));
        assert_eq!(next(&[4.0, 5.0, 6.0, 7.0]), [5.0, 6.0, 7.0]);
        assert_eq!(next(&[4.0, 5.0, 6.0]), [4.0, 5.0, 6.0]);
        assert_eq!(next(&[4.0]), [2.0, 3.0, 4.0]);
    }

    #[test]
    fn masks_are_drawn_with_their_probabilities() {
        let blocks = BlockConditioning { past: 1, future: 1, mask_past: 0.25, mask_future: 0.5, video_frames: None };
        let mut counts = [0; 4];
        for sample in 0..4000 {
            let [past, future] = blocks.draw(&mut stream(5, Purpose::FrameMask, sample, 0));
            counts[2 * usize::from(past) + usize::from(future)] += 1;
        }
        // neither, future, past, both
        for (count, wanted) in counts.into_iter().zip([0.125, 0.125, 0.375, 0.375]) {
            assert!((f64::from(count) / 4000.0 - wanted).abs() < 0.03, "{counts:?}");
        }
    }
}
