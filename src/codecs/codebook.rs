//! A codebook that follows the vectors that choose its entries (van den Oord et al. 2017, arXiv 1711.00937, appendix A.1).

use std::cell::{Cell, RefCell};

use anyhow::{Result, ensure};
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor, no_grad};

use super::Encoded;
use crate::{
    distributed::Ranks,
    nn::{Init, Scope, full_precision},
    random::{Purpose, normal, stream},
    torch::{Autocast, upload},
};

/// The default is TATS' setting.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CodebookConfig {
    /// Entries of the codebook (K).
    pub codes: i64,
    /// How much of its averages the codebook keeps in a step.
    pub decay: f64,
    /// Weight of the commitment, the mean square of what separates the encoder's output from the entries it chooses.
    pub commitment: f64,
    /// After each step, entries that fewer than one vector a step chooses on average take a random vector of the batch. The
    /// released models were trained without.
    pub restart: bool,
}

impl Default for CodebookConfig {
    fn default() -> Self {
        CodebookConfig { codes: 16_384, decay: 0.99, commitment: 0.25, restart: false }
    }
}

impl CodebookConfig {
    /// # Errors
    /// Names the key and what it may be.
    pub fn validate(&self) -> Result<()> {
        let CodebookConfig { codes, decay, commitment, .. } = *self;
        ensure!(codes >= 2, "codes must be at least 2, not {codes}");
        ensure!((0.0..1.0).contains(&decay), "decay lies in [0, 1), not at {decay}");
        ensure!(commitment.is_finite() && commitment >= 0.0, "commitment is a weight of 0 or more, not {commitment}");
        Ok(())
    }
}

/// Vectors that are compared with the codebook at a time: a distance to each of its entries is kept of so many.
const AT_ONCE: i64 = 4096;

/// K vectors e_k, their average counts N_k, and the averages of the sums of the vectors that chose them.
pub struct Codebook {
    config: CodebookConfig,
    embeddings: Tensor,
    counts: Tensor,
    sums: Tensor,
    ranks: Ranks,
    seed: u64,
    /// Whether it may still wait for its first batch: until these steps are over, its counts are looked at, on the device.
    may_be_new: Cell<bool>,
    gathered: RefCell<Option<Gathered>>,
}

/// What the passes of a step bring.
struct Gathered {
    /// `[K, d + 1]`: for each entry the sum of the vectors that chose it, and their number.
    totals: Tensor,
    /// The vectors of the last pass, `[rows, d]`.
    rows: Tensor,
}

impl Codebook {
    /// Added to each average count, so that no entry is divided by zero.
    pub const EPS: f64 = 1e-7;
    /// Steps after which a training has either had a first batch or been given up.
    const FIRST_STEPS: i64 = 100;

    /// Entries `[K, d]` that start as N(0, 1), until the first batch of a training takes their place.
    pub fn new(scope: &Scope, width: i64, config: &CodebookConfig) -> Self {
        let entries = [config.codes, width];
        Codebook {
            config: *config,
            embeddings: scope.buffer("embeddings", &entries, Init::Normal(0.0, 1.0)),
            counts: scope.buffer("N", &entries[..1], Init::ZEROS),
            sums: scope.buffer("z_avg", &entries, Init::ZEROS),
            ranks: Ranks::alone(),
            seed: 0,
            may_be_new: Cell::new(false),
            gathered: RefCell::default(),
        }
    }

    /// From now on it learns from the batches of all ranks together, which must be equally large. A codebook that has learnt
    /// nothing yet starts from the vectors of the first batch.
    pub fn begin_training(&mut self, ranks: &Ranks, seed: u64) {
        (self.ranks, self.seed) = (ranks.clone(), seed);
        self.may_be_new.set(true);
    }

    /// z `[B, d, F, h, w]` → the nearest entries. The gradient by these is that by z, and none reaches the codebook. What it
    /// `learns` of z takes effect in [`update`](Self::update).
    pub fn quantize(&self, z: &Tensor, learns: bool) -> Encoded {
        let z = full_precision(z);
        let (b, d, f, h, w) = z.size5().expect("vectors [B, d, F, h, w]");
        let (indices, nearest) = no_grad(|| {
            let _precision = Autocast::bfloat16(z.device(), false);
            let rows = z.detach().permute([0, 2, 3, 4, 1]).reshape([-1, d]); // [B·F·h·w, d]
            if learns && self.may_be_new.get() {
                self.start(&rows);
            }
            let codes = self.nearest(&rows);
            if learns {
                self.gather(&codes, rows);
            }
            let indices = codes.view([b, f, h, w]);
            let nearest = self.vectors(&indices);
            (indices, nearest)
        });
        let from_entries = (&z - &nearest).square().flatten(1, -1);
        let commitment = from_entries.mean_dim([1i64].as_slice(), false, None) * self.config.commitment;
        let z = if z.requires_grad() { &z + (nearest - &z).detach() } else { nearest };
        Encoded::Codes { indices, z, commitment }
    }

    /// The entries of numbers `[B, F, h, w]` as vectors `[B, d, F, h, w]`.
    pub fn vectors(&self, indices: &Tensor) -> Tensor {
        let rows = self.embeddings.index_select(0, &indices.flatten(0, -1));
        let (b, f, h, w) = indices.size4().expect("codes [B, F, h, w]");
        rows.view([b, f, h, w, -1]).permute([0, 4, 1, 2, 3]).contiguous()
    }

    /// The number of the entry that is nearest to each of `[rows, d]`; of equally near ones the first.
    fn nearest(&self, rows: &Tensor) -> Tensor {
        let sum_of_squares = |x: &Tensor, keep| x.square().sum_dim_intlist([1i64].as_slice(), keep, None);
        let of_entries = sum_of_squares(&self.embeddings, false); // [K]
        let of = |rows: &Tensor| {
            let distance = sum_of_squares(rows, true) - rows.matmul(&self.embeddings.tr()) * 2.0 + &of_entries;
            distance.argmin(1, false) // of [rows, K]
        };
        Tensor::cat(&rows.split(AT_ONCE, 0).iter().map(of).collect::<Vec<_>>(), 0)
    }

    fn gather(&self, codes: &Tensor, rows: Tensor) {
        let ones = rows.narrow(1, 0, 1).ones_like();
        let mut gathered = self.gathered.borrow_mut();
        let totals = match gathered.take() {
            Some(before) => before.totals,
            None => {
                let d = rows.size()[1];
                Tensor::zeros([self.config.codes, d + 1], (rows.kind(), rows.device()))
            }
        };
        let totals = totals.index_add(0, codes, &Tensor::cat(&[&rows, &ones], 1));
        *gathered = Some(Gathered { totals, rows });
    }

    /// Takes in what was gathered since the last update, over all ranks:
    /// N ← γN + (1 − γ)n, z̄ ← γz̄ + (1 − γ)s, e_k = z̄_k / N_k, where N_k is kept from zero.
    pub fn update(&self, step: i64) {
        let Some(Gathered { totals, rows }) = self.gathered.take() else { return };
        no_grad(|| {
            let totals = self.ranks.sum_with_gradient(&totals);
            let d = totals.size()[1] - 1;
            let follow = |average: &Tensor, now: &Tensor| {
                let _ = average.shallow_clone().lerp_(now, 1.0 - self.config.decay);
            };
            follow(&self.sums, &totals.narrow(1, 0, d));
            follow(&self.counts, &totals.select(1, d));
            let n = self.counts.sum(None);
            let weight = (&self.counts + Self::EPS) / (&n + self.config.codes as f64 * Self::EPS) * &n;
            let mut entries = &self.sums / weight.unsqueeze(1);
            if self.config.restart {
                let is_dead = self.counts.less(1.0).unsqueeze(1); // [K, 1]
                entries = self.rows_of_all(&rows, step + 1).where_self(&is_dead, &entries);
            }
            self.embeddings.shallow_clone().copy_(&entries);
        });
        if step >= Self::FIRST_STEPS {
            self.may_be_new.set(false);
        }
    }

    /// A codebook that has learnt nothing becomes a random choice of a batch's vectors; another stays. Where the step is left
    /// out, the trainer takes the codebook back to nothing, and the next batch is the first.
    fn start(&self, rows: &Tensor) {
        let is_new = self.counts.sum(None).eq(0.0);
        let entries = self.rows_of_all(rows, 0);
        let begin = |own: &Tensor, first: &Tensor| own.shallow_clone().copy_(&first.where_self(&is_new, own));
        begin(&self.embeddings, &entries);
        begin(&self.sums, &entries);
        begin(&self.counts, &self.counts.ones_like());
    }

    /// K of the vectors of all ranks, `[K, d]`, chosen at random. Where there are fewer, each is taken several times, and noise
    /// tells them apart.
    fn rows_of_all(&self, rows: &Tensor, key: i64) -> Tensor {
        let (own, d) = rows.size2().expect("[rows, d]");
        let (all, wanted) = (own * self.ranks.size() as i64, self.config.codes);
        let tiles = (wanted + all - 1) / all;
        let mut order: Vec<i64> = (0..all * tiles).collect();
        order.shuffle(&mut stream(self.seed, Purpose::Codebook, key as u64, 0));
        let chosen = Tensor::from_slice(&order[..wanted as usize]).remainder(all) - own * self.ranks.rank() as i64;
        let is_own = chosen.ge(0).logical_and(&chosen.less(own)).to_kind(rows.kind()).unsqueeze(1);
        let [chosen, is_own] = [chosen.clamp(0, own - 1), is_own].map(|t| upload(&t, rows.device()));
        let chosen = self.ranks.sum_with_gradient(&(rows.index_select(0, &chosen) * is_own));
        if tiles == 1 {
            return chosen;
        }
        let noise = normal(self.seed, Purpose::Codebook, key as u64, 1, &[wanted, d]) * (0.01 / (d as f64).sqrt());
        chosen + upload(&noise.to_kind(rows.kind()), rows.device())
    }

    /// How many entries numbers `[…]` use, those of all ranks together: exp of the entropy of their frequencies, a scalar. It
    /// is K where all are chosen alike.
    pub fn perplexity(&self, indices: &Tensor) -> Tensor {
        let indices = indices.flatten(0, -1);
        let none = Tensor::zeros([self.config.codes], (Kind::Float, indices.device()));
        let counts =
            self.ranks.sum_with_gradient(&none.index_add(0, &indices, &indices.ones_like().to_kind(Kind::Float)));
        let p = &counts / counts.sum(None);
        (-(&p * (&p + 1e-10).log()).sum(None)).exp()
    }

    /// How many entries fewer than one vector a step chooses on average, a scalar: those that `restart` would replace.
    pub fn dead(&self) -> Tensor {
        self.counts.less(1.0).to_kind(Kind::Float).sum(None)
    }
}
