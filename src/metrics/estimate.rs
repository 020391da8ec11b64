//! What an FVD and a KVD of finitely many clips are worth: all runs, an interval, an extrapolation.
//!
//! FVD is biased: fewer clips give a larger one, so a resampling that repeats clips (the bootstrap) misses its own
//! estimate. Everything here leaves clips out instead.

use anyhow::{Context, Result};
use rand::seq::SliceRandom;
use tch::Tensor;

use super::{divisor::Divisor, registry::Metric};
use crate::random::{Purpose, stream};

/// Lower and upper end of an interval.
pub type Interval = [f64; 2];

/// The mean, and the standard deviation of several values, divided by their number.
pub(super) fn mean_and_std(values: impl Iterator<Item = f64>) -> (f64, Option<f64>) {
    let values: Vec<f64> = values.collect();
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    (mean, (values.len() > 1).then(|| variance.sqrt()))
}

/// Groups of clips that the jackknife leaves out, one after the other.
const GROUPS: i64 = 20;

/// The 95 % interval about a value with this standard error.
pub(super) fn about(value: f64, error: f64) -> Interval {
    [value - 1.96 * error, value + 1.96 * error]
}

/// The standard error of a metric, the mean over runs of `[real, generated]` features, by the jackknife:
/// √((g−1)/g · Σ (θᵢ − θ̄)²), θᵢ being that mean without the i-th group of real and of generated clips of each run. So a
/// set that all runs share weighs in full, and one that is redrawn less with every run. The bias of FVD is the same in all
/// θᵢ and falls out. None of fewer than three clips.
pub(super) fn jackknife(metric: Metric, runs: &[[&Tensor; 2]], divisor: Divisor) -> Result<Option<f64>> {
    let fewest = runs.iter().flatten().map(|features| features.size()[0]).min();
    let groups = GROUPS.min(fewest.context("a jackknife of no runs")?);
    if groups < 3 {
        // without one clip there is no covariance: nothing can be said
        return Ok(None);
    }
    let mut sums = vec![0.0; groups as usize];
    for [real, generated] in runs {
        for (value, sum) in metric.without_groups(real, generated, groups, divisor)?.into_iter().zip(&mut sums) {
            *sum += value;
        }
    }
    let (_, std) = mean_and_std(sums.into_iter().map(|sum| sum / runs.len() as f64));
    Ok(std.map(|std| std * ((groups - 1) as f64).sqrt()))
}

/// Sizes of subsets, as parts of all clips.
const PARTS: [f64; 5] = [0.5, 0.6, 0.7, 0.8, 0.9];

/// Subsets of each size, at least so many of all runs together.
pub(super) const SUBSETS: u64 = 4;

/// A biased metric at infinitely many clips: the straight line of the metric over 1/N through subsets drawn without replacement, so many of
/// each size, at 0 (Chong & Forsyth 2020, arXiv 1911.07023). Of fewer clips than features have numbers the line is bent and its end
/// lies above the limit.
pub(super) fn extrapolated(
    metric: Metric,
    real: &Tensor,
    generated: &Tensor,
    divisor: Divisor,
    subsets: u64,
    seed: u64,
) -> Result<f64> {
    let [n, m] = [real.size()[0], generated.size()[0]];
    let mut points = vec![(2.0 / (n + m) as f64, metric.compute(real, generated, divisor)?)];
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
            sum += metric.compute(&a, &b, divisor)?;
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

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{
        metrics::{Estimate, Figure, RealPairs, RealVsReal},
        random::normal,
    };

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

    /// FVD and KVD of sets of features.
    fn figure_of(real: &[Tensor], generated: &[Tensor], seed: u64) -> Figure {
        Figure::of(&[Metric::FVD, Metric::KVD], real, generated, Divisor::NMinusOne, seed).unwrap()
    }

    fn fvd(figure: &Figure) -> &Estimate {
        &figure.estimates[&Metric::FVD]
    }

    fn kvd(figure: &Figure) -> &Estimate {
        &figure.estimates[&Metric::KVD]
    }

    /// Two sets of sixty-four clips are far from their own distribution: in 400 dimensions with a spread like that of
    /// I3D's logits their FVD is hundreds, and a KVD of 0 is inside its interval.
    #[test]
    fn a_distribution_is_far_from_itself_at_64_clips() {
        let spread = falling(400, 400.0);
        let (a, b) = (gaussian(64, &spread, 1), gaussian(64, &spread, 2));
        let figure = figure_of(&[a], &[b], 0);
        assert!((200.0..400.0).contains(&fvd(&figure).value), "{figure:?}");
        let [low, high] = kvd(&figure).interval.unwrap();
        assert!(low < 0.0 && high > 0.0, "{figure:?}");
        let extrapolation = fvd(&figure).extrapolation.unwrap();
        assert!(extrapolation.value < fvd(&figure).value && extrapolation.least_clips == 400);
        assert!(!figure.reaches(&extrapolation));
        let halves = RealPairs::halves(&gaussian(128, &spread, 3));
        let halves = RealVsReal::between(&[Metric::FVD], &halves, RealPairs::Halves, Divisor::NMinusOne).unwrap();
        let distance = halves.distances.get(Metric::FVD).unwrap();
        assert!(halves.clips == 64 && (distance - fvd(&figure).value).abs() < 40.0, "{halves:?} {figure:?}");
    }

    #[test]
    fn the_interval_contains_the_estimate_and_most_others() {
        let spread = falling(20, 20.0);
        let figures: Vec<Figure> = (0..20)
            .map(|i| {
                let other = gaussian(300, &spread, 200 + i) * 1.3 + 0.4;
                figure_of(&[gaussian(300, &spread, i)], &[other], 0)
            })
            .collect();
        let mean = figures.iter().map(|figure| fvd(figure).value).sum::<f64>() / 20.0;
        for figure in &figures {
            let [low, high] = fvd(figure).interval.unwrap();
            assert!(low < fvd(figure).value && fvd(figure).value < high, "{figure:?}");
        }
        let ends: Vec<Interval> = figures.iter().filter_map(|figure| fvd(figure).interval).collect();
        let inside = ends.iter().filter(|[low, high]| (*low..*high).contains(&mean)).count();
        assert!(inside >= 16, "{inside} of 20 intervals contain the mean");
        // and they are not simply wide
        let widths = ends.iter().map(|[low, high]| high - low).sum::<f64>() / 20.0;
        let spread_of_figures = mean_and_std(figures.iter().map(|figure| fvd(figure).value)).1.unwrap();
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
                figure_of(&[a], &[b], seed)
            })
            .collect();
        let end = |figure: &Figure| fvd(figure).extrapolation.unwrap();
        assert!(figures[0].reaches(&end(&figures[0])));
        let (measured, _) = mean_and_std(figures.iter().map(|figure| fvd(figure).value));
        let (extrapolated, _) = mean_and_std(figures.iter().map(|figure| end(figure).value));
        assert!(measured > truth + 1.5, "{measured} is above {truth}");
        assert!((extrapolated - truth).abs() < 0.5, "{extrapolated} is not {truth}");
    }

    #[test]
    fn runs_redraw_one_set() {
        let spread = falling(8, 8.0);
        let real: Vec<Tensor> = (0..5).map(|i| gaussian(30, &spread, i)).collect();
        let generated = [gaussian(30, &spread, 77) + 1.0];
        let figure = figure_of(&real, &generated, 0);
        assert_eq!(figure.runs.len(), 5);
        for (run, real) in figure.runs.iter().zip(&real) {
            let distance = |metric: Metric| metric.compute(real, &generated[0], Divisor::NMinusOne).unwrap();
            assert_eq!(*run, [Metric::FVD, Metric::KVD].map(|metric| (metric, distance(metric))).into_iter().collect());
        }
        let mean = figure.runs.iter().map(|run| run.get(Metric::FVD).unwrap()).sum::<f64>() / 5.0;
        assert!((fvd(&figure).value - mean).abs() < 1e-12);
        assert!(fvd(&figure).std.unwrap() > 0.0);
        // the interval is about what is printed
        let centre = |[low, high]: Interval| (low + high) / 2.0;
        for estimate in figure.estimates.values() {
            assert!((centre(estimate.interval.unwrap()) - estimate.value).abs() < 1e-9, "{figure:?}");
        }
        let alone = figure_of(&real[..1], &generated, 0);
        assert!(fvd(&alone).std.is_none() && alone.runs.len() == 1);
    }

    /// Its width is that of the mean of the runs: about what such means differ by when all clips are others.
    #[test]
    fn the_interval_of_several_runs_is_of_their_mean() {
        let spread = falling(12, 12.0);
        let figures: Vec<Figure> = (0..30)
            .map(|i| {
                let real: Vec<Tensor> = (0..6).map(|run| gaussian(100, &spread, 1000 + 10 * i + run)).collect();
                let generated = gaussian(100, &spread, 2000 + i) * 1.4 + 0.5;
                figure_of(&real, &[generated], 0)
            })
            .collect();
        let width = |figure: &Figure| fvd(figure).interval.map(|[low, high]| (high - low) / 3.92).unwrap();
        let mean_width = figures.iter().map(width).sum::<f64>() / 30.0;
        let differ = mean_and_std(figures.iter().map(|figure| fvd(figure).value)).1.unwrap();
        assert!((0.6..1.7).contains(&(mean_width / differ)), "{mean_width} {differ}");
    }

    #[test]
    fn two_clips_have_no_interval() {
        let spread = falling(8, 8.0);
        let figure = figure_of(&[gaussian(2, &spread, 0)], &[gaussian(2, &spread, 1)], 0);
        assert!(fvd(&figure).value.is_finite() && fvd(&figure).interval.is_none());
    }
}
