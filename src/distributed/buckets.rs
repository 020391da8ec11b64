//! Which gradients go out together.

/// The most bytes of gradients that go out together, as they travel. A bucket holds whole gradients: one that is larger has
/// a bucket of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketSizes {
    /// Of the bucket that is complete first, at the beginning of the backward pass.
    pub first: i64,
    /// Of those between the first and the last.
    pub others: i64,
    /// Of the bucket that is complete when the backward pass is over, whose sum nothing hides; 0 for one like the others.
    pub last: i64,
}

impl BucketSizes {
    /// What suits Gloo: small enough to begin early, large enough to be worth a call.
    pub const GLOO: BucketSizes = BucketSizes::of(25 << 20);

    /// What suits NCCL, whose rate over NVLink still grows with messages of more than 25 MiB: those who maintain PyTorch's
    /// DistributedDataParallel call 25 MiB too small and 100 MiB safe (pytorch/pytorch#118421). As there, the last one is
    /// small.
    pub const NCCL: BucketSizes = BucketSizes { first: 25 << 20, others: 100 << 20, last: 4 << 20 };

    /// All of one size.
    pub const fn of(bytes: i64) -> Self {
        BucketSizes { first: bytes, others: bytes, last: 0 }
    }

    /// How many gradients each bucket holds, of gradients of these sizes. They are counted from the last one to the first, as
    /// a backward pass comes to them.
    pub fn counts(self, bytes: &[i64]) -> Vec<usize> {
        let mut sum = 0;
        let fits = |size: &&i64| {
            sum += **size;
            sum <= self.last
        };
        let last = bytes.iter().take_while(fits).count();
        let (mut counts, mut held): (Vec<usize>, i64) = (Vec::new(), 0);
        for size in bytes[last..].iter().rev() {
            let most = if counts.len() == 1 { self.first } else { self.others };
            match counts.last_mut() {
                Some(count) if held + size <= most => {
                    *count += 1;
                    held += size;
                }
                _ => {
                    counts.push(1);
                    held = *size;
                }
            }
        }
        if last > 0 {
            counts.push(last);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::random::{Purpose, stream};

    /// The first and the last bucket are small, those between them large, and what is larger than a bucket has its own.
    #[test]
    fn the_first_and_the_last_bucket_are_small() {
        let sizes = BucketSizes { first: 3, others: 8, last: 2 };
        assert_eq!(sizes.counts(&[1, 1, 1, 2, 3, 3, 9, 5, 3, 1, 2]), [2, 2, 1, 3, 1, 2]);
        assert_eq!(sizes.counts(&[3, 1, 1]), [2, 1], "the last gradient is larger than its bucket");
        assert_eq!(sizes.counts(&[1, 1]), [2]);
        assert!(sizes.counts(&[]).is_empty());
        // all of one size, in the order of the backward pass
        assert_eq!(BucketSizes::of(4).counts(&[1, 1, 2, 2, 3, 9, 4]), [1, 1, 1, 2, 2]);
    }

    /// Each gradient is in one bucket, no bucket of several is larger than it may be, and none could have taken in the next.
    #[test]
    fn buckets_are_full_and_not_too_large() {
        for list in 0..200 {
            let mut random = stream(1, Purpose::Evaluation, list, 0);
            let bytes: Vec<i64> = (0..random.random_range(1..60)).map(|_| random.random_range(1..50)).collect();
            let sizes = BucketSizes { first: 20, others: 80, last: random.random_range(0..30) };
            let counts = sizes.counts(&bytes);
            assert_eq!(counts.iter().sum::<usize>(), bytes.len());
            let (mut rest, mut sums) = (&bytes[..], Vec::new());
            for count in &counts {
                let (before, members) = rest.split_at(rest.len() - count);
                sums.push((members.iter().sum::<i64>(), before.last().copied().unwrap_or(0)));
                rest = before;
            }
            let fits_last = bytes[0] <= sizes.last;
            for (i, &(sum, next)) in sums.iter().enumerate() {
                let is_last = i + 1 == sums.len();
                let most = match i {
                    _ if is_last && fits_last => sizes.last,
                    0 => sizes.first,
                    _ => sizes.others,
                };
                assert!(counts[i] == 1 || sum <= most, "{bytes:?} {sizes:?}: {sums:?}");
                let before_last = fits_last && i + 2 == sums.len();
                assert!(is_last || before_last || sum + next > most, "{bytes:?} {sizes:?}: {sums:?}");
            }
        }
    }
}
