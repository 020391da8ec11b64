//! Which rank steps which parameters of a network: ZeRO stage 1 (Rajbhandari et al. 2020).

use anyhow::Result;
use tch::{Device, Kind, Tensor, no_grad};

use super::Ranks;
use crate::torch::Readback;

/// Bytes of what goes to all ranks at once, where a single parameter is not larger: what it takes beside the parameters.
const PIECE: i64 = 64 << 20;

/// The rank that owns each of these parameters: whole ones, so that the ranks' shares differ by no more than the largest
/// parameter. The largest go first, each to the rank that has least so far.
pub fn owners(sizes: &[i64], ranks: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(sizes[i])); // stable: of one size in their order
    let (mut held, mut owners) = (vec![0i64; ranks], vec![0; sizes.len()]);
    for i in order {
        let rank = (0..ranks).min_by_key(|&rank| held[rank]).expect("there is a rank");
        held[rank] += sizes[i];
        owners[i] = rank;
    }
    owners
}

/// The parameters of a network, shared out: each has an owner, the one rank that holds its optimizer's state and moves it.
pub struct Shards {
    ranks: Ranks,
    names: Vec<String>,
    shapes: Vec<Vec<i64>>,
    owners: Vec<usize>,
    pieces: Vec<Piece>,
    /// Where a piece is put together, and arrives.
    staging: Tensor,
}

/// Parameters of one owner that go to all ranks at once.
struct Piece {
    owner: usize,
    length: i64,
    members: Vec<usize>,
}

impl Shards {
    /// Of named parameters, shared out over these ranks. A process that works alone owns all.
    ///
    /// # Panics
    /// For parameters of several types.
    pub fn new(ranks: &Ranks, parameters: &[(String, Tensor)]) -> Self {
        Self::in_pieces_of(PIECE, ranks, parameters)
    }

    /// As [`Self::new`], with pieces of so many bytes.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn in_pieces_of(bytes: i64, ranks: &Ranks, parameters: &[(String, Tensor)]) -> Self {
        let (kind, device) = parameters.first().map_or((Kind::Float, Device::Cpu), |(_, p)| (p.kind(), p.device()));
        assert!(parameters.iter().all(|(_, p)| p.kind() == kind), "parameters of several types");
        let sizes: Vec<i64> = parameters.iter().map(|(_, p)| p.numel() as i64).collect();
        let owners = owners(&sizes, ranks.size());
        let most = bytes / kind.elt_size_in_bytes() as i64;
        let mut pieces: Vec<Piece> = Vec::new();
        for owner in 0..if ranks.size() > 1 { ranks.size() } else { 0 } {
            for i in (0..sizes.len()).filter(|&i| owners[i] == owner) {
                match pieces.last_mut() {
                    Some(piece) if piece.owner == owner && piece.length + sizes[i] <= most => {
                        piece.length += sizes[i];
                        piece.members.push(i);
                    }
                    _ => pieces.push(Piece { owner, length: sizes[i], members: vec![i] }),
                }
            }
        }
        let longest = pieces.iter().map(|piece| piece.length).max().unwrap_or(0);
        Shards {
            ranks: ranks.clone(),
            names: parameters.iter().map(|(name, _)| name.clone()).collect(),
            shapes: parameters.iter().map(|(_, p)| p.size()).collect(),
            owners,
            pieces,
            staging: Tensor::zeros([longest], (kind, device)),
        }
    }

    /// The numbers of the parameters that this rank owns.
    pub fn own(&self) -> impl Iterator<Item = usize> {
        (0..self.owners.len()).filter(|&i| self.owners[i] == self.ranks.rank())
    }

    /// Of one tensor for each parameter those of the parameters that this rank owns.
    pub fn share(&self, all: &[Tensor]) -> Vec<Tensor> {
        self.own().map(|i| all[i].shallow_clone()).collect()
    }

    /// Each parameter becomes what its owner has. A GPU's are queued, not waited for.
    ///
    /// # Errors
    /// A rank that is gone or late.
    pub fn spread(&self, parameters: &[Tensor]) -> Result<()> {
        self.exchange(
            |i| parameters[i].shallow_clone(),
            |piece, flat| {
                self.parts(piece, flat).for_each(|(i, value)| parameters[i].shallow_clone().copy_(&value));
                Ok(())
            },
        )
    }

    /// One tensor for each parameter, by name and in order, on rank 0, of which each rank gives those of the parameters that
    /// it owns. The other ranks, which must call it too, get their own. What comes from others is on the host.
    ///
    /// # Errors
    /// As [`Self::spread`].
    pub fn gather(&self, own: &[Tensor]) -> Result<Vec<(String, Tensor)>> {
        let mut all: Vec<Option<Tensor>> = self.names.iter().map(|_| None).collect();
        self.own().zip(own).for_each(|(i, own)| all[i] = Some(own.shallow_clone()));
        let mine: Vec<Option<Tensor>> = all.iter().map(|own| own.as_ref().map(Tensor::shallow_clone)).collect();
        self.exchange(
            |i| mine[i].as_ref().expect("it is this rank's own").shallow_clone(),
            |piece, flat| {
                if self.ranks.is_first() {
                    self.ranks.settle()?;
                    let there = Readback::of(flat)?.wait()?.copy();
                    self.parts(piece, &there).for_each(|(i, value)| all[i] = Some(value));
                }
                Ok(())
            },
        )?;
        let named = self.names.iter().zip(all);
        Ok(named.filter_map(|(name, tensor)| Some((name.clone(), tensor?))).collect())
    }

    /// Hands to all ranks what the owners have, `own(i)` for the i-th parameter: the pieces of other ranks go to `take`.
    fn exchange(
        &self,
        own: impl Fn(usize) -> Tensor,
        mut take: impl FnMut(&Piece, &Tensor) -> Result<()>,
    ) -> Result<()> {
        no_grad(|| {
            for piece in &self.pieces {
                let mut flat = self.staging.narrow(0, 0, piece.length);
                let is_own = piece.owner == self.ranks.rank();
                if is_own {
                    self.parts(piece, &flat).for_each(|(i, mut place)| place.copy_(&own(i)));
                }
                self.ranks.broadcast(&mut flat, piece.owner)?;
                if !is_own {
                    take(piece, &flat)?;
                }
            }
            Ok(())
        })
    }

    /// The places of a piece's parameters in it.
    fn parts(&self, piece: &Piece, flat: &Tensor) -> impl Iterator<Item = (usize, Tensor)> {
        let mut at = 0;
        piece.members.iter().map(move |&i| {
            let shape = &self.shapes[i];
            let length = shape.iter().product();
            let part = flat.narrow(0, at, length).view(&shape[..]);
            at += length;
            (i, part)
        })
    }
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::random::{Purpose, stream};

    /// Each parameter has one owner, the same whenever it is asked for, and the ranks' shares differ by no more than the largest
    /// parameter.
    #[test]
    fn shares_are_balanced() {
        assert_eq!(owners(&[5, 1, 4, 2, 2], 2), [0, 1, 1, 1, 0]);
        assert_eq!(owners(&[3, 3, 3], 5), [0, 1, 2]);
        assert!(owners(&[], 3).is_empty());
        assert_eq!(owners(&[7, 0, 7], 1), [0, 0, 0]);
        for list in 0..500 {
            let mut random = stream(2, Purpose::Evaluation, list, 0);
            let ranks = random.random_range(1..17);
            // a few large ones among many small ones, as in networks
            let size = |large: bool| if large { 1000..100_000 } else { 1..500 };
            let sizes: Vec<i64> = (0..random.random_range(0..200))
                .map(|_| {
                    let range = size(random.random_range(0..4) == 0);
                    random.random_range(range)
                })
                .collect();
            let owned = owners(&sizes, ranks);
            assert_eq!(owned.len(), sizes.len());
            assert_eq!(owned, owners(&sizes, ranks));
            let mut held = vec![0; ranks];
            owned.iter().zip(&sizes).for_each(|(&rank, size)| held[rank] += size);
            let (least, most) = (held.iter().min().unwrap(), held.iter().max().unwrap());
            assert!(most - least <= sizes.iter().copied().max().unwrap_or(0), "{sizes:?} over {ranks}: {held:?}");
        }
    }

    /// A process that works alone owns all, and exchanges nothing.
    #[test]
    fn alone_it_owns_all() {
        let named: Vec<(String, Tensor)> =
            ["a", "b"].map(|name| (name.to_string(), Tensor::from_slice(&[1.0f32, 2.0]))).into();
        let shards = Shards::new(&Ranks::alone(), &named);
        let all: Vec<Tensor> = named.into_iter().map(|(_, tensor)| tensor).collect();
        assert_eq!((shards.own().collect::<Vec<_>>(), shards.staging.numel()), (vec![0, 1], 0));
        shards.spread(&all).unwrap();
        let gathered = shards.gather(&shards.share(&all)).unwrap();
        assert_eq!(gathered.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        assert!(gathered.iter().zip(&all).all(|((_, found), tensor)| found.data_ptr() == tensor.data_ptr()));
    }
}
