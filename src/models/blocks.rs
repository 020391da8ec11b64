//! Videos block after block, each given the frames before it (MCVD, Voleti et al. 2022, arXiv 2205.09853).

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::{
    latent_diffusion::{LatentConditions, LatentDiffusion},
    model::{ClipId, SampleId},
};
use crate::{
    data::{RgbFrame, to_u8},
    diffusion::{BlockConditioning, SamplerConfig},
    torch::{Readback, upload},
};

impl LatentDiffusion {
    /// Clips of a past, a block and a future, `[N, C, F, h, w]`, of which the network makes the block. The given frames are
    /// in the past or the future, where the others are zero.
    pub(super) fn clips_of_blocks(
        &self,
        blocks: &BlockConditioning,
        clips: &[ClipId],
        frames: i64,
        given: &LatentConditions,
        sampler: SamplerConfig,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        let [c, made, h, w] = self.latent;
        let whole = made + blocks.around();
        ensure!(frames == whole, "a clip of {frames} latent frames: with the frames around it it has {whole}");
        let mut clip = Tensor::zeros([clips.len() as i64, c, whole, h, w], (Kind::Float, self.space.device()));
        if let Some(given) = &given.frames {
            let is_made = |place: &i64| (blocks.past..blocks.past + made).contains(place);
            ensure!(
                !given.indices.iter().any(is_made),
                "given frames at {:?}: of {whole} frames the network makes those from {} to {}",
                given.indices,
                blocks.past,
                blocks.past + made - 1
            );
            let places = upload(&Tensor::from_slice(given.indices), clip.device());
            clip = clip.f_index_copy(2, &places, given.frames)?;
        }
        let block_alone = LatentConditions { classes: given.classes, ..LatentConditions::default() };
        let [past, future] = self.split(blocks, &clip);
        let around = Tensor::cat(&[&past, &future], 2);
        let block = self.made(clips, made, &block_alone, Some(around), sampler, on_step)?;
        Ok(Tensor::cat(&[past, block, future], 2))
    }

    /// The past and the future of whole clips.
    fn split(&self, blocks: &BlockConditioning, clip: &Tensor) -> [Tensor; 2] {
        [clip.narrow(2, 0, blocks.past), clip.narrow(2, clip.size()[2] - blocks.future, blocks.future)]
    }

    /// Videos of the model's length, u8 `[N, 3, F, H, W]` on the host. The first block has no past, or a first frame.
    pub(super) fn videos_of_blocks(
        &self,
        blocks: &BlockConditioning,
        samples: &[SampleId],
        first_frames: Option<&[&RgbFrame]>,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        let [c, made, h, w] = self.latent;
        let float = (Kind::Float, self.space.device());
        let frames_of = |count| Tensor::zeros([samples.len() as i64, c, count, h, w], float);
        let (mut past, future) = (frames_of(blocks.past), frames_of(blocks.future));
        let mut video = Vec::new();
        if let Some(pictures) = first_frames {
            blocks.check_first_frame()?;
            past = self.first_latents(pictures)?;
            video.push(past.shallow_clone());
        }
        let missing = self.video_frames - video.len() as i64;
        let count = missing.max(0).unsigned_abs().div_ceil(made.unsigned_abs());
        for i in 0..count {
            let clips: Vec<ClipId> =
                samples.iter().map(|&SampleId { seed, sample }| ClipId { seed, sample, clip: i }).collect();
            let around = Some(Tensor::cat(&[&past, &future], 2));
            let block =
                self.made(&clips, made, &LatentConditions::default(), around, self.sampler, &mut |step, steps| {
                    on_step(i as usize * steps + step, count as usize * steps);
                })?;
            past = blocks.next_past(&past, &block);
            video.push(block);
        }
        self.decode_any_length(&Tensor::cat(&video, 2).narrow(2, 0, self.video_frames))
    }

    /// As [`Self::decode`], of videos that may be longer than what the codec was trained on.
    fn decode_any_length(&self, z_0: &Tensor) -> Result<Tensor> {
        if z_0.size()[2] <= self.space.clip {
            return self.decode(z_0);
        }
        let _numerics = self.numerics.begin(self.space.device());
        let video = |i: i64| -> Result<Tensor> {
            let mut pieces = Vec::new();
            self.space.decode_long(&z_0.narrow(0, i, 1), &mut |piece| {
                pieces.push(Readback::of(&to_u8(piece))?);
                Ok(())
            })?;
            Ok(Tensor::cat(&pieces.iter().map(Readback::wait).collect::<Result<Vec<_>>>()?, 1))
        };
        Ok(Tensor::stack(&(0..z_0.size()[0]).map(video).collect::<Result<Vec<_>>>()?, 0))
    }
}
