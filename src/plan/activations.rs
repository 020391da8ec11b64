//! How much a forward pass keeps for its backward pass, out of forward passes over the smallest clips.
//!
//! What a layer keeps of a clip grows linearly with each of frames, height and width, and with the batch: so passes over
//! clips of one and of two units along each axis say what any clip needs; a unit is large enough that no axis is 1 long,
//! where LibTorch can do without copies. Scores of attention over the frames of a place
//! grow with the square of frames, which passes over three units tell. The passes run on the CPU, in the operations and the
//! precision that the network has on a GPU ([`as_on_gpu`](crate::torch::as_on_gpu)), and with weights without memory.

use anyhow::Result;

use crate::torch::Kept;

/// What a forward pass keeps for its backward pass, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Activations {
    /// Whatever the batch: in mixed precision, the weights in bfloat16.
    pub fixed: i64,
    /// For each clip of a batch.
    pub clip: i64,
    /// Whether more is kept than grows linearly, as scores of attention over all places of all frames: then these numbers
    /// are too small.
    pub incomplete: bool,
}

impl Activations {
    /// Of a batch.
    pub fn bytes(&self, batch: i64) -> i64 {
        self.fixed + batch * self.clip
    }

    /// Those of a clip of `units` times the smallest along frames, height and width: where nothing is computed again, and
    /// where the network's bodies are. `count` says what a pass over so many clips of so many units keeps; height and width
    /// are alike to it.
    ///
    /// # Errors
    /// Those of `count`.
    pub(super) fn of(units: [f64; 3], count: &dyn Fn(i64, [i64; 3]) -> Result<Kept>) -> Result<[Self; 2]> {
        let values = |batch: i64, size: [i64; 3]| -> Result<Vec<f64>> {
            let Kept { whole, stays, recomputed } = count(batch, size)?;
            Ok([whole, stays].into_iter().chain(recomputed).map(|bytes| bytes as f64).collect())
        };
        let corners = [[1, 1, 1], [2, 1, 1], [1, 2, 1], [2, 2, 1], [1, 2, 2], [2, 2, 2]];
        let corners: Vec<Vec<f64>> = corners.into_iter().map(|size| values(1, size)).collect::<Result<_>>()?;
        // half of a second difference: what grows with the square of an axis
        let squares = |one: &[f64], two: &[f64], three: &[f64]| -> Vec<f64> {
            let all = one.iter().zip(two).zip(three);
            all.map(|((one, two), three)| (three - 2.0 * two + one).max(0.0) / 2.0).collect()
        };
        let of_frames = squares(&corners[0], &corners[1], &values(1, [3, 1, 1])?);
        let at_two_rows = squares(&corners[2], &corners[3], &values(1, [3, 2, 1])?);
        // of which this is there for each place; tables of pairs of frames are there once
        let of_frames_a_place: Vec<f64> =
            at_two_rows.iter().zip(&of_frames).map(|(two, one)| (two - one).max(0.0)).collect();
        let of_rows = squares(&corners[0], &corners[2], &values(1, [1, 3, 1])?);
        let [frames, rows, columns] = units;
        let real: Vec<f64> = (0..corners[0].len())
            .map(|i| {
                let between = |low: f64, high: f64, at: f64| low + (high - low) * (at - 1.0);
                let along_frames = |low: usize| between(corners[low][i], corners[low + 1][i], frames);
                let [small, oblong, large] = [0, 2, 4].map(along_frames);
                let linear = between(between(small, oblong, rows), between(oblong, large, rows), columns);
                let square = of_frames[i] + of_frames_a_place[i] * (rows * columns - 1.0);
                linear + square * (frames - 1.0) * (frames - 2.0)
            })
            .collect();
        let fixed: Vec<f64> =
            values(2, [1; 3])?.iter().zip(&corners[0]).map(|(two, one)| (2.0 * one - two).max(0.0)).collect();
        // bodies are computed again one at a time
        let largest = (2..real.len()).max_by(|&a, &b| real[a].total_cmp(&real[b]));
        let places = rows * columns;
        Ok([vec![0], [1].into_iter().chain(largest).collect()].map(|parts| {
            let [real, fixed, of_frames, of_rows] = [&real, &fixed, &of_frames_a_place, &of_rows]
                .map(|values| parts.iter().map(|&part| values[part]).sum::<f64>());
            let missing = of_rows * frames * places.powi(2) + of_frames.min(of_rows) * (frames * places).powi(2);
            Activations { fixed: fixed as i64, clip: (real - fixed).max(0.0) as i64, incomplete: missing > 0.05 * real }
        }))
    }

    /// What is said where the count is too low.
    pub(super) fn note(&self) -> Option<String> {
        self.incomplete.then(|| {
            "This network keeps tensors that grow faster than its clips, as scores of attention over all places of all \
             frames do: activations are counted too low."
                .into()
        })
    }

    /// Both at a time.
    pub(super) fn and(self, other: Activations) -> Activations {
        Activations {
            fixed: self.fixed + other.fixed,
            clip: self.clip + other.clip,
            incomplete: self.incomplete || other.incomplete,
        }
    }

    /// Whichever is more for a batch of one, one after the other.
    pub(super) fn or(self, other: Activations) -> Activations {
        if self.bytes(1) >= other.bytes(1) { self } else { other }
    }
}
