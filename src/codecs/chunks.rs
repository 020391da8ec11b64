//! Decoding of long latents in chunks that overlap and are cross-faded, in memory that does not grow with
//! their length.
//!
//! The decoder's group norms pool over all frames that it sees, so a long latent decoded whole is not what
//! the decoder was trained to make; chunks of the training length are.

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

/// How a long latent is cut: chunks of `length` latent frames, neighbours sharing at least `overlap`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunks {
    /// Latent frames of a chunk.
    pub length: i64,
    /// Latent frames that neighbours share.
    pub overlap: i64,
    /// Frames of one latent frame.
    pub factor: i64,
    /// How many frames from its edge a decoded chunk feels that there is nothing beyond. Of an overlap that is
    /// wide enough only the middle, which does not, is cross-faded; of another, its middle latent frame's worth.
    pub reach: i64,
    /// How many frames fewer the first latent frame of a chunk gives than each of the others: `factor − 1` of a causal
    /// codec, whose first latent frame is one frame, else 0. Neighbours share at least one latent frame then.
    pub missing: i64,
}

impl Chunks {
    /// The frames that so many latent frames give.
    pub fn frames_of(&self, latent: i64) -> i64 {
        latent * self.factor - self.missing
    }

    /// The fewest latent frames that give at least so many frames.
    pub fn latent_frames_for(&self, frames: i64) -> i64 {
        (frames + self.missing - 1) / self.factor + 1
    }

    /// First latent frames of the chunks of a latent of `frames`, evenly spread.
    pub fn starts(&self, frames: i64) -> Vec<i64> {
        let Chunks { length, overlap, .. } = *self;
        if frames <= length {
            return vec![0];
        }
        let gaps = (frames - length + length - overlap - 1) / (length - overlap);
        (0..=gaps).map(|i| i * (frames - length) / gaps).collect()
    }

    /// The frames over which a chunk takes over from the one before, as (first, count), where both are there
    /// for the frames `from..to`.
    fn ramp(&self, from: i64, to: i64) -> (i64, i64) {
        let shared = to - from;
        let count = (shared - 2 * self.reach).clamp(self.factor.min(shared), shared);
        (from + (shared - count) / 2, count)
    }

    /// The frames of a video of `frames` latent frames at which one chunk gives way to the next: each seam is
    /// (first, count), and the differences of neighbouring frames that it touches are those of `first − 1`
    /// with `first` up to `first + count − 1` with `first + count`.
    pub fn seams(&self, frames: i64) -> Vec<(i64, i64)> {
        let starts = self.starts(frames);
        let seam = |pair: &[i64]| {
            let from = pair[0] * self.factor;
            self.ramp(pair[1] * self.factor, from + self.frames_of(self.length))
        };
        starts.windows(2).map(seam).collect()
    }

    /// Decodes `[1, C, F, h, w]` by `decode`, which makes [`frames_of`](Self::frames_of) frames, and hands on
    /// pieces `[3, f, H, W]` in order; together they are the video.
    ///
    /// # Errors
    /// Those of `decode` and of `hand_on`.
    pub fn decode(
        &self,
        z: &Tensor,
        decode: &mut dyn FnMut(&Tensor) -> Result<Tensor>,
        hand_on: &mut dyn FnMut(&Tensor) -> Result<()>,
    ) -> Result<()> {
        let frames = z.size()[2];
        let starts = self.starts(frames);
        let mut overlap: Option<Tensor> = None; // what the chunk before made of the current one's first frames
        for (i, &start) in starts.iter().enumerate() {
            let length = self.length.min(frames);
            let video = decode(&z.narrow(2, start, length))?.squeeze_dim(0); // [3, f, H, W]
            let made = video.size()[1];
            let wanted = self.frames_of(length);
            ensure!(made == wanted, "{length} latent frames gave {made} frames, not {wanted}");
            let video = match overlap.take() {
                None => video,
                Some(before) => {
                    let shared = before.size()[1];
                    let (first, count) = self.ramp(0, shared);
                    let rise = (Tensor::arange(shared, (Kind::Float, video.device())) - first + 0.5) / count;
                    let rise = rise.clamp(0.0, 1.0).reshape([1, shared, 1, 1]);
                    let mixed = before.lerp_tensor(&video.narrow(1, 0, shared), &rise);
                    Tensor::cat(&[mixed, video.narrow(1, shared, made - shared)], 1)
                }
            };
            match starts.get(i + 1) {
                None => hand_on(&video)?,
                Some(next) => {
                    let done = (next - start) * self.factor;
                    hand_on(&video.narrow(1, 0, done))?;
                    // a copy: a view would keep the whole chunk
                    overlap = Some(video.narrow(1, done, made - done).copy());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn chunks_cover_everything_and_overlap() {
        for frames in 1..200 {
            for (length, overlap) in [(4, 2), (4, 1), (4, 0), (1, 0), (8, 4), (5, 4), (16, 12)] {
                let chunks = Chunks { length, overlap, factor: 2, reach: 3, missing: 0 };
                let starts = chunks.starts(frames);
                assert_eq!(starts[0], 0);
                assert_eq!(starts.last().unwrap() + length.min(frames), frames);
                for pair in starts.windows(2) {
                    assert!(pair[0] < pair[1] && pair[0] + length - pair[1] >= overlap, "{frames}: {starts:?}");
                }
            }
        }
    }

    /// With a decoder that sees each latent frame alone, the pieces are the whole.
    #[test]
    fn pieces_make_the_whole() {
        let decode = |z: &Tensor| z.repeat_interleave_self_int(2, 2, None);
        for frames in [1, 3, 4, 5, 9, 30] {
            let z = Tensor::randn([1, 3, frames, 2, 2], (Kind::Float, Device::Cpu));
            let mut pieces = Vec::new();
            Chunks { length: 4, overlap: 2, factor: 2, reach: 5, missing: 0 }
                .decode(&z, &mut |z| Ok(decode(z)), &mut |piece| {
                    pieces.push(piece.copy());
                    Ok(())
                })
                .unwrap();
            let whole = decode(&z).squeeze_dim(0);
            let difference = (Tensor::cat(&pieces, 1) - whole).abs().max().double_value(&[]);
            assert!(difference < 1e-6, "{frames}: {difference}");
        }
    }
}
