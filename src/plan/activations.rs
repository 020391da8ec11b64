//! How much a forward pass keeps for its backward pass, out of passes for their shapes alone, in the operations and the
//! precision that the network has on a GPU ([`as_on_gpu`](crate::torch::as_on_gpu)).

use anyhow::Result;

use crate::torch::Kept;

/// What a forward pass keeps for its backward pass, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Activations {
    /// Whatever the batch: in mixed precision, the weights in bfloat16.
    pub fixed: i64,
    /// For each clip of a batch.
    pub clip: i64,
}

impl Activations {
    /// Of a batch.
    pub fn bytes(&self, batch: i64) -> i64 {
        self.fixed + batch * self.clip
    }

    /// Those of a network where nothing is computed again, and where its bodies are. `count` says what a pass over so many
    /// clips keeps.
    ///
    /// # Errors
    /// Those of `count`.
    pub(super) fn of(count: &dyn Fn(i64) -> Result<Kept>) -> Result<[Self; 2]> {
        let [one, two] = [count(1)?, count(2)?];
        // bodies are computed again one at a time
        let again = |kept: &Kept| kept.stays + kept.recomputed.iter().max().unwrap_or(&0);
        Ok([[one.whole, two.whole], [again(&one), again(&two)]]
            .map(|[one, two]| Activations { fixed: (2 * one - two).max(0), clip: two - one }))
    }

    /// Both at a time.
    pub(super) fn and(self, other: Activations) -> Activations {
        Activations { fixed: self.fixed + other.fixed, clip: self.clip + other.clip }
    }

    /// Whichever is more for a batch of one, one after the other.
    pub(super) fn or(self, other: Activations) -> Activations {
        if self.bytes(1) >= other.bytes(1) { self } else { other }
    }
}
