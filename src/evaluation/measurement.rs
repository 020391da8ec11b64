//! One protocol's figures: every group of metrics sees the same real and the same generated clips.

use std::{collections::BTreeMap, slice::from_ref};

use anyhow::Result;
use tch::{Device, Tensor};

use super::{
    extraction::{Bar, ShardedExtractor},
    metric_group::MetricGroup,
    real_clips::{Baselines, RealClips, RealFeatures},
};
use crate::{
    data::DataConfig,
    distributed::Ranks,
    metrics::{Figure, Metric, ProtocolConfig, RealVsReal},
};

/// What every set of an evaluation is measured with.
#[derive(Clone, Copy)]
pub struct Measurement<'a> {
    /// How clips are drawn and compared.
    pub protocol: &'a ProtocolConfig,
    /// The metrics and their extractors, at least one group.
    pub groups: &'a [MetricGroup],
    /// Where the extractors work.
    pub device: Device,
    /// Who share the work.
    pub ranks: &'a Ranks,
    /// Draws real clips, and the subsets of extrapolations.
    pub seed: u64,
}

/// What real clips are measured for.
#[derive(Clone, Copy)]
pub struct RealWork<'a> {
    /// Which baselines are made of them.
    pub baselines: Baselines,
    /// Clips that were trained on, where there are such.
    pub train: Option<&'a DataConfig>,
}

/// Features of the real clips, by group of metrics.
pub struct RealSets<'a> {
    measurement: Measurement<'a>,
    groups: Vec<RealFeatures>,
    /// Of clips that were trained on.
    trained: Option<Vec<Tensor>>,
}

impl<'a> Measurement<'a> {
    /// The groups' extractors, whose work is divided among the ranks.
    pub fn extractors(self) -> Vec<ShardedExtractor<'a>> {
        let Measurement { device, ranks, .. } = self;
        let sharded = |group: &'a MetricGroup| ShardedExtractor { extractor: &*group.extractor, device, ranks };
        self.groups.iter().map(sharded).collect()
    }

    /// How many clips [`Self::real_sets`] reads.
    pub fn real_work(self, clips: &RealClips, work: RealWork) -> i64 {
        let RealWork { baselines, train } = work;
        let trained = if train.is_some() { self.protocol.clips } else { 0 };
        (clips.work(baselines, train.is_some()) + trained) * self.groups.len() as i64
    }

    /// Features of real clips by every extractor, of the clips that were trained on, and of the baselines.
    ///
    /// # Errors
    /// Clips that cannot be read or seen; a full disk.
    pub fn real_sets(self, clips: &RealClips, work: RealWork, bar: &mut Bar) -> Result<RealSets<'a>> {
        let extractors = self.extractors();
        let trained = match work.train {
            None => None,
            Some(train) => {
                let clips = RealClips::new(train, self.protocol, self.seed)?;
                let draws = extractors.iter().map(|extractor| clips.first_draw(*extractor, bar));
                Some(draws.collect::<Result<Vec<_>>>()?)
            }
        };
        let mut groups = Vec::new();
        for (i, extractor) in extractors.into_iter().enumerate() {
            let trained = trained.as_ref().map(|trained| &trained[i]);
            groups.push(clips.features(extractor, work.baselines, trained, bar)?);
        }
        Ok(RealSets { measurement: self, groups, trained })
    }

    /// The figure of features by group, each a set for each run or one for all.
    fn figure<'b>(self, sets: impl Iterator<Item = [&'b [Tensor]; 2]>) -> Result<Figure> {
        let Measurement { protocol, seed, .. } = self;
        self.joined(sets, |metrics, [real, generated]| Figure::of(metrics, real, generated, protocol.covariance, seed))
    }

    /// One figure of what `figure` gives for each group's metrics and sets.
    fn joined<'b>(
        self,
        sets: impl Iterator<Item = [&'b [Tensor]; 2]>,
        figure: impl Fn(&[Metric], [&[Tensor]; 2]) -> Result<Figure>,
    ) -> Result<Figure> {
        let mut whole: Option<Figure> = None;
        for (group, sets) in self.groups.iter().zip(sets) {
            let figure = figure(&group.metrics, sets)?;
            match &mut whole {
                None => whole = Some(figure),
                Some(whole) => whole.add(figure),
            }
        }
        whole.ok_or_else(|| anyhow::anyhow!("no metrics are asked for"))
    }
}

impl RealSets<'_> {
    /// The figure of generated clips: their features by group, then by draw.
    ///
    /// # Errors
    /// Too few clips, features that are not finite.
    pub fn figure(&self, generated: &[Vec<Tensor>]) -> Result<Figure> {
        let sets = self.groups.iter().zip(generated);
        self.measurement.figure(sets.map(|(real, generated)| [real.sets.as_slice(), generated.as_slice()]))
    }

    /// The figures of the baselines that are made of real clips, and of clips that were trained on, by name.
    ///
    /// # Errors
    /// As [`Self::figure`].
    pub fn baselines(&self) -> Result<BTreeMap<String, Figure>> {
        let mut figures = BTreeMap::new();
        for name in self.groups[0].baselines.keys() {
            let sets = self.groups.iter().map(|real| [real.sets.as_slice(), from_ref(&real.baselines[name])]);
            figures.insert(name.clone(), self.measurement.figure(sets)?);
        }
        if let Some(trained) = &self.trained {
            let sets = self.groups.iter().zip(trained).map(|(real, trained)| [real.sets.as_slice(), from_ref(trained)]);
            figures.insert("train".into(), self.measurement.figure(sets)?);
        }
        Ok(figures)
    }

    /// Real clips against real ones, in one figure; none of fewer than four clips.
    ///
    /// # Errors
    /// As [`Self::figure`].
    pub fn real_figure(&self) -> Result<Option<Figure>> {
        let pairs: Option<Vec<&[Tensor; 2]>> =
            self.groups.iter().map(|real| real.pair.as_ref().map(|(pair, _)| pair)).collect();
        let Some(pairs) = pairs else { return Ok(None) };
        self.measurement.figure(pairs.into_iter().map(|[one, other]| [from_ref(one), from_ref(other)])).map(Some)
    }

    /// The distances of the two sets of the real-vs-real baseline, and which they are; none of fewer than four clips.
    ///
    /// # Errors
    /// As [`Self::figure`].
    pub fn real_vs_real(&self) -> Result<Option<RealVsReal>> {
        let mut whole: Option<RealVsReal> = None;
        for (group, real) in self.measurement.groups.iter().zip(&self.groups) {
            let Some((pair, which)) = &real.pair else { return Ok(None) };
            let divisor = self.measurement.protocol.covariance;
            let found = RealVsReal::between(&group.metrics, pair, *which, divisor)?;
            match &mut whole {
                None => whole = Some(found),
                Some(whole) => whole.distances.extend(found.distances.iter()),
            }
        }
        Ok(whole)
    }

    /// The figure of one window of long videos, whose features are given by group, against the first real set. It has no
    /// extrapolation: there are many windows.
    ///
    /// # Errors
    /// As [`Self::figure`].
    pub fn figure_of_window(&self, window: &[Tensor]) -> Result<Figure> {
        let sets = self.groups.iter().zip(window).map(|(real, window)| [&real.sets[..1], from_ref(window)]);
        let divisor = self.measurement.protocol.covariance;
        self.measurement
            .joined(sets, |metrics, [real, window]| Figure::without_extrapolation(metrics, real, window, divisor))
    }
}
