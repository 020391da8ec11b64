//! Clips that are made of real ones, for figures that say what a metric answers to.

use rand::seq::SliceRandom;
use tch::Tensor;

use crate::random::{Purpose, stream};

/// Every frame is the first. Clips `[N, 3, F, H, W]`.
pub fn frozen(clips: &Tensor) -> Tensor {
    clips.narrow(2, 0, 1).expand_as(clips)
}

/// The frames of each clip in a random order; `first` is the number of the first clip.
pub fn shuffled(clips: &Tensor, first: u64, seed: u64) -> Tensor {
    let rows: Vec<Tensor> = (0..clips.size()[0])
        .map(|i| {
            let mut order: Vec<i64> = (0..clips.size()[2]).collect();
            order.shuffle(&mut stream(seed, Purpose::Evaluation, first + i as u64, 1));
            clips.narrow(0, i, 1).index_select(2, &Tensor::from_slice(&order))
        })
        .collect();
    Tensor::cat(&rows, 0)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    #[test]
    fn shuffled_frames_are_the_same_frames() {
        let clips = Tensor::arange(12, (Kind::Uint8, Device::Cpu)).view([2, 1, 6, 1, 1]).expand([2, 3, 6, 4, 4], false);
        let mixed = shuffled(&clips, 5, 0);
        assert!(!mixed.equal(&clips));
        assert!(mixed.sort(2, false).0.equal(&clips));
        // a clip's order does not depend on its neighbours
        assert!(shuffled(&clips.narrow(0, 1, 1), 6, 0).equal(&mixed.narrow(0, 1, 1)));
        assert!(frozen(&clips).select(2, 5).equal(&clips.select(2, 0)));
    }
}
