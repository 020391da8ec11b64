//! Clips that are made of real ones: baselines of figures, and what shows to which faults of videos a metric answers.

use rand::{RngExt, seq::SliceRandom};
use tch::{Kind, Tensor};

use crate::random::{Purpose, stream};

/// Steps of the generator of [`Purpose::Evaluation`], whose samples are the numbers of clips.
const ORDER: u64 = 1;
const JITTER: u64 = 4;

/// A fault that is put into real clips.
pub struct Perturbation {
    /// Of the set of clips that have it.
    pub name: &'static str,
    /// What was done to them.
    pub meaning: &'static str,
    /// Clips u8 `[N, 3, F, H, W]` with the fault; the number of the first clip, and a seed.
    pub apply: fn(&Tensor, u64, u64) -> Tensor,
}

/// The faults of a sensitivity table. Those of single frames come first, then those of motion alone, which leave every
/// frame as it is.
pub const PERTURBATIONS: [Perturbation; 5] = [
    Perturbation {
        name: "blurred",
        meaning: "blurred by a Gaussian of 1/64 of the width",
        apply: |x, _, _| blurred(x),
    },
    Perturbation { name: "jittered", meaning: "each frame displaced by up to 1/32 of the width", apply: jittered },
    Perturbation { name: "shuffled", meaning: "frames in a random order", apply: shuffled },
    Perturbation { name: "reversed", meaning: "played backwards", apply: |x, _, _| x.flip([2]) },
    Perturbation { name: "frozen", meaning: "standing still at the first frame", apply: |x, _, _| frozen(x) },
];

/// Every frame is the first. Clips `[N, 3, F, H, W]`.
pub fn frozen(clips: &Tensor) -> Tensor {
    clips.narrow(2, 0, 1).expand_as(clips)
}

/// The frames of each clip in a random order; `first` is the number of the first clip.
pub fn shuffled(clips: &Tensor, first: u64, seed: u64) -> Tensor {
    let rows: Vec<Tensor> = (0..clips.size()[0])
        .map(|i| {
            let mut order: Vec<i64> = (0..clips.size()[2]).collect();
            order.shuffle(&mut stream(seed, Purpose::Evaluation, first + i as u64, ORDER));
            clips.narrow(0, i, 1).index_select(2, &Tensor::from_slice(&order))
        })
        .collect();
    Tensor::cat(&rows, 0)
}

/// Each frame blurred by a Gaussian with a standard deviation of 1/64 of the width, at least one pixel; beyond the edge
/// lies the edge's own colour.
fn blurred(clips: &Tensor) -> Tensor {
    let (n, c, f, h, w) = clips.size5().expect("clips [N, 3, F, H, W]");
    let sigma = (w as f64 / 64.0).max(1.0);
    let reach = (3.0 * sigma).ceil() as i64;
    let offset = Tensor::arange_start(-reach, reach + 1, (Kind::Float, clips.device()));
    let line = (offset.square() / (-2.0 * sigma * sigma)).exp();
    let line = &line / line.sum(Kind::Float);
    let planes = clips.to_kind(Kind::Float).reshape([n * c * f, 1, h, w]); // [N·3·F, 1, H, W]
    let padded = planes.replication_pad2d([reach; 4]);
    let across = padded.conv2d(&line.view([1, 1, 1, -1]), None::<Tensor>, [1, 1], [0, 0], [1, 1], 1);
    let down = across.conv2d(&line.view([1, 1, -1, 1]), None::<Tensor>, [1, 1], [0, 0], [1, 1], 1);
    down.round().clamp(0.0, 255.0).to_kind(Kind::Uint8).view([n, c, f, h, w])
}

/// Each frame displaced, on its own, by up to 1/32 of the width in either direction, at least one pixel; the edge's colour
/// comes in. `first` is the number of the first clip.
fn jittered(clips: &Tensor, first: u64, seed: u64) -> Tensor {
    let (n, c, f, h, w) = clips.size5().expect("clips [N, 3, F, H, W]");
    let most = (w / 32).max(1);
    let planes = clips.to_kind(Kind::Float).reshape([n, c * f, h, w]);
    let padded = planes.replication_pad2d([most; 4]).view([n, c, f, h + 2 * most, w + 2 * most]);
    let rows: Vec<Tensor> = (0..n)
        .map(|i| {
            let mut random = stream(seed, Purpose::Evaluation, first + i as u64, JITTER);
            let frames: Vec<Tensor> = (0..f)
                .map(|frame| {
                    let [down, right] = [0; 2].map(|_: i64| random.random_range(0..=2 * most));
                    padded.get(i).select(1, frame).narrow(1, down, h).narrow(2, right, w)
                })
                .collect();
            Tensor::stack(&frames, 1)
        })
        .collect();
    Tensor::stack(&rows, 0).to_kind(Kind::Uint8)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn noise(count: i64) -> Tensor {
        let size = [count, 3, 6, 20, 64];
        let x = Tensor::arange(size.iter().product::<i64>(), (Kind::Double, Device::Cpu)) * 12.9898;
        ((x.sin() * 43758.5453).frac().abs() * 255.0).to_kind(Kind::Uint8).view(size)
    }

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

    /// No fault changes a size; all but the blur and the jitter leave the frames as they are.
    #[test]
    fn faults_of_motion_leave_frames_alone() {
        let clips = noise(2);
        let (_, _, f, ..) = clips.size5().unwrap();
        let frames = |x: &Tensor| (0..f).map(|frame| x.select(2, frame)).collect::<Vec<_>>();
        for Perturbation { name, apply, .. } in &PERTURBATIONS {
            let made = apply(&clips, 0, 7);
            assert_eq!((made.size(), made.kind()), (clips.size(), Kind::Uint8), "{name}");
            assert!(!made.equal(&clips), "{name}");
            let one = |frame: &Tensor, clip| frames(&clips).iter().any(|own| own.get(clip).equal(&frame.get(clip)));
            let same = frames(&made).iter().all(|frame| one(frame, 0) && one(frame, 1));
            assert_eq!(same, !["blurred", "jittered"].contains(name), "{name}");
        }
    }

    #[test]
    fn a_blur_keeps_the_mean_and_a_flat_picture() {
        let clips = noise(1);
        let double = |x: &Tensor| x.to_kind(Kind::Double);
        let spread = |x: &Tensor| double(x).std(false).double_value(&[]);
        let mean = |x: &Tensor| double(x).mean(Kind::Double).double_value(&[]);
        let made = blurred(&clips);
        assert!((mean(&made) - mean(&clips)).abs() < 1.0 && spread(&made) < spread(&clips) / 2.0);
        let flat = Tensor::full([1, 3, 2, 16, 16], 93.0, (Kind::Uint8, Device::Cpu));
        assert!(blurred(&flat).equal(&flat));
    }

    /// Away from the edge every jittered frame is the frame at one of 5 × 5 displacements, and not all at the same one.
    #[test]
    fn a_jitter_displaces_whole_frames() {
        let clips = noise(2);
        let made = jittered(&clips, 3, 0);
        let inner = |x: &Tensor, down: i64, right: i64| x.narrow(2, 2 + down, 16).narrow(3, 2 + right, 60);
        let mut found = std::collections::BTreeSet::new();
        for frame in 0..6 {
            let (from, to) = (clips.select(2, frame), made.select(2, frame).narrow(0, 0, 1));
            let hit = (-2..=2)
                .flat_map(|down| (-2..=2).map(move |right| (down, right)))
                .find(|(down, right)| inner(&from.narrow(0, 0, 1), *down, *right).equal(&inner(&to, 0, 0)));
            found.insert(hit.expect("a displacement"));
        }
        assert!(found.len() > 1);
        // a clip's displacements do not depend on its neighbours
        assert!(jittered(&clips.narrow(0, 1, 1), 4, 0).equal(&made.narrow(0, 1, 1)));
    }
}
