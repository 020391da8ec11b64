//! Clips stream by, their features stay; ranks share the work of the extractor.

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use tch::{Device, Tensor};

use crate::{data::ClipStream, distributed::Ranks, extractors::FeatureExtractor, torch::device_name, train::progress};

/// How many clips of so many frames go through the extractor at once, however they arrive: enough to fill a GPU, and no
/// more frames than its memory surely holds.
pub fn clips_at_once(device: Device, frames: i64) -> i64 {
    if device.is_cuda() { (512 / frames.max(1)).clamp(1, 32) } else { 4 }
}

/// An extractor whose work is divided among ranks: all see the clips, and each batch goes through on one of them.
#[derive(Clone, Copy)]
pub struct ShardedExtractor<'a> {
    /// The extractor.
    pub extractor: &'a dyn FeatureExtractor,
    /// Where it works.
    pub device: Device,
    /// Who share the work.
    pub ranks: &'a Ranks,
}

impl ShardedExtractor<'_> {
    /// What kinds of devices the ranks extract on. On another kind the same clips have slightly other features.
    ///
    /// # Errors
    /// A rank that is gone.
    pub fn device_names(&self) -> Result<BTreeSet<String>> {
        let own = device_name(self.device);
        let all = self.ranks.share(self.ranks.size(), |_| Ok(Tensor::from_slice(own.as_bytes())))?;
        all.into_iter().map(|name| Ok(String::from_utf8(Vec::try_from(name)?)?)).collect()
    }
}

/// Features of clips as they stream by; of the clips no more than a batch is kept.
pub struct Extraction<'a> {
    extractor: ShardedExtractor<'a>,
    /// Together fewer clips than a batch, `[n, 3, F, H, W]` each.
    pending: Vec<Tensor>,
    /// Of each batch; none where another rank has it.
    rows: Vec<Option<Tensor>>,
}

impl<'a> Extraction<'a> {
    /// Of no clips yet.
    pub fn new(extractor: ShardedExtractor<'a>) -> Self {
        Extraction { extractor, pending: Vec::new(), rows: Vec::new() }
    }

    /// Clips u8 `[n, 3, F, H, W]`.
    ///
    /// # Errors
    /// Clips that the extractor cannot see.
    pub fn take(&mut self, clips: &Tensor) -> Result<()> {
        let batch = clips_at_once(self.extractor.device, clips.size()[2]);
        let mut clips = clips.shallow_clone();
        let waiting: i64 = self.pending.iter().map(|pending| pending.size()[0]).sum();
        if waiting > 0 && waiting + clips.size()[0] >= batch {
            // once a batch, for clips come one by one
            self.pending.push(clips);
            clips = Tensor::cat(&self.pending, 0);
            self.pending.clear();
        }
        while clips.size()[0] >= batch {
            self.extract(&clips.narrow(0, 0, batch))?;
            clips = clips.narrow(0, batch, clips.size()[0] - batch);
        }
        // a copy: a view would keep all that arrived
        if clips.size()[0] > 0 {
            self.pending.push(clips.copy());
        }
        Ok(())
    }

    fn extract(&mut self, clips: &Tensor) -> Result<()> {
        let ShardedExtractor { extractor, ranks, .. } = self.extractor;
        let own = self.rows.len() % ranks.size() == ranks.rank();
        self.rows.push(if own { Some(extractor.features(&clips.permute([0, 2, 3, 4, 1]))?) } else { None });
        Ok(())
    }

    /// `[N, …]`, the same on all ranks.
    ///
    /// # Errors
    /// No clips; a rank that is gone.
    pub fn finish(mut self) -> Result<Tensor> {
        if !self.pending.is_empty() {
            let pending = Tensor::cat(&std::mem::take(&mut self.pending), 0);
            self.extract(&pending)?;
        }
        anyhow::ensure!(!self.rows.is_empty(), "there are no clips to measure");
        let rows = &mut self.rows;
        let shared = self.extractor.ranks.share(rows.len(), |i| rows[i].take().context("a batch of another rank"))?;
        Ok(Tensor::cat(&shared, 0))
    }
}

/// Features of the first `count` clips of a draw by each extractor, or of all where there are fewer, `[N, …]`; `observe`
/// sees each clip.
///
/// # Errors
/// Clips that cannot be read or seen.
pub fn features_of(
    clips: &mut ClipStream,
    count: i64,
    extractors: &[ShardedExtractor],
    bar: &mut Bar,
    observe: &mut dyn FnMut(&Tensor) -> Result<()>,
) -> Result<Vec<Tensor>> {
    let mut extractions: Vec<Extraction> = extractors.iter().copied().map(Extraction::new).collect();
    for _ in 0..count {
        let Some(clip) = clips.next()? else { break };
        observe(&clip)?;
        extractions.iter_mut().try_for_each(|extraction| extraction.take(&clip))?;
        bar.advance(1);
    }
    extractions.into_iter().map(Extraction::finish).collect()
}

/// Progress that is counted by the clip.
pub struct Bar {
    progress: progress::Progress,
    done: u64,
}

impl Bar {
    /// Shown by the first rank.
    pub fn new(label: &str, total: i64, ranks: &Ranks) -> Self {
        Bar { progress: progress::Progress::new(label, total as u64, 0).shown(ranks.is_first()), done: 0 }
    }

    /// So many more clips are done.
    pub fn advance(&mut self, by: u64) {
        self.done += by;
        self.progress.step(self.done, "");
    }

    /// All are done.
    pub fn finish(self) {
        self.progress.finish();
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

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
            assert!(videos.size()[0] <= clips_at_once(Device::Cpu, 2));
            Ok(videos.select(1, 0).select(1, 0).select(1, 0).narrow(1, 0, 1).to_kind(Kind::Float))
        }
    }

    /// A GPU takes more clips at once than the CPU, and not more frames than its memory holds.
    #[test]
    fn batches_fit_the_device() {
        let gpu = Device::Cuda(0);
        assert_eq!([clips_at_once(Device::Cpu, 16), clips_at_once(Device::Cpu, 128)], [4, 4]);
        assert_eq!([4, 16, 128, 1024].map(|frames| clips_at_once(gpu, frames)), [32, 32, 4, 1]);
    }

    #[test]
    fn features_do_not_depend_on_how_clips_arrive() {
        let clips =
            Tensor::arange(11, (Kind::Uint8, Device::Cpu)).view([11, 1, 1, 1, 1]).expand([11, 3, 2, 4, 4], false);
        let alone = Ranks::alone();
        let first = ShardedExtractor { extractor: &First, device: Device::Cpu, ranks: &alone };
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

    /// Every GPU has its name, whatever its number.
    #[test]
    fn a_device_is_named_and_not_numbered() {
        let alone = Ranks::alone();
        let names = |device| ShardedExtractor { extractor: &First, device, ranks: &alone }.device_names().unwrap();
        assert_eq!(names(Device::Cuda(6)), names(Device::Cuda(7)));
        assert_ne!(names(Device::Cuda(6)), names(Device::Cpu));
    }
}
