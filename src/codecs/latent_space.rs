//! A frozen codec with the shift and scale that were measured on its latents.

use std::collections::BTreeMap;

use anyhow::Result;
use tch::{Device, Tensor, no_grad};

use super::{Chunks, CodecSettings, Encoded, LongDecoding, Pixels, VideoCodec};
use crate::{
    nn::{Parameters, full_precision},
    torch::{Autocast, upload},
};

/// Mean and spread of raw latents, as the affine map that normalises them: z ← scale·(z + shift).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalization {
    /// What a latent is multiplied by, after the shift.
    pub scale: f64,
    /// What is added to a latent before.
    pub shift: f64,
}

impl Normalization {
    /// What Stable Diffusion 1.x was trained with.
    pub const STABLE_DIFFUSION: Normalization = Normalization { scale: 0.18215, shift: 0.0 };

    /// Raw latents as they are.
    pub const NONE: Normalization = Normalization { scale: 1.0, shift: 0.0 };

    /// Of raw latents of any shape: shift is minus their mean, scale one over their standard deviation.
    pub fn measure(latents: &Tensor) -> Self {
        let z = latents.to_kind(tch::Kind::Double);
        let (mean, std) = (z.mean(None).double_value(&[]), z.std(true).double_value(&[]));
        Normalization { scale: 1.0 / std.max(1e-12), shift: -mean }
    }

    /// Raw → normalised, of any shape.
    pub fn normalise(&self, z: &Tensor) -> Tensor {
        (z + self.shift) * self.scale
    }

    fn restore(&self, z: &Tensor) -> Tensor {
        z / self.scale - self.shift
    }
}

/// Where diffusion happens: clips ↔ normalised latents, without gradients.
pub struct LatentSpace {
    codec: Box<dyn VideoCodec>,
    /// Scale and shift that normalise latents.
    pub normalization: Normalization,
    /// Latent frames of the clips on which the codec was trained, or of what goes through it at a time.
    pub clip: i64,
    /// How many parameters the codec has.
    pub parameters: i64,
    device: Device,
}

impl LatentSpace {
    /// # Errors
    /// Settings that do not fit together; weights that belong to another architecture.
    pub fn new(
        settings: &dyn CodecSettings,
        weights: BTreeMap<String, Tensor>,
        normalization: Normalization,
        clip: i64,
        device: Device,
    ) -> Result<Self> {
        settings.validate()?;
        let parameters = Parameters::unfilled(device);
        let codec = settings.build(&parameters.root());
        parameters.fill(weights)?;
        let count = parameters.count();
        parameters.freeze();
        Ok(LatentSpace { codec, normalization, clip, parameters: count, device })
    }

    /// Diffusion on pixels: z_0 is the clip itself, its values in [−1, 1].
    pub fn pixels(device: Device) -> Self {
        let clip = Pixels::AT_ONCE;
        LatentSpace { codec: Box::new(Pixels), normalization: Normalization::NONE, clip, parameters: 0, device }
    }

    /// Of what codec, and the arithmetic of its shapes.
    pub fn settings(&self) -> &dyn CodecSettings {
        self.codec.settings()
    }

    /// The latent's shape `[C, F', h, w]` of a clip.
    ///
    /// # Errors
    /// As [`CodecSettings::latent_shape`].
    pub fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        self.settings().latent_shape(frames, height, width)
    }

    /// Clips `[B, 3, F, H, W]` in [−1, 1] → their raw latents, never in half precision.
    pub fn encode(&self, x: &Tensor) -> Encoded {
        no_grad(|| self.codec.encode(&upload(x, self.device)).in_full_precision())
    }

    /// Raw latents and the noise `[B, C, F', h, w]` by which a Gaussian is sampled → normalised z_0.
    pub fn sample(&self, encoded: &Encoded, noise: &Tensor) -> Tensor {
        self.normalization.normalise(&encoded.sample(&upload(noise, self.device)))
    }

    /// Entries of the codec's codebook, by their numbers, integers `[B, F', h, w]` → normalised z_0 `[B, C, F', h, w]`, which can
    /// be decoded.
    ///
    /// # Errors
    /// A codec without a codebook.
    pub fn of_codes(&self, codes: &Tensor) -> Result<Tensor> {
        let vectors = no_grad(|| self.codec.vectors(&upload(codes, self.device)))?;
        Ok(self.normalization.normalise(&vectors))
    }

    /// Normalised z_0 → clips `[B, 3, F, H, W]`, not clamped; never in half precision.
    pub fn decode(&self, z_0: &Tensor) -> Tensor {
        no_grad(|| full_precision(&self.codec.decode(&self.normalization.restore(&upload(z_0, self.device)))))
    }

    /// How a long latent is decoded: chunks of the length on which the codec was trained, half of each
    /// shared; where frames are decoded one by one, chunks that share nothing.
    pub fn chunks(&self) -> Chunks {
        let frames_of = |latent: i64| self.settings().clip_shape([latent, 1, 1])[0];
        let factor = frames_of(2) - frames_of(1);
        let missing = factor - frames_of(1);
        match self.settings().long_decoding() {
            LongDecoding::FrameByFrame { .. } => Chunks { length: self.clip, overlap: 0, factor, reach: 0, missing },
            LongDecoding::Overlapping { reach } => {
                let overlap = (self.clip / 2).max(i64::from(missing > 0));
                Chunks { length: self.clip.max(overlap + 1), overlap, factor, reach, missing }
            }
        }
    }

    /// Normalised z_0 `[1, C, F, h, w]` of any length → the video in pieces `[3, f, H, W]`, in order, not clamped.
    ///
    /// # Errors
    /// Those of `hand_on`.
    pub fn decode_long(&self, z_0: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        no_grad(|| self.chunks().decode(z_0, &mut |z| Ok(self.decode(z)), hand_on))
    }

    /// Clips `[B, 3, F, H, W]` in [−1, 1] → their reconstruction through the likeliest latent, the same shape. Always in
    /// full precision: it is what figures of reconstruction are measured on, and those tell one codec from another
    /// by less than the rounding of mixed precision.
    pub fn reconstruct(&self, x: &Tensor) -> Tensor {
        let _precision = Autocast::bfloat16(self.device, false);
        no_grad(|| self.codec.decode(self.codec.encode(&upload(x, self.device)).mode()))
    }

    /// The raw latents `[B, C, F', h, w]` of codes, integers `[B, F', h, w]`.
    ///
    /// # Errors
    /// A codec without a codebook.
    pub fn vectors(&self, codes: &Tensor) -> Result<Tensor> {
        no_grad(|| self.codec.vectors(&upload(codes, self.device)))
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::{
        super::{AutoencoderConfig, VideoAutoencoder},
        *,
    };
    use crate::random::{Purpose, normal};

    /// In mixed precision the networks run in bfloat16, and what they give is float32; a reconstruction, which is
    /// measured, is computed in float32 whatever surrounds it.
    #[test]
    fn mixed_precision_reaches_the_autoencoder_and_leaves_float32() {
        let config: AutoencoderConfig =
            serde_json::from_str(r#"{"channels": 4, "factors": [2, 4, 4], "norm_groups": 4}"#).unwrap();
        let weights = Parameters::new(Device::Cpu, 1);
        VideoAutoencoder::new(&weights.root(), &config);
        let weights = weights.named().into_iter().collect();
        let space = LatentSpace::new(&config, weights, Normalization::NONE, 2, Device::Cpu).unwrap();
        let x = normal(0, Purpose::Evaluation, 0, 0, &[1, 3, 4, 16, 16]).clamp(-1.0, 1.0);
        let z_0 = normal(0, Purpose::Evaluation, 1, 0, &space.latent_shape(4, 16, 16).unwrap()).unsqueeze(0);
        let run = |half: bool| {
            let _precision = Autocast::bfloat16(Device::Cpu, half);
            [space.encode(&x).stacked(), space.decode(&z_0), space.reconstruct(&x)]
        };
        let (half, full) = (run(true), run(false));
        assert!(half.iter().all(|t| t.kind() == Kind::Float));
        let [encoded, decoded, reconstructed]: [f64; 3] =
            std::array::from_fn(|i| ((&half[i] - &full[i]).norm() / full[i].norm()).double_value(&[]));
        println!("bf16 differs from float32 by {encoded:.1e} encoded, {decoded:.1e} decoded");
        // bfloat16 has 8 bits: where they show, it was computed in them
        for difference in [encoded, decoded] {
            assert!((1e-4..3e-2).contains(&difference), "{encoded:e} {decoded:e}");
        }
        assert_eq!(reconstructed, 0.0);
    }

    /// Through pixels a clip of any size comes back to the bit, whatever noise its posterior is given.
    #[test]
    fn pixels_are_their_own_latents() {
        let space = LatentSpace::pixels(Device::Cpu);
        let size = [1, 3, 19, 5, 7];
        let x = normal(0, Purpose::Evaluation, 0, 0, &size).clamp(-1.0, 1.0);
        let noise = normal(0, Purpose::Posterior, 0, 0, &size);
        let z_0 = space.sample(&space.encode(&x), &noise);
        assert!(z_0.equal(&x) && space.decode(&z_0).equal(&x) && space.reconstruct(&x).equal(&x));
        let mut pieces = Vec::new();
        space
            .decode_long(&z_0, &mut |piece| {
                pieces.push(piece.copy());
                Ok(())
            })
            .unwrap();
        assert!(pieces.len() > 1 && Tensor::cat(&pieces, 1).equal(&x.squeeze_dim(0)));
        assert_eq!(space.latent_shape(19, 5, 7).unwrap(), size[1..]);
        assert_eq!(space.settings().clip_shape([19, 5, 7]), size[2..]);
    }
}
