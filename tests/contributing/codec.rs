//! A codec without weights: a latent is the clip at a lower resolution.

use anyhow::{Result, ensure};
use lvdm::{
    codecs::{CodecSettings, Encoded, EncodedKind, LongDecoding, VideoCodec},
    nn::Scope,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Tensor;

/// Squares of pixels become their mean: `{kind: averages, side: 4}`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Averages {
    /// Height and width of a square in pixels.
    pub side: i64,
}

impl CodecSettings for Averages {
    fn name(&self) -> &'static str {
        "averages"
    }

    fn latent_channels(&self) -> i64 {
        3
    }

    fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        let side = self.side;
        ensure!(
            height % side == 0 && width % side == 0,
            "{width}x{height} does not divide into squares of {side}x{side}"
        );
        Ok([3, frames, height / side, width / side])
    }

    fn clip_shape(&self, [frames, height, width]: [i64; 3]) -> [i64; 3] {
        [frames, height * self.side, width * self.side]
    }

    fn long_decoding(&self) -> LongDecoding {
        LongDecoding::FrameByFrame { at_once: 8 }
    }

    fn flops(&self, _frames: i64, _height: i64, _width: i64) -> [i64; 2] {
        [0, 0] // neither convolutions nor linear maps
    }

    fn encodes_to(&self) -> EncodedKind {
        EncodedKind::Exact
    }

    fn build(&self, _: &Scope) -> Box<dyn VideoCodec> {
        Box::new(*self)
    }
}

impl VideoCodec for Averages {
    fn encode(&self, x: &Tensor) -> Encoded {
        let square = [1, self.side, self.side];
        Encoded::Exact(x.avg_pool3d(square, square, [0, 0, 0], false, true, None::<i64>))
    }

    fn decode(&self, z: &Tensor) -> Tensor {
        z.repeat_interleave_self_int(self.side, 3, None).repeat_interleave_self_int(self.side, 4, None)
    }

    fn settings(&self) -> &dyn CodecSettings {
        self
    }
}

// What follows is its test, which stands in the same file.

use std::collections::BTreeMap;

use lvdm::codecs::{LatentSpace, Normalization};

use super::common::{largest_difference, noise};

/// Clips of squares come back whole, all at once and piece by piece, and others as their means.
#[test]
fn clips_are_encoded_and_decoded() {
    let settings: Averages = super::settings("{side: 2}");
    let error = settings.latent_shape(16, 6, 5).unwrap_err().to_string();
    assert!(error.contains("5x6") && error.contains("2x2"), "{error}");
    assert_eq!(
        (settings.latent_shape(19, 6, 4).unwrap(), settings.clip_shape([19, 3, 2])),
        ([3, 19, 3, 2], [19, 6, 4])
    );
    let normalization = Normalization { scale: 2.0, shift: 0.5 };
    let space = LatentSpace::new(&settings, BTreeMap::new(), normalization, 16, tch::Device::Cpu).unwrap();
    let squares = settings.decode(&noise(0, &[1, 3, 19, 3, 2]));
    let z_0 = space.sample(&space.encode(&squares), &squares);
    assert!(largest_difference(&z_0, &((noise(0, &[1, 3, 19, 3, 2]) + 0.5) * 2.0)) < 1e-5);
    assert!(largest_difference(&space.decode(&z_0), &squares) < 1e-5);
    let mut pieces = Vec::new();
    let hand_on = &mut |piece: &Tensor| {
        pieces.push(piece.copy());
        Ok(())
    };
    space.decode_long(&z_0, hand_on).unwrap();
    assert_eq!(pieces.iter().map(|piece| piece.size()[1]).sum::<i64>(), 19);
    assert!(pieces.len() > 1);
    assert!(largest_difference(&Tensor::cat(&pieces, 1).unsqueeze(0), &squares) < 1e-5);
    let clip = noise(1, &[1, 3, 19, 6, 4]);
    let means = space.reconstruct(&clip);
    assert!(largest_difference(&means.mean(tch::Kind::Double), &clip.mean(tch::Kind::Double)) < 1e-5);
    assert!(largest_difference(&means, &clip) > 0.5);
}
