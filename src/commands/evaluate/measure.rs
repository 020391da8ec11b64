//! Clips stream by, their features stay: one set of generated clips against real ones, beside yardsticks.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use rand::seq::SliceRandom;
use serde_json::{Value, json};
use tch::{Device, Tensor};

use super::kept::kept;
use crate::{
    data::{ClipSpec, ClipStream, DataConfig, Draw, Fit, Listing, RgbFrame, VideoEntry},
    distributed::Ranks,
    experiment::Mistake,
    extractors::FeatureExtractor,
    metrics::{Figure, Metric, Protocol, ProtocolConfig, RealPairs, RealVsReal},
    random::{Purpose, stream},
    torch::device_name,
    train::progress::Progress,
};

/// How many clips of so many frames go through the extractor at once, however they arrive: enough to fill a GPU, and no
/// more frames than its memory surely holds.
pub fn piece(device: Device, frames: i64) -> i64 {
    if device.is_cuda() { (512 / frames.max(1)).clamp(1, 32) } else { 4 }
}

/// An extractor whose work ranks share: all see the clips, and each piece goes through on one of them.
#[derive(Clone, Copy)]
pub struct Shared<'a> {
    pub extractor: &'a dyn FeatureExtractor,
    /// Where it works.
    pub device: Device,
    pub ranks: &'a Ranks,
}

impl Shared<'_> {
    /// What kinds of devices the ranks extract on. On another kind the same clips have slightly other features.
    fn device_names(&self) -> Result<BTreeSet<String>> {
        let own = device_name(self.device);
        let all = self.ranks.share(self.ranks.size(), |_| Ok(Tensor::from_slice(own.as_bytes())))?;
        all.into_iter().map(|name| Ok(String::from_utf8(Vec::try_from(name)?)?)).collect()
    }
}

/// Features of clips as they stream by; of the clips no more than a piece is kept.
pub struct Extraction<'a> {
    extractor: Shared<'a>,
    /// Fewer clips than a piece, `[n, 3, F, H, W]`.
    pending: Option<Tensor>,
    /// Of each piece; none where another rank has it.
    rows: Vec<Option<Tensor>>,
}

impl<'a> Extraction<'a> {
    pub fn new(extractor: Shared<'a>) -> Self {
        Extraction { extractor, pending: None, rows: Vec::new() }
    }

    /// Clips u8 `[n, 3, F, H, W]`.
    pub fn take(&mut self, clips: &Tensor) -> Result<()> {
        let mut clips = match self.pending.take() {
            None => clips.shallow_clone(),
            Some(pending) => Tensor::cat(&[&pending, clips], 0),
        };
        let piece = piece(self.extractor.device, clips.size()[2]);
        while clips.size()[0] >= piece {
            self.extract(&clips.narrow(0, 0, piece))?;
            clips = clips.narrow(0, piece, clips.size()[0] - piece);
        }
        // a copy: a view would keep all that arrived
        self.pending = (clips.size()[0] > 0).then(|| clips.copy());
        Ok(())
    }

    fn extract(&mut self, clips: &Tensor) -> Result<()> {
        let Shared { extractor, ranks, .. } = self.extractor;
        let own = self.rows.len() % ranks.size() == ranks.rank();
        self.rows.push(if own { Some(extractor.features(&clips.permute([0, 2, 3, 4, 1]))?) } else { None });
        Ok(())
    }

    /// `[N, D]`
    pub fn finish(mut self) -> Result<Tensor> {
        if let Some(pending) = self.pending.take() {
            self.extract(&pending)?;
        }
        anyhow::ensure!(!self.rows.is_empty(), "there are no clips to measure");
        let rows = &mut self.rows;
        let shared = self.extractor.ranks.share(rows.len(), |i| rows[i].take().context("a piece of another rank"))?;
        Ok(Tensor::cat(&shared, 0))
    }
}

/// Features of the first `count` clips of a draw, or of all where there are fewer, `[N, D]`; `observe` sees each clip.
pub fn features_of(
    clips: &mut ClipStream,
    count: i64,
    extractor: Shared,
    bar: &mut Bar,
    observe: &mut dyn FnMut(&Tensor) -> Result<()>,
) -> Result<Tensor> {
    let mut extraction = Extraction::new(extractor);
    for _ in 0..count {
        let Some(clip) = clips.next()? else { break };
        observe(&clip)?;
        extraction.take(&clip)?;
        bar.advance(1);
    }
    extraction.finish()
}

/// Progress that is counted by the piece.
pub struct Bar {
    progress: Progress,
    done: u64,
}

impl Bar {
    /// Shown by the first rank.
    pub fn new(label: &str, total: i64, ranks: &Ranks) -> Self {
        Bar { progress: Progress::new(label, total as u64, 0).shown(ranks.is_first()), done: 0 }
    }

    pub fn advance(&mut self, by: u64) {
        self.done += by;
        self.progress.step(self.done, "");
    }

    pub fn finish(self) {
        self.progress.finish();
    }
}

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

/// The real side of an evaluation, measured once for all sets.
pub struct Real {
    /// One set of features a run, or one for all.
    pub sets: Vec<Tensor>,
    pub floor: Option<RealVsReal>,
    /// Features of the two sets that the floor is of.
    apart: Option<[Tensor; 2]>,
    /// Made of the first set's clips.
    pub yardsticks: BTreeMap<String, Tensor>,
}

/// What is made of real clips besides their own features.
#[derive(Debug, Clone, Copy, Default)]
pub struct Yardsticks {
    pub frozen: bool,
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

/// Which two sets of so many clips give the floor.
fn floor_sets(protocol: &ProtocolConfig, videos: i64, trained: bool) -> RealPairs {
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
struct Sets {
    draws: i64,
    /// Two more sets, for the floor.
    apart: Option<RealPairs>,
    yardsticks: Yardsticks,
}

/// The names of the two sets for the floor among kept features.
const APART: [&str; 2] = ["floor-0", "floor-1"];

impl Sets {
    fn count(self) -> i64 {
        let Yardsticks { frozen, shuffled } = self.yardsticks;
        self.draws + 2 * i64::from(self.apart.is_some()) + i64::from(frozen) + i64::from(shuffled)
    }
}

/// All that features of real clips depend on, the same on every rank.
fn key_of(protocol: &Value, sets: Sets, devices: &BTreeSet<String>) -> Value {
    json!({
        "lvdm": env!("CARGO_PKG_VERSION"),
        "protocol": protocol,
        "draws": sets.draws,
        "apart": sets.apart,
        "frozen": sets.yardsticks.frozen,
        "shuffled": sets.yardsticks.shuffled,
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
    pub fn protocol(&self, extractor: &dyn FeatureExtractor) -> Protocol {
        let metrics = Metric::DEFAULT.map(|metric| (metric, extractor));
        Protocol::new(self.protocol, &self.data, &self.sha256, self.reading, self.seed, extractor, metrics)
    }

    /// What the videos show, in their order.
    ///
    /// # Errors
    /// [`Mistake`]: a video without caption.
    pub fn captions(&self) -> Result<Vec<String>> {
        let of = |video: &VideoEntry| {
            video.caption.clone().with_context(|| Mistake(format!("{} has no caption: the run makes videos from text, and is told those of the real videos (kinds `captioned`, `webvid`)", video.name)))
        };
        self.listing.videos.iter().map(of).collect()
    }

    /// The videos.
    pub fn videos(&self) -> &[VideoEntry] {
        &self.listing.videos
    }

    /// Which sets are needed: for the floor two draws of different videos, or of other parts of the same ones.
    fn sets(&self, yardsticks: Yardsticks, trained: bool) -> Sets {
        let draws = self.protocol.real_draws();
        let (draws, apart) = match floor_sets(self.protocol, self.videos().len() as i64, trained) {
            RealPairs::Draws if self.protocol.draw.is_endless() => (draws.max(2), None),
            how @ (RealPairs::Draws | RealPairs::Parts) => (draws, Some(how)),
            RealPairs::Trained | RealPairs::Halves => (draws, None),
        };
        Sets { draws, apart, yardsticks }
    }

    /// How many clips go through the extractor for the real side.
    pub fn work(&self, yardsticks: Yardsticks, trained: bool) -> i64 {
        self.protocol.clips * self.sets(yardsticks, trained).count()
    }

    /// Features of one draw, `[N, D]`.
    pub fn features(&self, extractor: Shared, bar: &mut Bar) -> Result<Tensor> {
        let sets = Sets { draws: 1, apart: None, yardsticks: Yardsticks::default() };
        self.kept_features(extractor, sets, bar)?.remove("0").context("one draw")
    }

    /// Features of all sets, by name: the number of a draw, or a yardstick's name.
    fn kept_features(&self, extractor: Shared, sets: Sets, bar: &mut Bar) -> Result<BTreeMap<String, Tensor>> {
        let protocol = self.protocol(extractor.extractor);
        let key = key_of(&protocol.identity(), sets, &extractor.device_names()?);
        let (features, before) = kept(&key, extractor.ranks, || self.make_features(extractor, sets, bar))?;
        if before {
            bar.advance((self.protocol.clips * sets.count()) as u64);
        }
        Ok(features)
    }

    fn make_features(&self, extractor: Shared, sets: Sets, bar: &mut Bar) -> Result<BTreeMap<String, Tensor>> {
        let RealClips { protocol, data, seed, .. } = self;
        let Yardsticks { frozen: with_frozen, shuffled: with_shuffled } = sets.yardsticks;
        let mut clips = ClipStream::new(data, protocol.draw, protocol.fit, *seed)?;
        let (mut still, mut mixed) = (Extraction::new(extractor), Extraction::new(extractor));
        let (mut seen, mut made) = (0, 0);
        let first = features_of(&mut clips, protocol.clips, extractor, bar, &mut |clip| {
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
            let set = features_of(&mut clips, protocol.clips, extractor, bar, &mut |_| Ok(()))?;
            features.insert(draw.to_string(), set);
        }
        let apart = match sets.apart {
            None => None,
            Some(RealPairs::Draws) => Some(ClipStream::new(data, Draw::Random, protocol.fit, *seed)?),
            Some(_) => Some(ClipStream::parts(data, protocol.fit, *seed, count)?),
        };
        if let Some(mut clips) = apart {
            let mut sides = [Extraction::new(extractor), Extraction::new(extractor)];
            let mut pairs = 0;
            while pairs < count
                && let (Some(one), Some(other)) = (clips.next()?, clips.next()?)
            {
                sides[0].take(&one)?;
                sides[1].take(&other)?;
                pairs += 1;
                bar.advance(2);
            }
            // fewer than half: the halves of the set are larger
            if 2 * pairs >= count {
                for (name, side) in APART.into_iter().zip(sides) {
                    features.insert(name.into(), side.finish()?);
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

    /// `trained` are the features of clips that were trained on.
    pub fn measure(
        &self,
        extractor: Shared,
        yardsticks: Yardsticks,
        trained: Option<&Tensor>,
        bar: &mut Bar,
    ) -> Result<Real> {
        let sets = self.sets(yardsticks, trained.is_some());
        let mut features = self.kept_features(extractor, sets, bar)?;
        let mut draws = (0..sets.draws).filter_map(|draw| features.remove(&draw.to_string())).collect::<Vec<_>>();
        let mut how = floor_sets(self.protocol, self.videos().len() as i64, trained.is_some());
        let first = draws[0].shallow_clone();
        let apart = match (APART.map(|name| features.remove(name)), how) {
            ([Some(one), Some(other)], _) => Some([one, other]),
            (_, RealPairs::Trained) => trained.map(|trained| [first, trained.shallow_clone()]),
            (_, RealPairs::Draws) => draws.get(1).map(|second| [first, second.shallow_clone()]),
            (_, RealPairs::Parts | RealPairs::Halves) => {
                how = RealPairs::Halves;
                // of fewer there is no covariance
                (first.size()[0] >= 4).then(|| RealPairs::halves(&first))
            }
        };
        draws.truncate(self.protocol.real_draws() as usize);
        let floor = |sets: &[Tensor; 2]| RealVsReal::between(&Metric::DEFAULT, sets, how, self.protocol.covariance);
        let floor = apart.as_ref().map(floor).transpose()?;
        Ok(Real { sets: draws, floor, apart, yardsticks: features })
    }
}

impl Real {
    /// The figure of some sets of features, one a run or one for all.
    pub fn figure(&self, protocol: &ProtocolConfig, sets: &[Tensor], seed: u64) -> Result<Figure> {
        Figure::of(&Metric::DEFAULT, &self.sets, sets, protocol.covariance, seed)
    }

    /// Real clips against real ones: the two sets of the floor, where there is one.
    pub fn floor_figure(&self, protocol: &ProtocolConfig, seed: u64) -> Result<Option<Figure>> {
        let Some([one, other]) = &self.apart else { return Ok(None) };
        let sets = [one, other].map(std::slice::from_ref);
        Figure::of(&Metric::DEFAULT, sets[0], sets[1], protocol.covariance, seed).map(Some)
    }
}

/// Features of generated clips out of files, one set a draw.
///
/// # Errors
/// [`Mistake`] where there are fewer videos than clips are asked for.
pub fn generated_sets(
    protocol: &ProtocolConfig,
    data: &DataConfig,
    extractor: Shared,
    bar: &mut Bar,
    observe: &mut dyn FnMut(&Tensor) -> Result<()>,
) -> Result<Vec<Tensor>> {
    let (draws, clips) = (protocol.generated_draws(), protocol.generated_clips());
    enough(protocol, data.videos()?.videos.len() as i64)?;
    // what was made by another stride already lies frame by frame
    let data = DataConfig { frame_stride: data.frame_stride, ..protocol.applied_to(data) };
    let mut stream = ClipStream::new(&data, Draw::Beginnings, Fit::default(), 0)?;
    let mut sets = Vec::new();
    for draw in 0..draws {
        let set = features_of(&mut stream, clips, extractor, bar, &mut |clip| {
            if draw == 0 { observe(clip) } else { Ok(()) }
        })?;
        if set.size()[0] < clips {
            let usable = set.size()[0];
            return Err(Mistake(format!(
                "{usable} generated videos can be read, and {clips} clips are asked for: ask for fewer"
            ))
            .into());
        }
        sets.push(set);
    }
    Ok(sets)
}

/// Generated clips u8 `[N, 3, F, H, W]` as the protocol measures them: their first frames, at its resolution.
///
/// # Errors
/// Clips with fewer frames.
pub fn refit(clips: &Tensor, protocol: &ProtocolConfig) -> Result<Tensor> {
    let (n, _, f, h, w) = clips.size5()?;
    let ProtocolConfig { frames, resolution, .. } = *protocol;
    anyhow::ensure!(f >= frames, "clips of {f} frames, and the protocol {} measures {frames}", protocol.name);
    let clips = clips.narrow(2, 0, frames);
    if (h, w) == (resolution, resolution) {
        return Ok(clips);
    }
    let spec = ClipSpec { frames, frame_stride: 1, resolution, fit: Fit::default() };
    let rows = (0..n).map(|i| {
        let pictures = (0..frames).map(|f| RgbFrame::from_tensor(&clips.get(i).select(1, f).permute([1, 2, 0])));
        let pictures = pictures.collect::<Result<Vec<_>>>()?;
        Ok(Tensor::from_slice(&spec.fit(&pictures)).reshape([3, frames, resolution, resolution]))
    });
    Ok(Tensor::stack(&rows.collect::<Result<Vec<_>>>()?, 0))
}

/// # Errors
/// [`Mistake`]: fewer generated videos than the protocol asks for.
pub fn enough(protocol: &ProtocolConfig, found: i64) -> Result<()> {
    let asked = protocol.generated_draws() * protocol.generated_clips();
    if found < asked {
        return Err(Mistake(format!(
            "{found} generated videos, and {asked} clips are asked for: the same clip twice would lower FVD; ask for {found}"
        ))
        .into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    struct First;

    impl FeatureExtractor for First {
        fn name(&self) -> &str {
            "the first pixel"
        }

        fn weights_sha256(&self) -> &str {
            ""
        }

        fn width(&self) -> i64 {
            1
        }

        fn least_frames(&self) -> i64 {
            1
        }

        fn preparation(&self) -> &str {
            "as they are"
        }

        fn features(&self, videos: &Tensor) -> Result<Tensor> {
            assert!(videos.size()[0] <= piece(Device::Cpu, 2));
            Ok(videos.select(1, 0).select(1, 0).select(1, 0).narrow(1, 0, 1).to_kind(Kind::Float))
        }
    }

    /// A GPU takes more clips at once than the CPU, and not more frames than its memory holds.
    #[test]
    fn pieces_fit_the_device() {
        let gpu = Device::Cuda(0);
        assert_eq!([piece(Device::Cpu, 16), piece(Device::Cpu, 128)], [4, 4]);
        assert_eq!([piece(gpu, 4), piece(gpu, 16), piece(gpu, 128), piece(gpu, 1024)], [32, 32, 4, 1]);
    }

    #[test]
    fn features_do_not_depend_on_how_clips_arrive() {
        let clips =
            Tensor::arange(11, (Kind::Uint8, Device::Cpu)).view([11, 1, 1, 1, 1]).expand([11, 3, 2, 4, 4], false);
        let alone = Ranks::alone();
        let first = Shared { extractor: &First, device: Device::Cpu, ranks: &alone };
        for arriving in [1, 3, 4, 11] {
            let mut extraction = Extraction::new(first);
            for at in (0..11).step_by(arriving) {
                extraction.take(&clips.narrow(0, at, (arriving as i64).min(11 - at))).unwrap();
            }
            let found = extraction.finish().unwrap();
            assert!(found.flatten(0, 1).equal(&Tensor::arange(11, (Kind::Float, Device::Cpu))), "{arriving}");
        }
        assert!(Extraction::new(first).finish().is_err());
    }

    /// Ranks of one kind of GPU find what one of them has kept; another kind of GPU does not.
    #[test]
    fn kept_features_belong_to_the_kind_of_device_and_not_to_its_number() {
        let sets = Sets { draws: 1, apart: None, yardsticks: Yardsticks::default() };
        let key = |devices: &[&str]| key_of(&Value::Null, sets, &devices.iter().map(|name| name.to_string()).collect());
        assert_eq!(key(&["H100", "H100"]), key(&["H100"]));
        assert_eq!(key(&["A100", "H100"]), key(&["H100", "A100", "H100"]));
        assert_ne!(key(&["H100"]), key(&["A100"]));
        assert_ne!(key(&["H100"]), key(&["A100", "H100"]));
        // every GPU's name, whatever its number
        let alone = Ranks::alone();
        let names = |device| Shared { extractor: &First, device, ranks: &alone }.device_names().unwrap();
        assert_eq!(names(Device::Cuda(6)), names(Device::Cuda(7)));
        assert_ne!(names(Device::Cuda(6)), names(Device::Cpu));
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
}
