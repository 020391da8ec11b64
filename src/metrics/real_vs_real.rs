//! What two sets of real clips are from each other: the distance that no generated set is expected to fall below.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    divisor::Divisor,
    registry::{Distances, Metric},
};

/// The real-vs-real baseline: the distance between two sets of real clips.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RealVsReal {
    /// By metric.
    #[serde(flatten)]
    pub distances: Distances,
    /// Of each of the two sets.
    pub clips: i64,
    /// Which two sets.
    pub sets: RealPairs,
}

/// Which two sets of real clips.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RealPairs {
    /// Draws of different videos of the real data set.
    Draws,
    /// The real clips, and clips that were trained on.
    Trained,
    /// Clips of other parts of the same videos, where there are not enough for two draws: no frame is in both, but what
    /// videos have in common lowers it.
    Parts,
    /// Halves of the real clips, where videos are too short for two: the baseline at half as many clips, which is higher.
    Halves,
}

impl RealPairs {
    /// The halves of one set of features `[N, …]`, whose clips take turns.
    pub fn halves(real: &Tensor) -> [Tensor; 2] {
        let half = real.size()[0] / 2;
        [0, 1].map(|first| real.slice(0, first, first + 2 * half - 1, 2))
    }
}

impl RealVsReal {
    /// Of the features of two sets, `[N, …]` and `[M, …]`.
    ///
    /// # Errors
    /// As [`VideoMetric::compute`](super::VideoMetric::compute).
    pub fn between(metrics: &[Metric], [a, b]: &[Tensor; 2], sets: RealPairs, divisor: Divisor) -> Result<Self> {
        let distance = |&metric: &Metric| Ok((metric, metric.compute(a, b, divisor)?));
        let distances = metrics.iter().map(distance).collect::<Result<Distances>>()?;
        Ok(RealVsReal { distances, clips: a.size()[0].min(b.size()[0]), sets })
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let sets = match self.sets {
            RealPairs::Draws => "two draws of the real clips",
            RealPairs::Trained => "clips that were trained on against the real ones",
            RealPairs::Parts => "other parts of the same real videos, no frame in both: with other videos it is higher",
            RealPairs::Halves => "halves of the real clips: at twice as many it is lower",
        };
        let distance = |(metric, value): (Metric, f64)| format!("{} {value:.*}", metric.title(), metric.digits());
        let distances: Vec<String> = self.distances.iter().map(distance).collect();
        format!("real against real at {} clips: {} ({sets})", self.clips, distances.join(", "))
    }
}
