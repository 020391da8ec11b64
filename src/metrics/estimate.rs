//! What an FVD and a KVD of finitely many clips are worth: all runs, an interval, an extrapolation.
//!
//! FVD is biased: fewer clips give a larger one, so a resampling that repeats clips (the bootstrap) misses its own
//! estimate. Everything here leaves clips out instead.

use anyhow::{Context, Result, ensure};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{Divisor, frechet::frechet_distance_by, kernel_distance, mmd::kernel_distances_without_groups};
use crate::random::{Purpose, stream};

/// Both distances of one set of clips from another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Distances {
    /// Fréchet distance of the features' Gaussians.
    pub fvd: f64,
    /// Unbiased squared MMD by a cubic kernel; can be negative.
    pub kvd: f64,
}

impl Distances {
    /// Of features `[N, D]` and `[M, D]`, with covariances over n − 1.
    ///
    /// # Errors
    /// Fewer than two samples, other widths, values that are not finite.
    pub fn between(real: &Tensor, generated: &Tensor) -> Result<Self> {
        Self::by(real, generated, Divisor::NMinusOne)
    }

    /// As [`Distances::between`], with the divisor that a protocol says.
    ///
    /// # Errors
    /// The same.
    pub fn by(real: &Tensor, generated: &Tensor, divisor: Divisor) -> Result<Self> {
        let fvd = frechet_distance_by(real, generated, divisor)?;
        Ok(Distances { fvd, kvd: kernel_distance(real, generated)? })
    }
}

/// Lower and upper end of an interval.
pub type Interval = [f64; 2];

/// The figures of one set of clips against the real ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Means over runs.
    pub fvd: f64,
    /// Mean over runs.
    pub kvd: f64,
    /// Over runs, divided by their number as the released code does; none of a single run.
    pub fvd_std: Option<f64>,
    /// Of several runs.
    pub kvd_std: Option<f64>,
    /// Every run.
    pub runs: Vec<Distances>,
    /// 95 % by the jackknife about the mean of all runs: what other clips of both sides would move. None of fewer than
    /// three clips.
    pub fvd_interval: Option<Interval>,
    /// As that of FVD.
    pub kvd_interval: Option<Interval>,
    /// FVD extrapolated to infinitely many clips, the mean over runs.
    pub fvd_extrapolated: f64,
    /// Clips of the real and of the generated side.
    pub clips: [i64; 2],
}

impl Figure {
    /// One run for each pair of feature sets; a side that is not redrawn has one set, which serves all runs.
    ///
    /// # Errors
    /// As [`Distances::between`].
    pub fn of(real: &[Tensor], generated: &[Tensor], divisor: Divisor, seed: u64) -> Result<Self> {
        ensure!(!real.is_empty() && !generated.is_empty(), "a side without clips");
        let count = real.len().max(generated.len());
        let sides: Vec<[&Tensor; 2]> =
            (0..count).map(|run| [&real[run % real.len()], &generated[run % generated.len()]]).collect();
        let runs: Vec<Distances> =
            sides.iter().map(|[real, generated]| Distances::by(real, generated, divisor)).collect::<Result<_>>()?;
        let (fvd, fvd_std) = mean_and_std(runs.iter().map(|run| run.fvd));
        let (kvd, kvd_std) = mean_and_std(runs.iter().map(|run| run.kvd));
        let subsets = SUBSETS.div_ceil(count as u64);
        let extrapolated: Vec<f64> = (seed..)
            .zip(&sides)
            .map(|(seed, [real, generated])| extrapolated_fvd(real, generated, divisor, subsets, seed))
            .collect::<Result<_>>()?;
        let errors = jackknife(&sides, divisor)?;
        Ok(Figure {
            fvd,
            kvd,
            fvd_std,
            kvd_std,
            fvd_interval: errors.map(|[error, _]| about(fvd, error)),
            kvd_interval: errors.map(|[_, error]| about(kvd, error)),
            fvd_extrapolated: mean_and_std(extrapolated.into_iter()).0,
            clips: [real[0].size()[0], generated[0].size()[0]],
            runs,
        })
    }

    /// Whether there are enough clips for the extrapolation to come near the limit; with fewer clips than features have
    /// numbers it stays above it.
    pub fn extrapolates(&self, width: i64) -> bool {
        self.clips.iter().all(|clips| *clips >= width)
    }
}

fn mean_and_std(values: impl Iterator<Item = f64>) -> (f64, Option<f64>) {
    let values: Vec<f64> = values.collect();
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    (mean, (values.len() > 1).then(|| variance.sqrt()))
}

/// Groups of clips that the jackknife leaves out, one after the other.
const GROUPS: i64 = 20;

/// The 95 % interval about a value with this standard error.
pub fn about(value: f64, error: f64) -> Interval {
    [value - 1.96 * error, value + 1.96 * error]
}

/// Standard errors of FVD and KVD, each the mean over runs of `[real, generated]` features, by the jackknife:
/// √((g−1)/g · Σ (θᵢ − θ̄)²), θᵢ being that mean without the i-th group of either side of each run. So a side that all
/// runs share weighs in full, and one that is redrawn less with every run. The bias of FVD is the same in all θᵢ and
/// falls out. None of fewer than three clips.
///
/// # Errors
/// As [`Distances::between`]; no runs.
pub fn jackknife(runs: &[[&Tensor; 2]], divisor: Divisor) -> Result<Option<[f64; 2]>> {
    let fewest = runs.iter().flatten().map(|features| features.size()[0]).min();
    let groups = GROUPS.min(fewest.context("a jackknife of no runs")?);
    if groups < 3 {
        // without one clip there is no covariance: nothing can be said
        return Ok(None);
    }
    let without = |features: &Tensor, group: i64| {
        let rows: Vec<i64> = (0..features.size()[0]).filter(|row| row % groups != group).collect();
        features.index_select(0, &Tensor::from_slice(&rows).to_device(features.device()))
    };
    let (mut fvds, mut kvds) = (vec![0.0; groups as usize], vec![0.0; groups as usize]);
    for [real, generated] in runs {
        for (group, sum) in (0..groups).zip(&mut fvds) {
            *sum += frechet_distance_by(&without(real, group), &without(generated, group), divisor)?;
        }
        for (kvd, sum) in kernel_distances_without_groups(real, generated, groups)?.into_iter().zip(&mut kvds) {
            *sum += kvd;
        }
    }
    let error = |sums: Vec<f64>| {
        let (_, std) = mean_and_std(sums.into_iter().map(|sum| sum / runs.len() as f64));
        std.map(|std| std * ((groups - 1) as f64).sqrt())
    };
    Ok(error(fvds).zip(error(kvds)).map(|(fvd, kvd)| [fvd, kvd]))
}

/// Sizes of subsets, as parts of all clips.
const PARTS: [f64; 5] = [0.5, 0.6, 0.7, 0.8, 0.9];

/// Subsets of each size, at least so many of all runs together.
const SUBSETS: u64 = 4;

/// FVD at infinitely many clips: the straight line of FVD over 1/N through subsets drawn without replacement, so many of
/// each size, at 0 (Chong & Forsyth 2020, arXiv 1911.07023). Of fewer clips than features have numbers the line is bent and its end
/// lies above the limit.
///
/// # Errors
/// As [`Distances::between`].
pub fn extrapolated_fvd(real: &Tensor, generated: &Tensor, divisor: Divisor, subsets: u64, seed: u64) -> Result<f64> {
    let [n, m] = [real.size()[0], generated.size()[0]];
    let mut points = vec![(2.0 / (n + m) as f64, frechet_distance_by(real, generated, divisor)?)];
    for (i, part) in PARTS.into_iter().enumerate() {
        let [few, few_generated] = [n, m].map(|count| (count as f64 * part).round() as i64);
        if few < 2 || few_generated < 2 {
            continue;
        }
        let subset = |features: &Tensor, few: i64, side: u64, draw: u64| {
            let mut rows: Vec<i64> = (0..features.size()[0]).collect();
            rows.shuffle(&mut stream(seed, Purpose::Evaluation, side, (i as u64) << 32 | draw));
            features.index_select(0, &Tensor::from_slice(&rows[..few as usize]).to_device(features.device()))
        };
        let mut sum = 0.0;
        for draw in 0..subsets {
            let (a, b) = (subset(real, few, 0, draw), subset(generated, few_generated, 1, draw));
            sum += frechet_distance_by(&a, &b, divisor)?;
        }
        points.push((2.0 / (few + few_generated) as f64, sum / subsets as f64));
    }
    let count = points.len() as f64;
    let mean = |value: &dyn Fn(&(f64, f64)) -> f64| points.iter().map(value).sum::<f64>() / count;
    let (x, y) = (mean(&|point| point.0), mean(&|point| point.1));
    let slope_down = mean(&|point| (point.0 - x).powi(2));
    if slope_down == 0.0 {
        return Ok(y);
    }
    let slope = mean(&|point| (point.0 - x) * (point.1 - y)) / slope_down;
    Ok(y - slope * x)
}

/// How far two sets of real clips are from each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Floor {
    /// What the two sets are apart.
    #[serde(flatten)]
    pub distances: Distances,
    /// Of each of the two sets.
    pub clips: i64,
    /// Which two sets.
    pub sets: FloorSets,
}

/// Which two sets of real clips.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FloorSets {
    /// Draws of different videos of the real data set.
    Draws,
    /// The real clips, and clips that were trained on.
    Trained,
    /// Clips of other parts of the same videos, where there are not enough for two draws: no frame is in both, but what
    /// videos have in common lowers it.
    Parts,
    /// Halves of the real clips, where videos are too short for two: the floor at half as many clips, which is higher.
    Halves,
}

impl Floor {
    /// The halves of one set of features `[N, D]`, whose clips take turns.
    pub fn halves(real: &Tensor) -> [Tensor; 2] {
        let half = real.size()[0] / 2;
        [0, 1].map(|first| real.slice(0, first, first + 2 * half - 1, 2))
    }

    /// Of two sets.
    ///
    /// # Errors
    /// As [`Distances::between`].
    pub fn between(a: &Tensor, b: &Tensor, sets: FloorSets, divisor: Divisor) -> Result<Self> {
        Ok(Floor { distances: Distances::by(a, b, divisor)?, clips: a.size()[0].min(b.size()[0]), sets })
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let sets = match self.sets {
            FloorSets::Draws => "two draws of the real clips",
            FloorSets::Trained => "clips that were trained on against the real ones",
            FloorSets::Parts => "other parts of the same real videos, no frame in both: with other videos it is higher",
            FloorSets::Halves => "halves of the real clips: at twice as many it is lower",
        };
        let Distances { fvd, kvd } = self.distances;
        format!("floor at {} clips: FVD {fvd:.2}, KVD {kvd:.3} ({sets})", self.clips)
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::random::normal;

    /// Standard deviations whose squares fall like 1/k and sum to `total`.
    fn falling(width: i64, total: f64) -> Tensor {
        let variances = Tensor::arange_start(1, width + 1, (Kind::Double, Device::Cpu)).reciprocal();
        let sum = variances.sum(Kind::Double);
        (variances / sum * total).sqrt()
    }

    /// Normal samples `[count, width]` of these standard deviations.
    fn gaussian(count: i64, spread: &Tensor, seed: u64) -> Tensor {
        let width = spread.size()[0];
        normal(seed, Purpose::Evaluation, 9, 0, &[count, width]).to_kind(Kind::Double) * spread
    }

    fn set(tensor: Tensor) -> Vec<Tensor> {
        vec![tensor]
    }

    /// Sixty-four clips a side are far from their own distribution: in 400 dimensions with a spread like that of
    /// I3D's logits their FVD is hundreds, and a KVD of 0 is inside its interval.
    #[test]
    fn a_distribution_is_far_from_itself_at_64_clips() {
        let spread = falling(400, 400.0);
        let (a, b) = (gaussian(64, &spread, 1), gaussian(64, &spread, 2));
        let figure = Figure::of(&set(a), &set(b), Divisor::NMinusOne, 0).unwrap();
        assert!((200.0..400.0).contains(&figure.fvd), "{figure:?}");
        let [low, high] = figure.kvd_interval.unwrap();
        assert!(low < 0.0 && high > 0.0, "{figure:?}");
        assert!(figure.fvd_extrapolated < figure.fvd && !figure.extrapolates(400));
        let [one, other] = Floor::halves(&gaussian(128, &spread, 3));
        let halves = Floor::between(&one, &other, FloorSets::Halves, Divisor::NMinusOne).unwrap();
        assert!(halves.clips == 64 && (halves.distances.fvd - figure.fvd).abs() < 40.0, "{halves:?} {figure:?}");
    }

    #[test]
    fn the_interval_contains_the_estimate_and_most_others() {
        let spread = falling(20, 20.0);
        let fvds: Vec<Figure> = (0..20)
            .map(|i| {
                let other = gaussian(300, &spread, 200 + i) * 1.3 + 0.4;
                Figure::of(&set(gaussian(300, &spread, i)), &set(other), Divisor::NMinusOne, 0).unwrap()
            })
            .collect();
        let mean = fvds.iter().map(|figure| figure.fvd).sum::<f64>() / 20.0;
        for figure in &fvds {
            let [low, high] = figure.fvd_interval.unwrap();
            assert!(low < figure.fvd && figure.fvd < high, "{figure:?}");
        }
        let ends: Vec<Interval> = fvds.iter().filter_map(|figure| figure.fvd_interval).collect();
        let inside = ends.iter().filter(|[low, high]| (*low..*high).contains(&mean)).count();
        assert!(inside >= 16, "{inside} of 20 intervals contain the mean");
        // and they are not simply wide
        let widths = ends.iter().map(|[low, high]| high - low).sum::<f64>() / 20.0;
        let spread_of_figures = mean_and_std(fvds.iter().map(|f| f.fvd)).1.unwrap();
        assert!(widths < 3.0 * 3.92 * spread_of_figures, "{widths} {spread_of_figures}");
    }

    /// With more clips than dimensions the known distance of the two Gaussians is found again.
    #[test]
    fn the_extrapolation_finds_the_known_distance() {
        let spread = falling(40, 60.0);
        let truth = 40.0 * 0.3f64.powi(2) + 60.0 * 0.2f64.powi(2);
        let figures: Vec<Figure> = (0..10)
            .map(|seed| {
                let (a, b) = (gaussian(400, &spread, 100 + seed), gaussian(400, &spread, 200 + seed) * 1.2 + 0.3);
                Figure::of(&set(a), &set(b), Divisor::NMinusOne, seed).unwrap()
            })
            .collect();
        assert!(figures[0].extrapolates(40));
        let (measured, _) = mean_and_std(figures.iter().map(|figure| figure.fvd));
        let (extrapolated, _) = mean_and_std(figures.iter().map(|figure| figure.fvd_extrapolated));
        assert!(measured > truth + 1.5, "{measured} is above {truth}");
        assert!((extrapolated - truth).abs() < 0.5, "{extrapolated} is not {truth}");
    }

    #[test]
    fn runs_redraw_one_side() {
        let spread = falling(8, 8.0);
        let real: Vec<Tensor> = (0..5).map(|i| gaussian(30, &spread, i)).collect();
        let generated = set(gaussian(30, &spread, 77) + 1.0);
        let figure = Figure::of(&real, &generated, Divisor::NMinusOne, 0).unwrap();
        assert_eq!(figure.runs.len(), 5);
        for (run, real) in figure.runs.iter().zip(&real) {
            assert_eq!(*run, Distances::between(real, &generated[0]).unwrap());
        }
        assert!((figure.fvd - figure.runs.iter().map(|run| run.fvd).sum::<f64>() / 5.0).abs() < 1e-12);
        assert!(figure.fvd_std.unwrap() > 0.0);
        // the interval is about what is printed
        let centre = |[low, high]: Interval| (low + high) / 2.0;
        assert!((centre(figure.fvd_interval.unwrap()) - figure.fvd).abs() < 1e-9, "{figure:?}");
        assert!((centre(figure.kvd_interval.unwrap()) - figure.kvd).abs() < 1e-9, "{figure:?}");
        let alone = Figure::of(&real[..1], &generated, Divisor::NMinusOne, 0).unwrap();
        assert!(alone.fvd_std.is_none() && alone.runs.len() == 1);
    }

    /// Its width is that of the mean of the runs: about what such means differ by when all clips are others.
    #[test]
    fn the_interval_of_several_runs_is_of_their_mean() {
        let spread = falling(12, 12.0);
        let figures: Vec<Figure> = (0..30)
            .map(|i| {
                let real: Vec<Tensor> = (0..6).map(|run| gaussian(100, &spread, 1000 + 10 * i + run)).collect();
                let generated = gaussian(100, &spread, 2000 + i) * 1.4 + 0.5;
                Figure::of(&real, &set(generated), Divisor::NMinusOne, 0).unwrap()
            })
            .collect();
        let width = |figure: &Figure| figure.fvd_interval.map(|[low, high]| (high - low) / 3.92).unwrap();
        let mean_width = figures.iter().map(width).sum::<f64>() / 30.0;
        let differ = mean_and_std(figures.iter().map(|figure| figure.fvd)).1.unwrap();
        assert!((0.6..1.7).contains(&(mean_width / differ)), "{mean_width} {differ}");
    }

    #[test]
    fn two_clips_have_no_interval() {
        let spread = falling(8, 8.0);
        let figure =
            Figure::of(&set(gaussian(2, &spread, 0)), &set(gaussian(2, &spread, 1)), Divisor::NMinusOne, 0).unwrap();
        assert!(figure.fvd.is_finite() && figure.fvd_interval.is_none());
    }
}
