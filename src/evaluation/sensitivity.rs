//! How each metric answers to faults of videos: real clips with a fault against other real clips, beside the same clips
//! without it. A metric that does not move away from the real-vs-real distance is blind to the fault.

use std::{collections::BTreeMap, slice::from_ref};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tch::Tensor;

use super::{
    baselines::PERTURBATIONS,
    extraction::{Bar, Extraction, ShardedExtractor},
    feature_cache::cached_features,
    measurement::Measurement,
    real_clips::RealClips,
};
use crate::{
    data::DataConfig,
    metrics::{Figure, RealPairs},
};

/// A sensitivity table.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sensitivity {
    /// Under which protocol.
    pub protocol_hash: String,
    /// Which two sets of real clips are compared; the faults are put into the second.
    pub sets: RealPairs,
    /// By fault; `real` has none.
    pub figures: BTreeMap<String, Figure>,
}

/// The clips without a fault, and those at twice the speed, which are read so.
const REAL: &str = "real";
const SPED_UP: &str = "sped_up";
/// The real clips that all others are compared with, among cached features.
const REFERENCE: &str = "reference";

impl Sensitivity {
    /// The rows of the table with their meaning, in its order.
    pub fn rows() -> impl Iterator<Item = (&'static str, &'static str)> {
        let faults = PERTURBATIONS.iter().map(|fault| (fault.name, fault.meaning));
        let sped_up = (SPED_UP, "played at twice the speed");
        [(REAL, "real clips against other real clips")].into_iter().chain(faults).chain([sped_up])
    }

    /// How many clips go through the extractors of a measurement.
    pub fn work(measurement: Measurement) -> i64 {
        measurement.protocol.clips * (Self::rows().count() as i64 + 1) * measurement.groups.len() as i64
    }

    /// Measures it on real clips: two disjoint sets as for the real-vs-real baseline, halves of one where videos are too
    /// few and too short for two. Clips at twice the speed are left out where videos are too short for them. None of fewer
    /// than four real clips.
    ///
    /// # Errors
    /// Clips that cannot be read or seen.
    pub fn measure(measurement: Measurement, clips: &RealClips, bar: &mut Bar) -> Result<Option<Self>> {
        let Measurement { protocol, groups, .. } = measurement;
        let mut figures: BTreeMap<String, Figure> = BTreeMap::new();
        let mut sets = RealPairs::Halves;
        for (group, extractor) in groups.iter().zip(measurement.extractors()) {
            let Some((which, mut features)) = clips.with_faults(extractor, bar)? else { return Ok(None) };
            sets = which;
            let reference = features.remove(REFERENCE).context("the reference of a sensitivity table")?;
            for (name, set) in &features {
                let sets = [&reference, set].map(from_ref);
                let figure = Figure::without_extrapolation(&group.metrics, sets[0], sets[1], protocol.covariance)?;
                match figures.get_mut(name) {
                    None => _ = figures.insert(name.clone(), figure),
                    Some(whole) => whole.add(figure),
                }
            }
        }
        Ok(Some(Sensitivity { protocol_hash: clips.protocol(groups).hash(), sets, figures }))
    }
}

impl RealClips<'_> {
    /// Features of a set of real clips, of another one, and of the other one with each fault, by name; which two sets these
    /// are. None of fewer than four clips.
    fn with_faults(
        &self,
        extractor: ShardedExtractor,
        bar: &mut Bar,
    ) -> Result<Option<(RealPairs, BTreeMap<String, Tensor>)>> {
        let rows: Vec<&str> = Sensitivity::rows().map(|(name, _)| name).collect();
        let (protocol, devices) = (self.identity(extractor.extractor), extractor.device_names()?);
        let version = env!("CARGO_PKG_VERSION");
        // where videos hold no two clips, halves are left
        for which in [self.pairs(), RealPairs::Halves] {
            let key =
                json!({"lvdm": version, "protocol": protocol, "sensitivity": rows, "sets": which, "devices": devices});
            let make = || self.make_faults(which, extractor, bar).map(Option::unwrap_or_default);
            let (features, _) = cached_features(&key, extractor.ranks, make)?;
            if !features.is_empty() {
                return Ok(Some((which, features)));
            }
        }
        Ok(None)
    }

    /// None where there are fewer pairs of clips than half of what the protocol asks for.
    fn make_faults(
        &self,
        which: RealPairs,
        extractor: ShardedExtractor,
        bar: &mut Bar,
    ) -> Result<Option<BTreeMap<String, Tensor>>> {
        let mut reference = Extraction::new(extractor);
        let mut sets: Vec<(&str, Extraction)> = [REAL]
            .into_iter()
            .chain(PERTURBATIONS.map(|fault| fault.name))
            .map(|name| (name, Extraction::new(extractor)))
            .collect();
        let count = self.each_pair(self.data(), which, &mut |number, one, other| {
            reference.take(one)?;
            sets[0].1.take(other)?;
            for (fault, (_, set)) in PERTURBATIONS.iter().zip(&mut sets[1..]) {
                set.take(&(fault.apply)(other, number, self.seed()))?;
            }
            bar.advance(2 + PERTURBATIONS.len() as u64);
            Ok(())
        })?;
        if count < 2 || 2 * count < self.wanted_pairs(which) {
            return Ok(None);
        }
        let mut features = BTreeMap::from([(REFERENCE.to_string(), reference.finish()?)]);
        for (name, set) in sets {
            features.insert(name.into(), set.finish()?);
        }
        if let Some(sped_up) = self.sped_up(which, extractor, bar)? {
            features.insert(SPED_UP.into(), sped_up);
        }
        Ok(Some(features))
    }

    /// Features of the second set's clips where every second frame of theirs is passed over; none where the videos are too
    /// short.
    fn sped_up(&self, which: RealPairs, extractor: ShardedExtractor, bar: &mut Bar) -> Result<Option<Tensor>> {
        let data = DataConfig { frame_stride: 2 * self.data().frame_stride, ..self.data().clone() };
        let one = (data.frames - 1) * data.frame_stride + 1;
        let needed = if which == RealPairs::Parts { 2 * one } else { one };
        let first = self.videos().iter().find_map(|video| video.source.open().ok()).map(|video| video.frames());
        if first.is_none_or(|frames| frames < needed) {
            return Ok(None);
        }
        let mut set = Extraction::new(extractor);
        let count = self.each_pair(&data, which, &mut |_, _, other| {
            bar.advance(1);
            set.take(other)
        })?;
        Ok(if count >= 2 && 2 * count >= self.wanted_pairs(which) { Some(set.finish()?) } else { None })
    }

    fn wanted_pairs(&self, which: RealPairs) -> i64 {
        let clips = self.config().clips;
        if which == RealPairs::Halves { (clips / 2).min(self.videos().len() as i64 / 2) } else { clips }
    }

    /// Pairs of clips of two sets, with their numbers, as many as are wanted and found; says how many those were.
    fn each_pair(
        &self,
        data: &DataConfig,
        which: RealPairs,
        take: &mut dyn FnMut(u64, &Tensor, &Tensor) -> Result<()>,
    ) -> Result<i64> {
        let mut clips = self.pair_stream(which, data, self.wanted_pairs(which))?;
        let mut count = 0;
        while count < self.wanted_pairs(which)
            && let (Some(one), Some(other)) = (clips.next()?, clips.next()?)
        {
            take(count as u64, &one, &other)?;
            count += 1;
        }
        Ok(count)
    }
}
