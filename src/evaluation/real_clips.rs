//! The real clips of an evaluation under its protocol, measured once for all sets that are compared with them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tch::Tensor;

use super::{
    baselines::{frozen, shuffled},
    extraction::{Bar, Extraction, ShardedExtractor, features_of},
    feature_cache::cached_features,
    metric_group::MetricGroup,
};
use crate::{
    data::{ClipStream, DataConfig, Draw, Listing, VideoEntry},
    experiment::UserError,
    extractors::FeatureExtractor,
    metrics::{Protocol, ProtocolConfig, RealPairs},
};

/// Features of real clips by one extractor.
pub struct RealFeatures {
    /// One set a run, or one for all.
    pub sets: Vec<Tensor>,
    /// The two sets of the real-vs-real baseline, and which they are; none of fewer than four clips.
    pub pair: Option<([Tensor; 2], RealPairs)>,
    /// Baselines that are made of the first set's clips, by name.
    pub baselines: BTreeMap<String, Tensor>,
}

/// Which baselines are made of real clips.
#[derive(Debug, Clone, Copy, Default)]
pub struct Baselines {
    /// Clips that stand still at their first frame.
    pub frozen: bool,
    /// Clips whose frames come in a random order.
    pub shuffled: bool,
}

/// Real clips under a protocol.
pub struct RealClips<'a> {
    protocol: &'a ProtocolConfig,
    data: DataConfig,
    seed: u64,
    listing: Listing,
    sha256: String,
    reading: Option<u32>,
}

/// Which two sets of so many clips give the real-vs-real baseline.
fn real_pairs(protocol: &ProtocolConfig, videos: i64, trained: bool) -> RealPairs {
    let distinct = videos >= 2 * protocol.clips;
    match (distinct, protocol.real_draws() > 1, trained) {
        (true, true, _) => RealPairs::Draws,
        (_, _, true) => RealPairs::Trained,
        (true, false, false) => RealPairs::Draws,
        (false, _, false) => RealPairs::Parts,
    }
}

/// The sets of features that are wanted of real clips.
#[derive(Clone, Copy)]
struct FeatureSets {
    draws: i64,
    /// Two more sets, for the real-vs-real baseline.
    pair: Option<RealPairs>,
    baselines: Baselines,
}

/// The names of the two sets of the real-vs-real baseline among cached features.
const PAIR: [&str; 2] = ["pair-0", "pair-1"];

impl FeatureSets {
    fn count(self) -> i64 {
        let Baselines { frozen, shuffled } = self.baselines;
        self.draws + 2 * i64::from(self.pair.is_some()) + i64::from(frozen) + i64::from(shuffled)
    }
}

/// All that features of real clips depend on, the same on every rank.
fn key_of(protocol: &Value, sets: FeatureSets, devices: &BTreeSet<String>) -> Value {
    json!({
        "lvdm": env!("CARGO_PKG_VERSION"),
        "protocol": protocol,
        "draws": sets.draws,
        "pair": sets.pair,
        "frozen": sets.baselines.frozen,
        "shuffled": sets.baselines.shuffled,
        "devices": devices,
    })
}

impl<'a> RealClips<'a> {
    /// # Errors
    /// Data that are not there.
    pub fn new(data: &DataConfig, protocol: &'a ProtocolConfig, seed: u64) -> Result<Self> {
        let data = protocol.applied_to(data);
        let listing = data.videos()?;
        let (sha256, reading) = (listing.fingerprint()?, data.dataset.reading()?);
        Ok(RealClips { protocol, data, seed, listing, sha256, reading })
    }

    /// What figures against these clips depend on.
    pub fn protocol(&self, groups: &[MetricGroup]) -> Protocol {
        let RealClips { protocol, data, seed, sha256, reading, .. } = self;
        let metrics = MetricGroup::compared(groups);
        Protocol::new(protocol, data, sha256, *reading, *seed, &*groups[0].extractor, metrics)
    }

    /// What features of these clips depend on.
    pub fn identity(&self, extractor: &dyn FeatureExtractor) -> Value {
        let RealClips { protocol, data, seed, sha256, reading, .. } = self;
        let mut identity = Protocol::new(protocol, data, sha256, *reading, *seed, extractor, []).identity();
        identity["preparation"] = json!(extractor.preparation());
        identity["library"] = json!(extractor.library());
        identity
    }

    /// What the videos show, in their order.
    ///
    /// # Errors
    /// [`UserError`]: a video without caption.
    pub fn captions(&self) -> Result<Vec<String>> {
        let of = |video: &VideoEntry| {
            video.caption.clone().with_context(|| {
                let name = &video.name;
                UserError(format!(
                    "{name} has no caption: the run makes videos from text, and gets the captions of the real videos \
                     (kinds `captioned`, `webvid`)"
                ))
            })
        };
        self.listing.videos.iter().map(of).collect()
    }

    /// How they are drawn and measured.
    pub fn config(&self) -> &ProtocolConfig {
        self.protocol
    }

    /// The data that they are of, as the protocol reads them.
    pub fn data(&self) -> &DataConfig {
        &self.data
    }

    /// Draws them.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The videos.
    pub fn videos(&self) -> &[VideoEntry] {
        &self.listing.videos
    }

    /// Which sets are needed: for the real-vs-real baseline two draws of different videos, or of other parts of the same
    /// ones.
    fn sets(&self, baselines: Baselines, trained: bool) -> FeatureSets {
        let draws = self.protocol.real_draws();
        let (draws, pair) = match real_pairs(self.protocol, self.videos().len() as i64, trained) {
            RealPairs::Draws if self.protocol.draw.is_endless() => (draws.max(2), None),
            which @ (RealPairs::Draws | RealPairs::Parts) => (draws, Some(which)),
            RealPairs::Trained | RealPairs::Halves => (draws, None),
        };
        FeatureSets { draws, pair, baselines }
    }

    /// How many clips go through each extractor for [`Self::features`].
    pub fn work(&self, baselines: Baselines, trained: bool) -> i64 {
        self.protocol.clips * self.sets(baselines, trained).count()
    }

    /// Features of one draw, `[N, …]`.
    ///
    /// # Errors
    /// Clips that cannot be read or seen.
    pub fn first_draw(&self, extractor: ShardedExtractor, bar: &mut Bar) -> Result<Tensor> {
        let sets = FeatureSets { draws: 1, pair: None, baselines: Baselines::default() };
        self.cached(extractor, sets, bar)?.remove("0").context("one draw")
    }

    /// Features of all sets, by name: the number of a draw, or a baseline's name.
    fn cached(
        &self,
        extractor: ShardedExtractor,
        sets: FeatureSets,
        bar: &mut Bar,
    ) -> Result<BTreeMap<String, Tensor>> {
        let key = key_of(&self.identity(extractor.extractor), sets, &extractor.device_names()?);
        let (features, held) = cached_features(&key, extractor.ranks, || self.make_features(extractor, sets, bar))?;
        if held {
            bar.advance((self.protocol.clips * sets.count()) as u64);
        }
        Ok(features)
    }

    fn make_features(
        &self,
        extractor: ShardedExtractor,
        sets: FeatureSets,
        bar: &mut Bar,
    ) -> Result<BTreeMap<String, Tensor>> {
        let RealClips { protocol, data, seed, .. } = self;
        let Baselines { frozen: with_frozen, shuffled: with_shuffled } = sets.baselines;
        let mut clips = ClipStream::new(data, protocol.draw, protocol.fit, *seed)?;
        let (mut still, mut mixed) = (Extraction::new(extractor), Extraction::new(extractor));
        let (mut seen, mut made) = (0, 0);
        let mut of_draw = |bar: &mut Bar, observe: &mut dyn FnMut(&Tensor) -> Result<()>| {
            features_of(&mut clips, protocol.clips, &[extractor], bar, observe)?.pop().context("one extractor")
        };
        let first = of_draw(bar, &mut |clip| {
            if with_frozen {
                still.take(&frozen(clip))?;
                made += 1;
            }
            if with_shuffled {
                mixed.take(&shuffled(clip, seen, *seed))?;
                made += 1;
            }
            seen += 1;
            Ok(())
        })?;
        bar.advance(made);
        let count = first.size()[0];
        let mut features = BTreeMap::from([("0".to_string(), first)]);
        for draw in 1..sets.draws {
            // the order goes on: other videos, as long as there are any
            features.insert(draw.to_string(), of_draw(bar, &mut |_| Ok(()))?);
        }
        if let Some(which) = sets.pair {
            let mut clips = self.pair_stream(which, data, count)?;
            let mut pair = [Extraction::new(extractor), Extraction::new(extractor)];
            let mut pairs = 0;
            while pairs < count
                && let (Some(one), Some(other)) = (clips.next()?, clips.next()?)
            {
                pair[0].take(&one)?;
                pair[1].take(&other)?;
                pairs += 1;
                bar.advance(2);
            }
            // fewer than half: the halves of the set are larger
            if 2 * pairs >= count {
                for (name, set) in PAIR.into_iter().zip(pair) {
                    features.insert(name.into(), set.finish()?);
                }
            }
        }
        if with_frozen {
            features.insert("frozen".into(), still.finish()?);
        }
        if with_shuffled {
            features.insert("shuffled".into(), mixed.finish()?);
        }
        Ok(features)
    }

    /// Clips of these data, or of the same at another stride, for two sets, which take turns: of different videos, or of
    /// other parts of the same ones.
    ///
    /// # Errors
    /// Data that are not there.
    pub fn pair_stream(&self, which: RealPairs, data: &DataConfig, pairs: i64) -> Result<ClipStream> {
        let RealClips { protocol, seed, .. } = self;
        match which {
            RealPairs::Halves => ClipStream::new(data, protocol.draw, protocol.fit, *seed),
            RealPairs::Draws => ClipStream::new(data, Draw::Random, protocol.fit, *seed),
            _ => ClipStream::parts(data, protocol.fit, *seed, pairs),
        }
    }

    /// Which two sets of these clips share the least, none of them being of other data.
    pub fn pairs(&self) -> RealPairs {
        real_pairs(self.protocol, self.videos().len() as i64, false)
    }

    /// Features of the real sets, of the two sets of the real-vs-real baseline, and of the baselines. `trained` are the
    /// features of clips that were trained on.
    ///
    /// # Errors
    /// Clips that cannot be read or seen; a full disk.
    pub fn features(
        &self,
        extractor: ShardedExtractor,
        baselines: Baselines,
        trained: Option<&Tensor>,
        bar: &mut Bar,
    ) -> Result<RealFeatures> {
        let sets = self.sets(baselines, trained.is_some());
        let mut features = self.cached(extractor, sets, bar)?;
        let mut draws = (0..sets.draws).filter_map(|draw| features.remove(&draw.to_string())).collect::<Vec<_>>();
        let which = real_pairs(self.protocol, self.videos().len() as i64, trained.is_some());
        let first = draws[0].shallow_clone();
        let pair = match (PAIR.map(|name| features.remove(name)), which) {
            ([Some(one), Some(other)], _) => Some(([one, other], which)),
            (_, RealPairs::Trained) => trained.map(|trained| ([first, trained.shallow_clone()], which)),
            (_, RealPairs::Draws) => draws.get(1).map(|second| ([first, second.shallow_clone()], which)),
            (_, RealPairs::Parts | RealPairs::Halves) => {
                // of fewer there is no covariance
                (first.size()[0] >= 4).then(|| (RealPairs::halves(&first), RealPairs::Halves))
            }
        };
        draws.truncate(self.protocol.real_draws() as usize);
        Ok(RealFeatures { sets: draws, pair, baselines: features })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks of one kind of GPU find what one of them has put into the cache; another kind of GPU does not.
    #[test]
    fn cached_features_belong_to_the_kind_of_device_and_not_to_its_number() {
        let sets = FeatureSets { draws: 1, pair: None, baselines: Baselines::default() };
        let key = |devices: &[&str]| key_of(&Value::Null, sets, &devices.iter().map(|name| name.to_string()).collect());
        assert_eq!(key(&["H100", "H100"]), key(&["H100"]));
        assert_eq!(key(&["A100", "H100"]), key(&["H100", "A100", "H100"]));
        assert_ne!(key(&["H100"]), key(&["A100"]));
        assert_ne!(key(&["H100"]), key(&["A100", "H100"]));
    }
}
