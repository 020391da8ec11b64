//! The transformer of TATS over the codes of a clip (Ge et al. 2022, arXiv 2204.03638, section 3.2): a GPT with its layer norms
//! in front, and the mask of its interpolation model (section 3.3).

use std::{
    cell::Cell,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor, no_grad};

use crate::{
    nn::{Init, LayerNorm, Linear, Scope, attention, causal_attention, full_precision, linear_flops, masked_attention},
    torch::{recompute, upload},
};

/// What the transformer looks like. The default is the released one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GptConfig {
    /// Blocks.
    pub layers: i64,
    /// Heads of each attention.
    pub heads: i64,
    /// Width of a token.
    pub width: i64,
    /// Activations inside the blocks are computed again in the backward pass: less memory in training for more time.
    pub recompute: bool,
}

impl Default for GptConfig {
    fn default() -> Self {
        GptConfig { layers: 24, heads: 16, width: 1024, recompute: false }
    }
}

impl GptConfig {
    /// # Errors
    /// Names the number that does not fit, and the rule.
    pub fn validate(&self) -> Result<()> {
        let Self { layers, heads, width, .. } = *self;
        ensure!((1..=1000).contains(&layers), "layers must be from 1 to 1000, not {layers}");
        ensure!((1..=1 << 16).contains(&width), "width must be from 1 to 65536, not {width}");
        ensure!(heads > 0 && width % heads == 0, "a width of {width} does not divide into {heads} heads");
        Ok(())
    }

    /// Floating-point operations of a forward pass over one sequence, counted as everywhere: a masked score as any other.
    pub fn flops(&self, sequences: Sequences) -> i64 {
        let (tokens, width) = (sequences.length, self.width);
        let maps = linear_flops(tokens, width, 12 * width);
        let attended = 2 * linear_flops(tokens, width, tokens);
        self.layers * (maps + attended) + linear_flops(tokens, width, sequences.vocabulary)
    }
}

/// What enters and leaves a transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequences {
    /// How many tokens there are to choose from.
    pub vocabulary: i64,
    /// Tokens of a sequence, L.
    pub length: i64,
    /// Of a model that fills gaps the tokens of a latent frame, whose first and last frame of a sequence all others see;
    /// 0 of one that goes on from left to right.
    pub unmasked: i64,
}

/// Which tokens a token sees among those that are fed with it. It sees all that were fed before.
pub enum Sees {
    /// Itself and those before it.
    Before,
    /// All.
    All,
    /// Where this is true, `[queries, keys]` bool.
    Mask(Tensor),
}

impl Sees {
    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor, heads: i64) -> Tensor {
        match self {
            Sees::Before if q.size()[1] > 1 => causal_attention(q, k, v, heads),
            Sees::Before | Sees::All => attention(q, k, v, heads),
            Sees::Mask(mask) => masked_attention(q, k, v, heads, mask),
        }
    }
}

/// The interpolation model's mask `[L, L]`, true where the token of a row sees that of a column: everyone sees the start token
/// with the first latent frame, and all of the last that is among the inputs; the rest is seen from behind only, and by none of
/// the last frame.
fn interpolation_mask(length: i64, frame: i64) -> Tensor {
    let mask = Tensor::ones([length, length], (Kind::Bool, Device::Cpu)).tril(0);
    let (first, last) = (frame + 1, frame - 1);
    let _ = mask.narrow(1, 0, first).fill_(1);
    let _ = mask.narrow(1, length - last, last).fill_(1);
    let _ = mask.narrow(0, length - last, last).narrow(1, first, length - last - first).fill_(0);
    mask
}

/// Keys and values of the tokens that a transformer was fed so far, so that each is computed once.
pub struct Cache {
    /// Of each block `[B, L, width]`, of which the first `length` are filled.
    blocks: Vec<Option<[Tensor; 2]>>,
    length: i64,
}

/// Attention and MLP, each behind its norm and beside its residual.
struct Block {
    ln1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    proj: Linear,
    ln2: LayerNorm,
    mlp: [Linear; 2],
    heads: i64,
}

/// How weights of linear maps and embeddings start; biases start at zero.
const SMALL: Init = Init::Normal(0.0, 0.02);

impl Block {
    fn new(scope: &Scope, config: &GptConfig) -> Self {
        let width = config.width;
        let linear =
            |scope: &Scope, inputs, outputs| Linear::of_kernel(scope, &[outputs, inputs], [SMALL, Init::ZEROS]);
        let (attn, mlp) = (scope.sub("attn"), scope.sub("mlp"));
        let of_attention = |name: &str| linear(&attn.sub(name), width, width);
        Block {
            ln1: LayerNorm::new(&scope.sub("ln1"), width),
            ln2: LayerNorm::new(&scope.sub("ln2"), width),
            key: of_attention("key"),
            query: of_attention("query"),
            value: of_attention("value"),
            proj: of_attention("proj"),
            mlp: [linear(&mlp.sub(0), width, 4 * width), linear(&mlp.sub(2), 4 * width, width)],
            heads: config.heads,
        }
    }

    /// x `[B, n, D]` → the same shape. `kept` puts the new keys and values behind those that are there, and gives all.
    fn forward(&self, x: &Tensor, sees: &Sees, kept: &mut dyn FnMut([Tensor; 2]) -> [Tensor; 2]) -> Tensor {
        let h = self.ln1.forward(x);
        let [k, v] = kept([self.key.forward(&h), self.value.forward(&h)]);
        let x = x + self.proj.forward(&sees.attend(&self.query.forward(&h), &k, &v, self.heads));
        let [first, last] = &self.mlp;
        &x + last.forward(&first.forward(&self.ln2.forward(&x)).gelu("none"))
    }
}

/// The transformer: tokens → logits of the token that follows each.
pub struct Gpt {
    tok_emb: Tensor,
    pos_emb: Tensor,
    // where activations are computed again, a GPU's backward pass does it in a thread of its own
    blocks: Vec<Arc<Mutex<Block>>>,
    ln_f: LayerNorm,
    head: Linear,
    /// `[L, L]`; none of a causal transformer.
    mask: Option<Tensor>,
    recompute: bool,
    sequences: Sequences,
    fed: Cell<i64>,
}

impl Gpt {
    /// Declares the parameters under `scope`, with the released names.
    pub fn new(scope: &Scope, config: &GptConfig, sequences: Sequences) -> Self {
        let Sequences { vocabulary, length, unmasked } = sequences;
        let width = config.width;
        let blocks = scope.sub("blocks");
        Gpt {
            tok_emb: scope.sub("tok_emb").parameter("weight", &[vocabulary, width], SMALL),
            pos_emb: scope.parameter("pos_emb", &[1, length, width], Init::ZEROS),
            blocks: (0..config.layers).map(|i| Arc::new(Mutex::new(Block::new(&blocks.sub(i), config)))).collect(),
            ln_f: LayerNorm::new(&scope.sub("ln_f"), width),
            head: Linear::with_init(&scope.sub("head"), width, vocabulary, SMALL, false),
            mask: (unmasked > 0).then(|| upload(&interpolation_mask(length, unmasked), scope.device())),
            recompute: config.recompute,
            sequences,
            fed: Cell::new(0),
        }
    }

    /// Whether AdamW's weight decay acts on the parameter of this name: the weights of linear maps alone.
    pub fn decays(name: &str) -> bool {
        let of_map = [".attn.", ".mlp."].iter().any(|part| name.contains(part)) || name.starts_with("head.");
        of_map && name.ends_with(".weight")
    }

    /// What it was made for.
    pub fn sequences(&self) -> Sequences {
        self.sequences
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.tok_emb.device()
    }

    /// How many tokens it was fed since it was made ([`Self::feed`]): the work of sampling.
    pub fn fed(&self) -> i64 {
        self.fed.get()
    }

    /// Tokens `[B, T]` from the first position on → logits `[B, T, V]`, never in half precision, of the token that follows
    /// each. T is at most L.
    pub fn forward(&self, tokens: &Tensor) -> Tensor {
        let length = tokens.size()[1];
        let mut x = self.embed(tokens, &[(0, length)]);
        for block in &self.blocks {
            let sees = self.prompt_mask(length);
            // after a panic in one of them the others, and it, are as they were: a forward pass changes nothing
            let run = move |block: &Mutex<Block>, x: &Tensor| {
                block.lock().unwrap_or_else(PoisonError::into_inner).forward(x, &sees, &mut |new| new)
            };
            x = if self.recompute {
                let block = Arc::clone(block);
                recompute(&[&x], move |inputs| run(&block, &inputs[0]))
            } else {
                run(block, &x)
            };
        }
        full_precision(&self.head.forward(&self.ln_f.forward(&x)))
    }

    /// What the first tokens of a training sequence see of each other.
    pub fn prompt_mask(&self, length: i64) -> Sees {
        self.mask.as_ref().map_or(Sees::Before, |mask| Sees::Mask(mask.narrow(0, 0, length).narrow(1, 0, length)))
    }

    /// An empty cache.
    pub fn cache(&self) -> Cache {
        Cache { blocks: self.blocks.iter().map(|_| None).collect(), length: 0 }
    }

    /// Feeds tokens `[B, n]`, which stand at these positions, stretches (first, count), and see each other as `sees` says, and gives the logits
    /// `[B, V]`, never in half precision, that follow the one of number `row` among them. No gradients.
    ///
    /// # Panics
    /// With more tokens than there are positions.
    pub fn feed(&self, tokens: &Tensor, positions: &[(i64, i64)], sees: &Sees, row: i64, cache: &mut Cache) -> Tensor {
        let (b, n) = tokens.size2().expect("tokens [B, n]");
        let (before, most) = (cache.length, self.sequences.length);
        assert!(before + n <= most, "{} tokens, and this transformer has {most} positions", before + n);
        self.fed.set(self.fed.get() + n);
        no_grad(|| {
            let mut x = self.embed(tokens, positions);
            for (block, kept) in self.blocks.iter().zip(&mut cache.blocks) {
                let block = block.lock().unwrap_or_else(PoisonError::into_inner);
                x = block.forward(&x, sees, &mut |new| {
                    let all = kept.get_or_insert_with(|| {
                        new.each_ref().map(|new| Tensor::zeros([b, most, new.size()[2]], (new.kind(), new.device())))
                    });
                    let filled = |(all, new): (&Tensor, &Tensor)| {
                        all.narrow(1, before, n).copy_(new);
                        all.narrow(1, 0, before + n)
                    };
                    [filled((&all[0], &new[0])), filled((&all[1], &new[1]))]
                });
            }
            cache.length += n;
            full_precision(&self.head.forward(&self.ln_f.forward(&x.select(1, row))))
        })
    }

    /// `[B, n, D]`
    fn embed(&self, tokens: &Tensor, positions: &[(i64, i64)]) -> Tensor {
        let rows: Vec<Tensor> = positions.iter().map(|&(first, count)| self.pos_emb.narrow(1, first, count)).collect();
        Tensor::embedding(&self.tok_emb, tokens, -1, false, false) + Tensor::cat(&rows, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Parameters;

    /// Of 5 latent frames of 2 tokens: who sees whom, by hand.
    #[test]
    fn the_mask_opens_both_ends() {
        let rows: Vec<Vec<i64>> = (0..10)
            .map(|row| Vec::<i64>::try_from(interpolation_mask(10, 2).get(row).to_kind(Kind::Int64)).unwrap())
            .collect();
        // columns: the start token and the first frame; the middle; the last frame without its last token
        let seen = |middle: usize| [vec![1; 3 + middle], vec![0; 6 - middle], vec![1]].concat();
        for (row, found) in rows.iter().enumerate() {
            let middle = if (3..9).contains(&row) { row - 2 } else { 0 };
            assert_eq!(*found, seen(middle), "row {row}");
        }
    }

    /// The released sizes, and which of the parameters decay: those of linear maps, whose biases do not.
    #[test]
    fn the_released_transformer_has_its_parameters() {
        for (classes, length, count) in [(0, 1024, 336_914_432), (101, 1024, 337_121_280), (0, 1280, 337_176_576)] {
            let parameters = Parameters::unfilled(Device::Cpu);
            let sequences = Sequences { vocabulary: 16_384 + classes, length, unmasked: 0 };
            Gpt::new(&parameters.root(), &GptConfig::default(), sequences);
            assert_eq!(parameters.count(), count);
            let decayed: i64 = parameters
                .named()
                .iter()
                .filter(|(name, _)| Gpt::decays(name))
                .map(|(_, tensor)| tensor.numel() as i64)
                .sum();
            assert_eq!(decayed, 24 * 12 * 1024 * 1024 + (16_384 + classes) * 1024);
            // each token goes through each map once, and each sees all in both products of attention
            let attended = 24 * 2 * 2 * length * length * 1024;
            assert_eq!(GptConfig::default().flops(sequences), 2 * length * decayed + attended);
        }
    }
}
