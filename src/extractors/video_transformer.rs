//! The encoder that VideoMAE and V-JEPA have in common: a vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)
//! whose tokens are tubes of a few frames and a square of pixels.
//!
//! Its architecture is read out of the shapes of a weight file, so that every published size is one code and one setting.

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::{
    nn::{Init, Scope, attention},
    torch::upload,
    weights::TensorShapes,
};

/// Videos are resized to this height and width, which the released encoders were trained at.
pub const SIDE: i64 = 224;

/// Frames of the clips that the released encoders were trained on.
pub const FRAMES: i64 = 16;

/// Frames that go through the network at once, which bounds its memory.
const FRAMES_AT_ONCE: i64 = 64;

/// Of all layer norms.
const EPSILON: f64 = 1e-6;

/// Where attention's queries, keys and values have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Biases {
    /// One for all three, `attn.qkv.bias` (V-JEPA).
    Joint,
    /// Queries and values have one each, `attn.q_bias` and `attn.v_bias`; keys have none (VideoMAE).
    QueriesAndValues,
}

/// The sizes of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// Numbers in a token.
    pub width: i64,
    /// Blocks.
    pub depth: i64,
    /// Numbers inside the two layers of a block's MLP.
    pub hidden: i64,
    /// Frames of a token.
    pub tube: i64,
    /// Height and width of a token.
    pub patch: i64,
    /// Of attention.
    pub biases: Biases,
}

impl Architecture {
    /// Of a file's tensors, by their names and shapes.
    ///
    /// # Errors
    /// They belong to another kind of network, or to one that cannot take [`FRAMES`] frames of [`SIDE`]².
    pub fn from_shapes(shapes: &TensorShapes, biases: Biases) -> Result<Self> {
        let shape = |name: &str| shapes.get(name).with_context(|| format!("it has no tensor `{name}`"));
        let patches = shape("patch_embed.proj.weight")?;
        let [width, 3, tube, patch, square] = patches[..] else {
            anyhow::bail!("`patch_embed.proj.weight` has shape {patches:?} and not [width, 3, frames, height, width]")
        };
        let hidden = shape("blocks.0.mlp.fc1.weight")?[0];
        let depth = (0..).take_while(|i| shapes.contains_key(&format!("blocks.{i}.norm1.weight"))).count() as i64;
        ensure!(
            patch == square && patch > 0 && SIDE % patch == 0 && tube > 0 && FRAMES % tube == 0,
            "its tokens are {tube} frames of {patch}×{square}, which do not divide {FRAMES} frames of {SIDE}×{SIDE}"
        );
        let architecture = Architecture { width, depth, hidden, tube, patch, biases };
        let heads = architecture.heads();
        ensure!(heads > 0 && width % (4 * heads) == 0, "its tokens are {width} wide, which no published encoder's are");
        Ok(architecture)
    }

    /// Heads of attention, which no shape tells: 16 in all published encoders of width 1024 and more, and 64 numbers a
    /// head in those below.
    pub fn heads(&self) -> i64 {
        if self.width >= 1024 { 16 } else { self.width / 64 }
    }

    /// Tokens of a clip along time, height and width.
    pub fn grid(&self, frames: i64) -> [i64; 3] {
        [frames / self.tube, SIDE / self.patch, SIDE / self.patch]
    }
}

/// A layer norm's weight and bias.
pub struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    /// `[width]` each.
    pub fn new(scope: &Scope, width: i64) -> Self {
        Norm {
            weight: scope.parameter("weight", &[width], Init::ONES),
            bias: scope.parameter("bias", &[width], Init::ZEROS),
        }
    }

    /// Over the last axis.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(self.weight.size().as_slice(), Some(&self.weight), Some(&self.bias), EPSILON, true)
    }
}

/// x Wᵀ + b
struct Dense {
    weight: Tensor,
    bias: Tensor,
}

impl Dense {
    fn new(scope: &Scope, inputs: i64, outputs: i64) -> Self {
        Dense {
            weight: scope.parameter("weight", &[outputs, inputs], Init::ZEROS),
            bias: scope.parameter("bias", &[outputs], Init::ZEROS),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, Some(&self.bias))
    }
}

/// The biases of attention as a file has them.
enum QkvBias {
    Joint(Tensor),
    QueriesAndValues(Tensor, Tensor),
}

impl QkvBias {
    /// `[3·width]`
    fn joined(&self) -> Tensor {
        match self {
            QkvBias::Joint(bias) => bias.shallow_clone(),
            QkvBias::QueriesAndValues(q, v) => Tensor::cat(&[q, &q.zeros_like(), v], 0),
        }
    }
}

/// x + attention(norm(x)), then x + MLP(norm(x)) with the exact GELU.
struct Block {
    norm1: Norm,
    qkv: Tensor,
    qkv_bias: QkvBias,
    proj: Dense,
    norm2: Norm,
    fc1: Dense,
    fc2: Dense,
    heads: i64,
}

impl Block {
    fn new(scope: &Scope, of: &Architecture) -> Self {
        let (width, attn, mlp) = (of.width, scope.sub("attn"), scope.sub("mlp"));
        let bias = |name: &str| attn.parameter(name, &[width], Init::ZEROS);
        Block {
            norm1: Norm::new(&scope.sub("norm1"), width),
            qkv: attn.sub("qkv").parameter("weight", &[3 * width, width], Init::ZEROS),
            qkv_bias: match of.biases {
                Biases::Joint => QkvBias::Joint(attn.sub("qkv").parameter("bias", &[3 * width], Init::ZEROS)),
                Biases::QueriesAndValues => QkvBias::QueriesAndValues(bias("q_bias"), bias("v_bias")),
            },
            proj: Dense::new(&attn.sub("proj"), width, width),
            norm2: Norm::new(&scope.sub("norm2"), width),
            fc1: Dense::new(&mlp.sub("fc1"), width, of.hidden),
            fc2: Dense::new(&mlp.sub("fc2"), of.hidden, width),
            heads: of.heads(),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let qkv = self.norm1.forward(x).linear(&self.qkv, Some(&self.qkv_bias.joined())).chunk(3, -1);
        let x = x + self.proj.forward(&attention(&qkv[0], &qkv[1], &qkv[2], self.heads));
        let mlp = self.fc2.forward(&self.fc1.forward(&self.norm2.forward(&x)).gelu("none"));
        x + mlp
    }
}

/// The encoder, frozen, up to and without its last norm.
pub struct VideoTransformer {
    patch_weight: Tensor,
    patch_bias: Tensor,
    blocks: Vec<Block>,
    architecture: Architecture,
    device: Device,
}

impl VideoTransformer {
    /// Declares the parameters under the released names.
    pub fn new(scope: &Scope, of: &Architecture) -> Self {
        let proj = scope.sub("patch_embed").sub("proj");
        VideoTransformer {
            patch_weight: proj.parameter("weight", &[of.width, 3, of.tube, of.patch, of.patch], Init::ZEROS),
            patch_bias: proj.parameter("bias", &[of.width], Init::ZEROS),
            blocks: (0..of.depth).map(|i| Block::new(&scope.sub("blocks").sub(i), of)).collect(),
            architecture: *of,
            device: scope.device(),
        }
    }

    /// Its sizes.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// Tokens `[B, N, width]` of u8 videos `[B, F, H, W, 3]`, which may lie on any device; N is F / frames of a token ×
    /// places, time outermost. `positions` are added to the tokens, `[1, N, width]`, and `scale` brings a pixel of
    /// [0, 1] to what the encoder was trained on.
    pub fn tokens(&self, videos: &Tensor, positions: &Tensor, scale: impl Fn(Tensor) -> Tensor) -> Tensor {
        let x = scale(resized(&upload(videos, self.device)) / 255.0);
        let Architecture { tube, patch, .. } = self.architecture;
        let stride = [tube, patch, patch];
        let x = x.conv3d(&self.patch_weight, Some(&self.patch_bias), stride, [0; 3], [1; 3], 1); // [B, width, f, h, w]
        let x = x.flatten(2, 4).transpose(1, 2) + positions;
        self.blocks.iter().fold(x, |x, block| block.forward(&x))
    }

    /// Rows of features `[N, width]` in float32, made of a few videos at once.
    pub fn in_pieces(&self, videos: &Tensor, features: impl Fn(&Tensor) -> Tensor) -> Tensor {
        let (n, frames) = (videos.size()[0], videos.size()[1]);
        let at_once = (FRAMES_AT_ONCE / frames).max(1);
        let pieces =
            (0..n).step_by(at_once as usize).map(|from| features(&videos.narrow(0, from, at_once.min(n - from))));
        let pieces: Vec<Tensor> = pieces.collect();
        match pieces.is_empty() {
            true => Tensor::zeros([0, self.architecture.width], (Kind::Float, self.device)),
            false => Tensor::cat(&pieces, 0),
        }
    }
}

/// u8 `[B, F, H, W, 3]` → float `[B, 3, F, 224, 224]`, bilinear without antialiasing, as both works do it.
fn resized(videos: &Tensor) -> Tensor {
    let (b, f, h, w, c) = videos.size5().expect("videos [N, F, H, W, 3]");
    let x = videos.reshape([b * f, h, w, c]).to_kind(Kind::Float).permute([0, 3, 1, 2]);
    let x = if (h, w) == (SIDE, SIDE) { x } else { x.upsample_bilinear2d([SIDE, SIDE], false, None, None) };
    x.reshape([b, f, c, SIDE, SIDE]).transpose(1, 2)
}

/// A table of positions `[1, f·h·w, width]` for clips of [`FRAMES`] frames, stretched over time to another grid by
/// trilinear interpolation; `ratio` is that of the two lengths as the released code computes it.
pub fn stretched(table: &Tensor, from: [i64; 3], frames: i64, ratio: f64) -> Tensor {
    let [f, h, w] = from;
    if f == frames {
        return table.shallow_clone();
    }
    let width = table.size()[2];
    let grid = table.reshape([1, f, h, w, width]).permute([0, 4, 1, 2, 3]);
    let grid = grid.upsample_trilinear3d([frames, h, w], false, ratio, 1.0, 1.0);
    grid.permute([0, 2, 3, 4, 1]).reshape([1, frames * h * w, width])
}

/// One sinusoid a number: sin of the even ones, cos of the odd ones (VideoMAE), or all sines before all cosines
/// (V-JEPA); `positions` `[N]` → `[N, width]` in float64.
pub fn sinusoids(positions: &Tensor, width: i64, interleaved: bool) -> Tensor {
    let exponents = Tensor::arange(width / 2, (Kind::Double, Device::Cpu)) * (2.0 / width as f64);
    let angles = positions.to_kind(Kind::Double).unsqueeze(1) * (exponents * -(10000f64.ln())).exp(); // [N, width/2]
    let parts = [angles.sin(), angles.cos()];
    if interleaved { Tensor::stack(&parts, 2).flatten(1, 2) } else { Tensor::cat(&parts, 1) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::Parameters;

    /// Width, depth, hidden width and patch of the published encoders: what is declared under the released names is read
    /// back as the same architecture, with the published number of heads.
    #[test]
    fn published_sizes() {
        use Biases::{Joint, QueriesAndValues};
        for (name, width, depth, hidden, patch, biases, heads) in [
            ("VideoMAE-v2 ViT-g/14", 1408, 40, 6144, 14, QueriesAndValues, 16),
            ("VideoMAE-v2 ViT-B/16", 768, 12, 3072, 16, QueriesAndValues, 12),
            ("V-JEPA ViT-L/16", 1024, 24, 4096, 16, Joint, 16),
            ("V-JEPA ViT-H/16", 1280, 32, 5120, 16, Joint, 16),
        ] {
            let of = Architecture { width, depth, hidden, tube: 2, patch, biases };
            let parameters = Parameters::unfilled(Device::Cpu);
            VideoTransformer::new(&parameters.root(), &of);
            let shapes: TensorShapes = parameters.named().into_iter().map(|(name, t)| (name, t.size())).collect();
            assert_eq!(Architecture::from_shapes(&shapes, biases).unwrap(), of, "{name}");
            assert_eq!(of.heads(), heads, "{name}");
            let [last, q, bias] = match biases {
                QueriesAndValues => ["attn.qkv.weight", "attn.q_bias", "attn.qkv.bias"],
                Joint => ["attn.qkv.weight", "attn.qkv.bias", "attn.q_bias"],
            }
            .map(|end| format!("blocks.{}.{end}", depth - 1));
            assert_eq!(shapes[&last], [3 * width, width]);
            assert!(shapes.contains_key(&q) && !shapes.contains_key(&bias), "{name}");
        }
    }

    #[test]
    fn other_networks_are_told_so() {
        let shapes = |entries: &[(&str, &[i64])]| -> TensorShapes {
            entries.iter().map(|(name, shape)| (name.to_string(), shape.to_vec())).collect()
        };
        for (entries, word) in [
            (shapes(&[]), "no tensor `patch_embed.proj.weight`"),
            (shapes(&[("patch_embed.proj.weight", &[768, 3, 16, 16])]), "[width, 3, frames, height, width]"),
            (
                shapes(&[("patch_embed.proj.weight", &[768, 3, 2, 15, 15]), ("blocks.0.mlp.fc1.weight", &[9, 768])]),
                "do not divide",
            ),
            (
                shapes(&[("patch_embed.proj.weight", &[50, 3, 2, 16, 16]), ("blocks.0.mlp.fc1.weight", &[9, 50])]),
                "50 wide",
            ),
        ] {
            let error = Architecture::from_shapes(&entries, Biases::Joint).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
