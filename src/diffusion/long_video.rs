//! The plan of a long video: which frames are made in which clip (paper, section 3.3). Arithmetic only.
//!
//! Autoregressive: a clip, then again and again the last k frames are given and the rest of a clip is made.
//! Hierarchical: the same on frames that lie `gap` apart, then each gap is filled between its two ends.

use anyhow::{Result, ensure};
use serde::Serialize;

/// Which network makes a clip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Continues a video, or makes its sparse frames.
    Prediction,
    /// Fills the gap between two frames.
    Interpolation,
}

/// One clip of the plan. All frames are latent frames of the long video, counted from 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlanStep {
    /// Which network makes it.
    pub model: Role,
    /// Frames that were made before and that the clip must fit.
    pub given: Vec<i64>,
    /// Frames that it adds; what else the clip holds is not kept.
    pub written: Vec<i64>,
    /// The video's frame at the clip's place 0, and how far apart the clip's frames lie.
    #[serde(skip)]
    pub first: i64,
    /// Latent frames from one to the next.
    #[serde(skip)]
    pub spacing: i64,
    /// Frames of the clip.
    #[serde(skip)]
    pub length: i64,
}

impl PlanStep {
    /// Places of the video's frames in the clip.
    pub fn places(&self, frames: &[i64]) -> Vec<i64> {
        frames.iter().map(|frame| (frame - self.first) / self.spacing).collect()
    }
}

/// Every clip of a long video, in an order in which nothing is given before it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LongVideoPlan {
    /// Latent frames of the video.
    pub frames: i64,
    /// Latent frames that are made: the last gap may end behind the video's end, where it is cut off.
    pub extent: i64,
    /// In the order in which they are made.
    pub steps: Vec<PlanStep>,
}

impl LongVideoPlan {
    /// For `total` latent frames from a prediction network that makes clips of `clip` frames lying `gap` apart,
    /// the first `overlap` of them given. With a gap of 1 the plan is autoregressive; else an interpolation
    /// network makes clips of `gap + 1` frames, both ends given.
    ///
    /// # Errors
    /// Names the number that does not fit.
    pub fn for_frames(total: i64, clip: i64, overlap: i64, gap: i64) -> Result<Self> {
        ensure!(total >= 1, "a video of {total} latent frames");
        ensure!(clip >= 2, "a clip of {clip} latent frames cannot be continued; it takes at least 2");
        ensure!((1..clip).contains(&overlap), "an overlap of {overlap} in clips of {clip} latent frames");
        ensure!(gap >= 1, "a gap of {gap} between frames; it must be at least 1");
        let sparse = (total - 1 + gap - 1) / gap + 1;
        let at = |range: std::ops::Range<i64>| range.map(|i| i * gap).collect::<Vec<i64>>();
        let mut steps = Vec::new();
        let mut made = 0;
        while made < sparse {
            let start = if made == 0 { 0 } else { made - overlap };
            let end = (start + clip).min(sparse);
            steps.push(PlanStep {
                model: Role::Prediction,
                given: at(start..made),
                written: at(made..end),
                first: start * gap,
                spacing: gap,
                length: clip,
            });
            made = end;
        }
        if gap > 1 {
            steps.extend((0..sparse - 1).map(|i| i * gap).map(|first| PlanStep {
                model: Role::Interpolation,
                given: vec![first, first + gap],
                written: (first + 1..(first + gap).min(total)).collect(),
                first,
                spacing: 1,
                length: gap + 1,
            }));
        }
        Ok(LongVideoPlan { frames: total, extent: (sparse - 1) * gap + 1, steps })
    }

    /// For `total` latent frames from a network that makes blocks of `made` frames in clips of `length`, given the `past`
    /// frames before each, of which the first block has none.
    ///
    /// # Errors
    /// Names the number that does not fit.
    pub fn of_blocks(total: i64, past: i64, made: i64, length: i64) -> Result<Self> {
        ensure!(total >= 1, "a video of {total} latent frames");
        ensure!(
            past >= 1 && made >= 1 && past + made <= length,
            "blocks of {made} and a past of {past} in clips of {length} latent frames"
        );
        let steps = (0..total).step_by(made as usize).map(|start| PlanStep {
            model: Role::Prediction,
            given: ((start - past).max(0)..start).collect(),
            written: (start..(start + made).min(total)).collect(),
            first: start - past,
            spacing: 1,
            length,
        });
        Ok(LongVideoPlan { frames: total, extent: total, steps: steps.collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every frame is made once, and nothing is given that is not there yet.
    fn check(total: i64, clip: i64, overlap: i64, gap: i64) {
        let case = format!("{total} frames, clips of {clip}, overlap {overlap}, gap {gap}");
        let plan = LongVideoPlan::for_frames(total, clip, overlap, gap).unwrap();
        let mut made = vec![0; plan.extent as usize];
        for step in &plan.steps {
            assert!(!step.written.is_empty(), "{case}: a clip of which nothing is kept");
            for &frame in &step.given {
                assert_eq!(made[frame as usize], 1, "{case}: frame {frame} is given and not there");
            }
            let all: Vec<i64> = step.given.iter().chain(&step.written).copied().collect();
            let places = step.places(&all);
            for (frame, place) in all.iter().zip(&places) {
                assert!((0..step.length).contains(place), "{case}: frame {frame} at place {place}");
                assert_eq!(step.first + place * step.spacing, *frame, "{case}");
            }
            for &frame in &step.written {
                made[frame as usize] += 1;
            }
            match step.model {
                Role::Prediction => {
                    let wanted = if step.first == 0 && step.given.is_empty() { 0 } else { overlap };
                    assert_eq!(step.given.len() as i64, wanted, "{case}");
                    assert_eq!(step.length, clip);
                }
                Role::Interpolation => assert_eq!(places[..2], [0, gap], "{case}"),
            }
        }
        assert!(made[..total as usize].iter().all(|&count| count == 1), "{case}: {made:?}");
        assert!(made.iter().all(|&count| count <= 1) && plan.extent - total < gap, "{case}");
    }

    #[test]
    fn every_frame_is_made_once() {
        for total in 1..=2000 {
            for (clip, overlap, gap) in [(4, 1, 1), (4, 3, 1), (4, 1, 4), (5, 2, 7), (8, 4, 3), (16, 1, 15)] {
                check(total, clip, overlap, gap);
            }
        }
        for total in 1..60 {
            for clip in 2..9 {
                for overlap in 1..clip {
                    for gap in 1..10 {
                        check(total, clip, overlap, gap);
                    }
                }
            }
        }
    }

    /// Every frame is made once, right behind the past; the first blocks may have less of it.
    #[test]
    fn blocks_follow_from_each_other() {
        for (total, past, made) in [(11, 2, 3), (10, 4, 1), (3, 1, 5), (16, 4, 4)] {
            let plan = LongVideoPlan::of_blocks(total, past, made, past + made + 1).unwrap();
            let written: Vec<i64> = plan.steps.iter().flat_map(|step| step.written.clone()).collect();
            assert_eq!(written, (0..total).collect::<Vec<_>>());
            for step in &plan.steps {
                let start = step.written[0];
                assert_eq!(step.given, ((start - past).max(0)..start).collect::<Vec<_>>());
                assert_eq!(step.places(&step.written)[0], past);
                assert!(step.places(&step.given).iter().all(|place| (0..past).contains(place)));
            }
        }
        assert!(LongVideoPlan::of_blocks(8, 4, 4, 7).is_err() && LongVideoPlan::of_blocks(0, 1, 1, 2).is_err());
    }

    /// 1,024 frames at the paper's setting: 65 sparse latent frames, 0 … 256, and 64 gaps.
    #[test]
    fn a_thousand_frames() {
        let plan = LongVideoPlan::for_frames(256, 4, 1, 4).unwrap();
        let sparse: Vec<i64> =
            plan.steps.iter().filter(|s| s.model == Role::Prediction).flat_map(|s| s.written.clone()).collect();
        assert_eq!(sparse, (0..=64).map(|i| 4 * i).collect::<Vec<_>>());
        assert_eq!(plan.steps.iter().filter(|s| s.model == Role::Interpolation).count(), 64);
        assert_eq!((plan.extent, plan.steps.last().unwrap().written.clone()), (257, vec![253, 254, 255]));
    }

    #[test]
    fn impossible_plans_are_refused() {
        for (total, clip, overlap, gap) in [(0, 4, 1, 1), (8, 1, 1, 1), (8, 4, 4, 1), (8, 4, 0, 1), (8, 4, 1, 0)] {
            assert!(LongVideoPlan::for_frames(total, clip, overlap, gap).is_err());
        }
    }
}
