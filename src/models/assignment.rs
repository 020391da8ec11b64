//! What numbered videos are given: prompts, classes and first frames, dealt to them by their numbers.

use anyhow::{Result, ensure};
use tch::Tensor;

use super::model::{Accepts, Classes, Given, SampleId, TextPrompts, VideoModel};
use crate::data::RgbFrame;

/// What is asked of a model; by default nothing.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    /// What videos are to show.
    pub prompts: Vec<String>,
    /// What guidance by a prompt leads away from.
    pub negative: String,
    /// Of which classes videos are to be, by number. Without any a model that knows classes makes videos of all in turn.
    pub classes: Vec<i64>,
    /// What videos begin with.
    pub first_frames: Vec<RgbFrame>,
    /// Weight of guidance by the prompt, or by the class of a model that takes no text; without one the model's own. Where
    /// videos follow both, the weight is the prompt's.
    pub guidance: Option<f64>,
}

/// What each video of a model is given: video i the i-th prompt, class and first frame, from the first again after the last.
pub struct Assignment {
    asked: Asked,
    /// Whether classes come in turn because none was asked for.
    all_classes: bool,
    text_guidance: f64,
    class_guidance: f64,
}

/// The seeds of numbered videos.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seeds {
    /// Video i is sample i of this seed.
    One(u64),
    /// Video i is the first sample of the i-th seed, from the first again after the last.
    Each(Vec<u64>),
}

impl Seeds {
    /// The numbers on which a video depends.
    pub fn of(&self, video: u64) -> SampleId {
        match self {
            Seeds::One(seed) => SampleId { seed: *seed, sample: video },
            Seeds::Each(seeds) => SampleId { seed: *dealt(seeds, video), sample: 0 },
        }
    }
}

fn dealt<T>(list: &[T], video: u64) -> &T {
    &list[(video % list.len() as u64) as usize]
}

impl Assignment {
    /// Completes what is asked by what the model takes.
    ///
    /// # Errors
    /// What the model cannot be given; a model of texts that is given none; guidance where there is nothing to follow.
    pub fn new(model: &dyn VideoModel, asked: Asked) -> Result<Self> {
        let accepts = model.accepts();
        ensure!(
            accepts.text.is_none() || !asked.prompts.is_empty(),
            "the model makes videos from texts: it needs prompts"
        );
        ensure!(
            asked.guidance.is_none() || accepts.text.is_some() || accepts.classes.is_some(),
            "guidance: the model makes videos neither from texts nor of classes, so that there is nothing to follow"
        );
        let assignment = Self::within(&accepts, asked);
        // every class that is asked for
        let videos: Vec<u64> = (0..assignment.asked.classes.len().max(1) as u64).collect();
        assignment.give(&videos, |given| model.check(given))?;
        Ok(assignment)
    }

    /// As [`Self::new`], without asking whether the model can be given it: a training may show what it has no prompts for.
    pub fn within(accepts: &Accepts, mut asked: Asked) -> Self {
        let all_classes = asked.classes.is_empty();
        if let (true, Some(known)) = (all_classes, &accepts.classes) {
            asked.classes = (0..known.list.count()).collect();
        }
        let own = accepts.classes.as_ref().map_or(1.0, |known| known.guidance);
        Assignment {
            text_guidance: asked.guidance.or(accepts.text).unwrap_or(1.0),
            class_guidance: if accepts.text.is_some() { own } else { asked.guidance.unwrap_or(own) },
            asked,
            all_classes,
        }
    }

    /// Hands on what these videos are given.
    pub fn give<T>(&self, videos: &[u64], hand_on: impl FnOnce(&Given) -> T) -> T {
        let Asked { prompts, negative, first_frames, .. } = &self.asked;
        let prompts: Vec<String> = if prompts.is_empty() {
            Vec::new()
        } else {
            videos.iter().map(|&video| dealt(prompts, video).clone()).collect()
        };
        let numbers = self.classes(videos);
        let pictures: Vec<&RgbFrame> = if first_frames.is_empty() {
            Vec::new()
        } else {
            videos.iter().map(|&video| dealt(first_frames, video)).collect()
        };
        hand_on(&Given {
            text: (!prompts.is_empty()).then_some(TextPrompts {
                prompts: &prompts,
                negative,
                guidance: self.text_guidance,
            }),
            classes: (!numbers.is_empty()).then_some(Classes { numbers: &numbers, guidance: self.class_guidance }),
            first_frames: (!pictures.is_empty()).then_some(&pictures),
        })
    }

    /// The classes of these videos; none of a model without classes.
    pub fn classes(&self, videos: &[u64]) -> Vec<i64> {
        let classes = &self.asked.classes;
        if classes.is_empty() { Vec::new() } else { videos.iter().map(|&video| *dealt(classes, video)).collect() }
    }

    /// The prompt of a video, where it has one.
    pub fn prompt(&self, video: u64) -> Option<&str> {
        (!self.asked.prompts.is_empty()).then(|| dealt(&self.asked.prompts, video).as_str())
    }

    /// These videos of a model, u8 `[N, 3, F, H, W]` on the host. `on_step(i, steps)` is called at each step.
    ///
    /// # Errors
    /// Those of [`VideoModel::videos`].
    pub fn videos(
        &self,
        model: &dyn VideoModel,
        videos: &[u64],
        seeds: &Seeds,
        on_step: &mut dyn FnMut(usize, usize),
    ) -> Result<Tensor> {
        let samples: Vec<SampleId> = videos.iter().map(|&video| seeds.of(video)).collect();
        self.give(videos, |given| model.videos(&samples, given, on_step))
    }

    /// What figures tell of it: guidance, and whether classes come in turn. Empty where there is nothing to follow.
    pub fn describe(&self) -> String {
        let Asked { prompts, classes, .. } = &self.asked;
        let guidance = if prompts.is_empty() { self.class_guidance } else { self.text_guidance };
        match (prompts.is_empty(), classes.is_empty()) {
            (true, true) => String::new(),
            (false, true) => format!("guidance {guidance}"),
            (_, false) if self.all_classes => format!("each class in turn, guidance {guidance}"),
            (_, false) => format!("of chosen classes, guidance {guidance}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{experiment::ClassList, models::model::KnownClasses};

    fn accepts(text: Option<f64>, classes: Option<(i64, f64)>) -> Accepts {
        let known = |(count, guidance)| KnownClasses { list: ClassList::Count(count), guidance };
        Accepts { text, classes: classes.map(known) }
    }

    #[test]
    fn prompts_and_classes_are_dealt_by_number() {
        let asked = Asked { prompts: vec!["a".into(), "b".into()], negative: "c".into(), ..Asked::default() };
        let both = Assignment::within(&accepts(Some(7.5), Some((3, 4.0))), asked.clone());
        both.give(&[1, 2, 3], |given| {
            let (text, classes) = (given.text.unwrap(), given.classes.unwrap());
            assert_eq!((text.prompts, text.negative), (&["b", "a", "b"].map(String::from)[..], "c"));
            assert_eq!(classes.numbers, [1, 2, 0]);
            assert_eq!((text.guidance, classes.guidance), (7.5, 4.0));
            assert!(given.first_frames.is_none());
        });
        assert_eq!((both.prompt(3), both.describe().as_str()), (Some("b"), "each class in turn, guidance 7.5"));
        let louder = Assignment::within(&accepts(Some(7.5), Some((3, 4.0))), Asked { guidance: Some(9.0), ..asked });
        louder.give(&[1], |given| {
            assert_eq!((given.text.unwrap().guidance, given.classes.unwrap().guidance), (9.0, 4.0));
        });
        let asked = Asked { classes: vec![2, 0], guidance: Some(2.0), ..Asked::default() };
        let chosen = Assignment::within(&accepts(None, Some((3, 4.0))), asked);
        assert_eq!(chosen.classes(&[0, 1, 2]), [2, 0, 2]);
        assert_eq!((chosen.prompt(0), chosen.describe().as_str()), (None, "of chosen classes, guidance 2"));
        let plain = Assignment::within(&accepts(None, None), Asked::default());
        plain.give(&[0, 1], |given| assert!(given.text.is_none() && given.classes.is_none()));
        assert_eq!(plain.describe(), "");
    }

    #[test]
    fn seeds_are_dealt_too() {
        assert_eq!(Seeds::One(7).of(3), SampleId { seed: 7, sample: 3 });
        assert_eq!(Seeds::Each(vec![7, 9]).of(3), SampleId { seed: 9, sample: 0 });
    }
}
