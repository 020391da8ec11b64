//! The sampling of many videos: whole batches shared among processes, so that what is made depends on neither.

use anyhow::{Context, Result};
use tch::Tensor;

use super::{
    assignment::{Assignment, Seeds},
    model::VideoModel,
};
use crate::distributed::Ranks;

/// Videos 0, 1, … of a model.
pub struct SamplingJob<'a> {
    /// What makes them.
    pub model: &'a dyn VideoModel,
    /// What they are given.
    pub assignment: &'a Assignment,
    /// Of their random numbers.
    pub seeds: Seeds,
    /// How many.
    pub videos: u64,
    /// Videos in one pass of the model.
    pub batch: u64,
}

impl SamplingJob<'_> {
    /// Makes them. On rank 0 each batch, u8 `[N, 3, F, H, W]`, goes to `take` with the numbers of its videos, in order.
    /// `on_step(first, i, steps)` is called at each step on the batch whose first video has this number.
    ///
    /// # Errors
    /// Those of the model and of `take`; another rank that failed.
    pub fn run(
        &self,
        ranks: &Ranks,
        on_step: &mut dyn FnMut(u64, usize, usize),
        take: &mut dyn FnMut(&[u64], &Tensor) -> Result<()>,
    ) -> Result<()> {
        let _prepared = self.model.keep_prepared();
        let batches: Vec<Vec<u64>> = (0..self.videos)
            .step_by(self.batch as usize)
            .map(|first| (first..(first + self.batch).min(self.videos)).collect())
            .collect();
        let make = |i: usize| {
            let videos: &Vec<u64> = &batches[i];
            let mut on_batch_step = |step, steps| on_step(videos[0], step, steps);
            Ok(vec![self.assignment.videos(self.model, videos, &self.seeds, &mut on_batch_step)?])
        };
        ranks.collect(batches.len(), make, |i, made| {
            if !ranks.is_first() {
                return Ok(());
            }
            take(&batches[i], made.first().context("a batch without videos")?)
        })
    }
}
