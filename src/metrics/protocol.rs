//! What a figure depends on.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{divisor::Divisor, registry::Metric};
use crate::{
    data::{DataConfig, DatasetConfig, Draw, Fit},
    extractors::{ExtractorConfig, FeatureExtractor},
};

/// A way to measure, as a file says it: everything but the videos.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProtocolConfig {
    /// What people call it.
    pub name: String,
    /// Clips of each set.
    pub clips: i64,
    /// F, frames of a clip.
    pub frames: i64,
    /// Every n-th frame of the real videos; where it is not said, what their data set's experiment says.
    #[serde(default)]
    pub frame_stride: Option<i64>,
    /// H and W of a clip, in pixels, before the extractor's own resize.
    pub resolution: i64,
    /// How real frames become squares. Generated ones of another size are made so by the default.
    #[serde(default)]
    pub fit: Fit,
    /// How real clips are drawn.
    #[serde(default)]
    pub draw: Draw,
    /// Figures that are averaged.
    #[serde(default = "one")]
    pub runs: i64,
    /// Which clips are drawn anew in each run.
    #[serde(default)]
    pub redraw: Redraw,
    /// Generated clips are counted in batches of this size, and the last one is left out where it is not full.
    #[serde(default)]
    pub drop_partial_batch: Option<i64>,
    /// Generated videos have this many frames, and each of their windows of `frames` is one figure, all against the same
    /// real clips: a curve, which `lvdm evaluate-long` draws.
    #[serde(default)]
    pub windows_of: Option<i64>,
    /// What covariances are divided by.
    #[serde(default)]
    pub covariance: Divisor,
    /// Whose features are compared; I3D's where it is not said.
    #[serde(default)]
    pub extractor: Option<ExtractorConfig>,
}

/// Which clips are new in each run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Redraw {
    /// New real clips a run.
    #[default]
    Real,
    /// New generated clips a run.
    Generated,
    /// Both anew a run.
    Both,
}

impl Redraw {
    /// Whether real clips are drawn anew.
    pub fn real(self) -> bool {
        self != Redraw::Generated
    }

    /// Whether generated clips are drawn anew.
    pub fn generated(self) -> bool {
        self != Redraw::Real
    }

    fn words(self) -> &'static str {
        match self {
            Redraw::Real => "real clips redrawn",
            Redraw::Generated => "generated clips redrawn",
            Redraw::Both => "real and generated clips redrawn",
        }
    }
}

fn one() -> i64 {
    1
}

impl ProtocolConfig {
    /// So many clips of the real data's own shape, one run: nobody's published figure.
    pub fn plain(clips: i64, real: &DataConfig) -> Self {
        ProtocolConfig {
            name: "plain".into(),
            clips,
            frames: real.frames,
            frame_stride: None,
            resolution: real.resolution,
            fit: Fit::default(),
            draw: Draw::default(),
            runs: 1,
            redraw: Redraw::default(),
            drop_partial_batch: None,
            windows_of: None,
            covariance: Divisor::default(),
            extractor: None,
        }
    }

    /// The same with another number of clips, which its name then says: such figures are no longer the protocol's.
    pub fn at(self, clips: i64) -> Self {
        if clips == self.clips {
            return self;
        }
        let name = self.name.split('@').next().unwrap_or_default();
        ProtocolConfig { name: format!("{name}@{clips}"), clips, ..self }
    }

    /// # Errors
    /// Names the key and the rule.
    pub fn validate(&self) -> Result<()> {
        ensure!(!self.name.trim().is_empty(), "name: a protocol needs one");
        ensure!(self.clips >= 2, "clips must be at least 2, not {}", self.clips);
        ensure!(self.clips <= 100_000_000, "clips must be at most 100,000,000, not {}", self.clips);
        for (key, value) in [
            ("frames", Some(self.frames)),
            ("frame_stride", self.frame_stride),
            ("resolution", Some(self.resolution)),
            ("runs", Some(self.runs)),
            ("drop_partial_batch", self.drop_partial_batch),
        ] {
            ensure!(
                value.is_none_or(|value| value >= 1),
                "{key} must be at least 1, not {}",
                value.unwrap_or_default()
            );
        }
        ensure!(
            self.real_draws() == 1 || self.draw.is_endless(),
            "runs is {} and real clips are redrawn, but {} gives the same videos in each run, and ± would be of \
             nothing: write `draw: {{kind: random}}`, or `runs: 1`",
            self.runs,
            self.draw.key()
        );
        ensure!(
            self.generated_clips() >= 2,
            "drop_partial_batch: {} clips make no full batch of {}",
            self.clips,
            self.drop_partial_batch.unwrap_or_default()
        );
        ensure!(
            self.windows_of.is_none_or(|whole| whole >= self.frames),
            "windows_of: {} frames hold no window of {}",
            self.windows_of.unwrap_or_default(),
            self.frames
        );
        Ok(())
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let Self { name, clips, frames, resolution, fit, draw, runs, redraw, covariance, .. } = self;
        let stride = self.frame_stride.map_or("the data set's stride".into(), |stride| format!("stride {stride}"));
        let runs = match runs {
            1 => "one run".to_string(),
            runs => format!("{runs} runs, {}", redraw.words()),
        };
        let mut line = format!(
            "{name}: {clips} clips of {frames} frames at {stride}, {resolution} px ({}), real clips {}, {runs}, \
             covariances over {}",
            fit.words(),
            draw.words(),
            covariance.words()
        );
        if self.generated_clips() != *clips {
            line += &format!(", {} generated clips in full batches", self.generated_clips());
        }
        if let Some(whole) = self.windows_of {
            line += &format!(", one figure for each window of videos of {whole} frames");
        }
        line
    }

    /// Generated clips that count.
    pub fn generated_clips(&self) -> i64 {
        self.drop_partial_batch.map_or(self.clips, |batch| self.clips / batch * batch)
    }

    /// Sets of real clips.
    pub fn real_draws(&self) -> i64 {
        if self.redraw.real() { self.runs } else { 1 }
    }

    /// Sets of generated clips.
    pub fn generated_draws(&self) -> i64 {
        if self.redraw.generated() { self.runs } else { 1 }
    }

    /// What is read of a data set under this protocol.
    pub fn applied_to(&self, data: &DataConfig) -> DataConfig {
        DataConfig {
            frames: self.frames,
            frame_stride: self.frame_stride.unwrap_or(data.frame_stride),
            resolution: self.resolution,
            flip: false,
            ..data.clone()
        }
    }

    /// Whether an experiment's own data agree with it.
    ///
    /// # Errors
    /// Names the key and both values.
    pub fn agrees_with(&self, data: &DataConfig) -> Result<()> {
        for (key, own, theirs) in [
            ("frames", self.frames, data.frames),
            ("frame_stride", self.frame_stride.unwrap_or(data.frame_stride), data.frame_stride),
            ("resolution", self.resolution, data.resolution),
        ] {
            ensure!(
                own == theirs,
                "{key} is {theirs}, and the protocol {} says {own} (where a file says nothing, the protocol's is taken)",
                self.name
            );
        }
        Ok(())
    }
}

/// Everything that moves a figure besides the generated videos: printed and stored with each figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Protocol {
    /// With the stride that was used.
    pub settings: ProtocolConfig,
    /// The real videos for people: where it was, and its split.
    pub real: DatasetConfig,
    /// What the real videos are: [`Listing::fingerprint`](crate::data::Listing::fingerprint).
    pub real_sha256: String,
    /// How they were read: [`READING`](crate::data::READING), or the one of a packed file; none of arrays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reading: Option<u32>,
    /// Draws the real clips.
    pub seed: u64,
    /// The network's name.
    pub extractor: String,
    /// Of its weight file.
    pub extractor_sha256: String,
    /// How each metric is computed, under the metric's name: FVD and KVD always both, where either is measured, and further
    /// metrics that are measured.
    #[serde(flatten)]
    pub definitions: BTreeMap<Metric, String>,
}

impl Protocol {
    /// The settings with the stride that is used, on these real data, whose fingerprint is `real_sha256` and which are read
    /// so. `extractor` is the protocol's own; each metric comes with the extractor whose features it compares.
    pub fn new<'a>(
        config: &ProtocolConfig,
        real: &DataConfig,
        real_sha256: &str,
        reading: Option<u32>,
        seed: u64,
        extractor: &dyn FeatureExtractor,
        metrics: impl IntoIterator<Item = (Metric, &'a dyn FeatureExtractor)>,
    ) -> Self {
        let (own, further): (Vec<_>, Vec<_>) = metrics.into_iter().partition(|(metric, _)| metric.is_default());
        let own = own.first().map(|_| Metric::DEFAULT.map(|metric| (metric, metric.definition(extractor))));
        let definition = |(metric, compared): (Metric, &dyn FeatureExtractor)| {
            let definition = metric.definition(compared);
            let text = match compared.weights_sha256() {
                "" => format!("{definition}, of {}", compared.name()),
                sha256 => format!("{definition}, of {} (sha256 {sha256})", compared.name()),
            };
            (metric, text)
        };
        let stride = config.frame_stride.unwrap_or(real.frame_stride);
        Protocol {
            settings: ProtocolConfig { frame_stride: Some(stride), ..config.clone() },
            real: real.dataset.clone(),
            real_sha256: real_sha256.into(),
            reading,
            seed,
            extractor: extractor.name().into(),
            extractor_sha256: extractor.weights_sha256().into(),
            definitions: own.into_iter().flatten().chain(further.into_iter().map(definition)).collect(),
        }
    }

    /// All of it but where data and weights lie: equal figures need equal identities. Which metrics were measured beside
    /// FVD and KVD does not move those, and is not in it; where neither of the two was measured, the others are.
    pub fn identity(&self) -> Value {
        let Protocol { extractor, extractor_sha256, definitions, .. } = self;
        let mut identity = self.identity_of_clips();
        identity["extractor"] = json!(extractor);
        identity["extractor_sha256"] = json!(extractor_sha256);
        let is_own = definitions.keys().any(|metric| metric.is_default());
        for (metric, definition) in definitions.iter().filter(|(metric, _)| !is_own || metric.is_default()) {
            identity[metric.name()] = json!(definition);
        }
        identity
    }

    /// Of the clips that are compared, whatever is looked at in them.
    fn identity_of_clips(&self) -> Value {
        let settings = ProtocolConfig { extractor: None, ..self.settings.clone() };
        let Protocol { real_sha256, reading, seed, .. } = self;
        let mut identity = json!({"settings": settings, "real_sha256": real_sha256, "seed": seed});
        // figures of arrays, and of the first reading, are those of before there were readings
        if let Some(reading @ 1..) = reading {
            identity["reading"] = json!(reading);
        }
        identity
    }

    /// The first twelve digits of the SHA-256 of its identity; equal protocols have equal hashes.
    pub fn hash(&self) -> String {
        hash_of(&self.identity())
    }

    /// As [`Self::hash`] for one metric: equal where its figures compare. That of FVD and KVD is the protocol's own; another
    /// metric has one for itself, whatever is measured beside it. None of a metric that was not measured.
    pub fn hash_of_metric(&self, metric: Metric) -> Option<String> {
        let definition = self.definitions.get(&metric)?;
        if metric.is_default() {
            return Some(self.hash());
        }
        let mut identity = self.identity_of_clips();
        identity[metric.name()] = json!(definition);
        Some(hash_of(&identity))
    }

    /// One line for people.
    pub fn line(&self) -> String {
        let short = |sha256: &str| sha256[..12.min(sha256.len())].to_string();
        let definition = |(metric, text): (&Metric, &String)| match self.hash_of_metric(*metric) {
            Some(hash) if !metric.is_default() => format!("; {} ({hash}): {text}", metric.title()),
            _ => format!("; {}: {text}", metric.title()),
        };
        format!(
            "{}; real: {} (sha256 {}…), seed {}; {} (sha256 {}…){}",
            self.settings.line(),
            self.real.line(),
            short(&self.real_sha256),
            self.seed,
            self.extractor,
            short(&self.extractor_sha256),
            self.definitions.iter().map(definition).collect::<String>(),
        )
    }
}

/// The first twelve digits of the SHA-256.
fn hash_of(identity: &Value) -> String {
    let digest = Sha256::digest(identity.to_string());
    digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Folder, Indexed};

    struct Nothing;

    impl FeatureExtractor for Nothing {
        fn name(&self) -> &str {
            "nothing"
        }

        fn weights_sha256(&self) -> &str {
            "00"
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

        fn features(&self, videos: &tch::Tensor) -> Result<tch::Tensor> {
            Ok(videos.shallow_clone())
        }
    }

    /// FVD and KVD against real data of this fingerprint.
    fn protocol(config: &ProtocolConfig, data: &DataConfig, sha256: &str, reading: Option<u32>, seed: u64) -> Protocol {
        let metrics = [Metric::FVD, Metric::KVD].map(|metric| (metric, &Nothing as &dyn FeatureExtractor));
        Protocol::new(config, data, sha256, reading, seed, &Nothing, metrics)
    }

    fn data() -> DataConfig {
        let dataset = DatasetConfig::Folder(Folder { root: "videos".into() });
        DataConfig { dataset, frames: 16, frame_stride: 2, resolution: 64, flip: true, workers: 3 }
    }

    #[test]
    fn whatever_moves_a_figure_moves_the_hash() {
        let plain = ProtocolConfig::plain(96, &data());
        let hash =
            |config: &ProtocolConfig, data: &DataConfig, seed| protocol(config, data, "aa", Some(1), seed).hash();
        let base = hash(&plain, &data(), 0);
        // threads and mirroring do not, nor where data and weights lie
        assert_eq!(base, hash(&plain, &DataConfig { workers: 1, flip: false, ..data() }, 0));
        let elsewhere = DataConfig { dataset: DatasetConfig::Folder(Folder { root: "./videos".into() }), ..data() };
        assert_eq!(base, hash(&plain, &elsewhere, 0));
        assert_eq!(
            base,
            hash(&ProtocolConfig { extractor: Some(ExtractorConfig::default()), ..plain.clone() }, &data(), 0)
        );
        let squash = Fit { squash: true, ..Fit::default() };
        let mut others = vec![
            hash(&plain, &data(), 1),
            hash(&plain, &DataConfig { frame_stride: 1, ..data() }, 0),
            protocol(&plain, &data(), "bb", Some(1), 0).hash(),
            protocol(&plain, &data(), "aa", Some(2), 0).hash(),
            protocol(&plain, &data(), "aa", None, 0).hash(),
        ];
        for config in [
            plain.clone().at(95),
            ProtocolConfig { frames: 15, ..plain.clone() },
            ProtocolConfig { resolution: 32, ..plain.clone() },
            ProtocolConfig { fit: squash, ..plain.clone() },
            ProtocolConfig { draw: Draw::Listed, ..plain.clone() },
            ProtocolConfig { runs: 2, ..plain.clone() },
            ProtocolConfig { redraw: Redraw::Both, ..plain.clone() },
            ProtocolConfig { drop_partial_batch: Some(5), ..plain.clone() },
            ProtocolConfig { covariance: Divisor::N, ..plain.clone() },
        ] {
            config.validate().unwrap();
            others.push(hash(&config, &data(), 0));
        }
        others.push(base);
        let count = others.len();
        others.sort();
        others.dedup();
        assert_eq!(others.len(), count);
        // and a figure's file gives back the same protocol
        let protocol = protocol(&plain, &data(), "aa", Some(1), 0);
        let text = serde_json::to_string(&protocol).unwrap();
        assert_eq!(serde_json::from_str::<Protocol>(&text).unwrap(), protocol);
    }

    /// The same figures whatever else was measured; the others have a hash each, which does not depend on that either.
    #[test]
    fn further_metrics_stand_beside_the_protocol() {
        let of = |names: &[&str], sha256: &str| {
            let metrics = names.iter().map(|name| (Metric::named(name).unwrap(), &Nothing as &dyn FeatureExtractor));
            Protocol::new(&ProtocolConfig::plain(96, &data()), &data(), sha256, Some(1), 0, &Nothing, metrics)
        };
        let both = of(&["fvd", "kvd"], "aa");
        for names in [&["fvd"][..], &["kvd"], &["fvd", "frame_distance"], &["kvd", "frame_distance", "motion_distance"]]
        {
            assert_eq!(of(names, "aa").hash(), both.hash(), "{names:?}");
        }
        let frames = Metric::named("frame_distance").unwrap();
        let hash = of(&["fvd", "frame_distance"], "aa").hash_of_metric(frames);
        assert_eq!(hash, of(&["frame_distance", "motion_distance"], "aa").hash_of_metric(frames));
        assert_ne!(hash, of(&["fvd", "frame_distance"], "bb").hash_of_metric(frames));
        assert_eq!((both.hash_of_metric(frames), both.hash_of_metric(Metric::KVD)), (None, Some(both.hash())));
        let line = of(&["fvd", "frame_distance"], "aa").line();
        assert!(line.contains(&format!("; frame distance ({}): ", hash.unwrap())), "{line}");
        // neither of the two is in figures of others alone
        assert_ne!(of(&["frame_distance"], "aa").hash(), of(&["motion_distance"], "aa").hash());
    }

    #[test]
    fn arrays_and_videos_of_the_first_reading_keep_their_hash() {
        let identity = |reading| protocol(&ProtocolConfig::plain(96, &data()), &data(), "aa", reading, 0).identity();
        assert!(identity(None).get("reading").is_none());
        assert_eq!(identity(Some(0)), identity(None));
        assert_eq!(identity(Some(1))["reading"], 1);
    }

    #[test]
    fn another_number_of_clips_is_said_by_the_name() {
        let config = ProtocolConfig { name: "lvdm16".into(), ..ProtocolConfig::plain(2048, &data()) };
        assert_eq!(config.clone().at(2048).name, "lvdm16");
        assert_eq!(config.clone().at(96).at(64).name, "lvdm16@64");
        let test = DataConfig {
            dataset: DatasetConfig::Indexed(Indexed { file: "sky/index.jsonl".into(), split: Some("test".into()) }),
            ..data()
        };
        let line = protocol(&config.at(96), &test, "aa", Some(1), 0).line();
        assert!(line.starts_with("lvdm16@96: 96 clips of 16 frames at stride 2, 64 px"), "{line}");
        for word in
            ["sky/index.jsonl, split test (sha256 aa…)", "covariances over n - 1", "as they are", "unbiased MMD²"]
        {
            assert!(line.contains(word), "{line}");
        }
    }

    #[test]
    fn wrong_protocols_name_their_key() {
        let plain = ProtocolConfig::plain(96, &data());
        for (config, word) in [
            (ProtocolConfig { clips: 1, ..plain.clone() }, "clips"),
            (ProtocolConfig { runs: 0, ..plain.clone() }, "runs"),
            (ProtocolConfig { frame_stride: Some(0), ..plain.clone() }, "frame_stride"),
            (ProtocolConfig { drop_partial_batch: Some(97), ..plain.clone() }, "drop_partial_batch"),
            (ProtocolConfig { windows_of: Some(8), ..plain.clone() }, "windows_of"),
            (ProtocolConfig { name: " ".into(), ..plain.clone() }, "name"),
            (ProtocolConfig { runs: 2, draw: Draw::Windows { step: 8 }, ..plain.clone() }, "windows gives the same"),
            (ProtocolConfig { runs: 2, draw: Draw::Listed, redraw: Redraw::Both, ..plain.clone() }, "`runs: 1`"),
        ] {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
        let message = plain.agrees_with(&DataConfig { frames: 8, ..data() }).unwrap_err().to_string();
        assert!(message.contains("frames is 8") && message.contains("16"), "{message}");
        ProtocolConfig { runs: 2, draw: Draw::Listed, redraw: Redraw::Generated, ..plain.clone() }.validate().unwrap();
        assert_eq!(ProtocolConfig { drop_partial_batch: Some(32), ..plain }.generated_clips(), 96);
    }
}
