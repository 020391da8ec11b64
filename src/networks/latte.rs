//! Latte, a diffusion transformer on video latents (Ma et al. 2024, arXiv 2401.03048, variant 1): blocks that attend
//! over the places of each frame and blocks that attend over the frames of each place take turns.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::{Inputs, Network, NetworkSettings, Ports, Takes};
use crate::{
    nn::{
        Init, Linear, ResidualStream, Scope, attention, frames_in_place, full_precision, linear_flops,
        timestep_embedding,
    },
    torch::{Autocast, recompute},
};

/// Width of the sinusoidal embedding of diffusion time, whatever the width of the network.
const TIME_WIDTH: i64 = 256;

/// What the transformer looks like. The default is the released Latte-XL/2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LatteConfig {
    /// Blocks: every other one attends over frames, so an even number.
    pub depth: i64,
    /// Width of a token.
    pub hidden_size: i64,
    /// Heads of each attention.
    pub heads: i64,
    /// Height and width of the square of latent pixels that is one token.
    pub patch_size: i64,
    /// Activations inside the blocks are computed again in the backward pass: less memory in training for more time.
    pub recompute: bool,
}

impl Default for LatteConfig {
    fn default() -> Self {
        LatteConfig { depth: 28, hidden_size: 1152, heads: 16, patch_size: 2, recompute: false }
    }
}

impl NetworkSettings for LatteConfig {
    fn validate(&self) -> Result<()> {
        let Self { depth, hidden_size, heads, patch_size, .. } = *self;
        ensure!(
            (2..=1000).contains(&depth) && depth % 2 == 0,
            "depth: blocks over places and over frames take turns, so depth is an even number from 2 to 1000, not {depth}"
        );
        ensure!(
            (4..=1 << 16).contains(&hidden_size) && hidden_size % 4 == 0,
            "hidden_size: sines and cosines of rows and columns share a token, so its width is a multiple of 4 up to \
             65536, not {hidden_size}"
        );
        ensure!(
            heads > 0 && hidden_size % heads == 0,
            "hidden_size = {hidden_size} does not divide into {heads} heads"
        );
        ensure!((1..=256).contains(&patch_size), "patch_size must be from 1 to 256, not {patch_size}");
        Ok(())
    }

    fn multiple_of(&self) -> [i64; 3] {
        [1, self.patch_size, self.patch_size]
    }

    fn build(&self, scope: &Scope, ports: &Ports) -> Result<Box<dyn Network>> {
        let p = self.patch_size;
        ensure!(
            ports.height % p == 0 && ports.width % p == 0,
            "latents of {}x{} do not divide into patches of {p}x{p} (network.patch_size)",
            ports.height,
            ports.width
        );
        Ok(Box::new(Latte::new(scope, self, ports)))
    }

    fn takes(&self) -> Takes {
        Takes { labels: true, frame_times: true, stills: true, ..Takes::default() }
    }

    /// Channels beside z and the table of classes start at zero. Positions, which are not learned, are those of clips of the
    /// new length and size.
    fn adopt(&self, weights: &mut BTreeMap<String, Tensor>, ports: &Ports) {
        if let Some(kernel) = weights.get_mut(FIRST_KERNEL) {
            let more = ports.inputs() - kernel.size()[1];
            if more > 0 {
                *kernel = kernel.constant_pad_nd([0, 0, 0, 0, 0, more]);
            }
        }
        if let Some(classes) = ports.classes {
            let zeros = || Tensor::zeros([classes + 1, self.hidden_size], (Kind::Float, Device::Cpu));
            weights.entry(CLASSES.to_string()).or_insert_with(zeros);
        }
        for (name, embedding) in self.embeddings(ports) {
            if let Some(known) = weights.get_mut(name).filter(|known| known.size() != embedding.size()) {
                *known = embedding;
            }
        }
    }

    fn class_table(&self) -> Option<&str> {
        Some(CLASSES)
    }

    fn is_temporal(&self, name: &str) -> bool {
        let block = name.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()?.parse::<i64>().ok());
        block.is_some_and(|block| block % 2 == 1)
    }

    fn sees_given_frames(&self, name: &str) -> bool {
        name == FIRST_KERNEL
    }

    fn flops(&self, ports: &Ports, latent: [i64; 4], _tokens: i64) -> i64 {
        let LatteConfig { depth, hidden_size: width, patch_size: p, .. } = *self;
        let [_, f, h, w] = latent;
        let places = (h / p) * (w / p);
        let condition = linear_flops(1, TIME_WIDTH, width) + linear_flops(1, width, width);
        let block = linear_flops(1, width, 6 * width) + linear_flops(f * places, width, 12 * width);
        // n sequences of so many tokens: scores, and sums of values
        let attend = |n: i64, tokens: i64| 2 * linear_flops(n * tokens, width, tokens);
        let pair = 2 * block + attend(f, places) + attend(places, f);
        let ends = linear_flops(f * places, p * p * (ports.inputs() + ports.outputs), width);
        condition + ends + depth / 2 * pair + linear_flops(1, width, 2 * width)
    }
}

impl LatteConfig {
    /// Of places and of frames, with their names.
    fn embeddings(&self, ports: &Ports) -> [(&'static str, Tensor); 2] {
        let (p, width) = (self.patch_size, self.hidden_size);
        let places = place_embedding(ports.height / p, ports.width / p, width);
        [("pos_embed", places), ("temp_embed", frame_embedding(ports.frames, width))]
    }
}

/// Its channels are those of z, and what lies beside it.
const FIRST_KERNEL: &str = "x_embedder.proj.weight";

/// The table of classes; its last row is "no class".
const CLASSES: &str = "y_embedder.embedding_table.weight";

/// `[sin(p·ω) | cos(p·ω)]` of each position p, ω_i = 10000^(−2i/width), in float64: `[positions, width]`.
fn sinusoids(positions: &Tensor, width: i64) -> Tensor {
    let i = Tensor::arange(width / 2, (Kind::Double, Device::Cpu));
    let frequencies = (i * (-2.0 * 10000f64.ln() / width as f64)).exp();
    let angles = positions.unsqueeze(1) * frequencies.unsqueeze(0);
    Tensor::cat(&[angles.sin(), angles.cos()], 1)
}

fn positions(count: i64) -> Tensor {
    Tensor::arange(count, (Kind::Double, Device::Cpu))
}

/// The embedding of frames, `[1, F, width]` float32.
fn frame_embedding(frames: i64, width: i64) -> Tensor {
    sinusoids(&positions(frames), width).to_kind(Kind::Float).unsqueeze(0)
}

/// The embedding of places, row by row: the column's in the first half, the row's in the second, `[1, N, width]`
/// float32.
fn place_embedding(rows: i64, columns: i64, width: i64) -> Tensor {
    let of = |count| sinusoids(&positions(count), width / 2);
    let column = of(columns).repeat([rows, 1]);
    let row = of(rows).repeat_interleave_self_int(columns, 0, None);
    Tensor::cat(&[column, row], 1).to_kind(Kind::Float).unsqueeze(0)
}

/// A linear layer that starts Xavier-uniform with bias zero.
fn linear(scope: &Scope, inputs: i64, outputs: i64) -> Linear {
    Linear::of_kernel(scope, &[outputs, inputs], [Init::xavier(inputs, outputs), Init::ZEROS])
}

/// Parts of Linear(SiLU(c)), each as wide as a token: shifts, scales and gates, `[B, 1 or F, 1, D]`. They are given SiLU(c).
struct Modulation(Linear);

impl Modulation {
    /// Starts at zero, so that blocks start as the identity (adaLN-Zero).
    fn new(scope: &Scope, width: i64, parts: i64) -> Self {
        let scope = scope.sub("adaLN_modulation").sub(1);
        Modulation(Linear::of_kernel(&scope, &[parts * width, width], [Init::ZEROS; 2]))
    }

    fn parts<const N: usize>(&self, condition: &Tensor) -> [Tensor; N] {
        let parts = self.0.forward_full(condition).chunk(N as i64, -1);
        parts.try_into().expect("as many parts as were declared")
    }
}

/// What tokens of a block attend to.
#[derive(Clone, Copy, PartialEq)]
enum Axis {
    /// The places of their frame.
    Places,
    /// The frames of their place.
    Frames,
}

/// Attention and MLP, each modulated and gated by the condition.
struct Block {
    over: Axis,
    heads: i64,
    qkv: Linear,
    proj: Linear,
    mlp: [Linear; 2],
    modulation: Modulation,
}

impl Block {
    fn new(scope: &Scope, over: Axis, config: &LatteConfig) -> Self {
        let width = config.hidden_size;
        let (attn, mlp) = (scope.sub("attn"), scope.sub("mlp"));
        Block {
            over,
            heads: config.heads,
            qkv: linear(&attn.sub("qkv"), width, 3 * width),
            proj: linear(&attn.sub("proj"), width, width),
            mlp: [linear(&mlp.sub("fc1"), width, 4 * width), linear(&mlp.sub("fc2"), 4 * width, width)],
            modulation: Modulation::new(scope, width, 6),
        }
    }

    /// A stream of `[B, F, N, D]`, SiLU(c) `[B, 1 or F, 1, D]`.
    fn forward(&self, x: &mut ResidualStream, condition: &Tensor) {
        let [shift_1, scale_1, gate_1, shift_2, scale_2, gate_2] = self.modulation.parts(condition);
        let attended = self.attend(&x.modulated(&scale_1, &shift_1));
        x.add_gated(&gate_1, attended);
        let [fc1, fc2] = &self.mlp;
        let h = fc1.forward(&x.modulated(&scale_2, &shift_2)).gelu("tanh");
        x.add_gated(&gate_2, fc2.forward(&h));
    }

    fn attend(&self, x: &Tensor) -> Tensor {
        let over_frames = self.over == Axis::Frames;
        let qkv = self.qkv.forward(x); // [B, F, N, 3·D]
        let in_place = if over_frames { frames_in_place(&qkv, self.heads) } else { None };
        if let Some(attended) = in_place {
            return self.proj.forward(&attended);
        }
        let along = |x: &Tensor| if over_frames { x.transpose(1, 2) } else { x.shallow_clone() };
        let qkv = along(&qkv); // frames and places exchanged where it is over frames
        let (b, outer, inner, width) = qkv.size4().expect("tokens [B, F, N, 3·D]");
        let parts = qkv.reshape([b * outer, inner, width]).chunk(3, -1);
        let attended = attention(&parts[0], &parts[1], &parts[2], self.heads);
        self.proj.forward(&along(&attended.reshape([b, outer, inner, width / 3]))) // [B, F, N, D]
    }
}

/// The video transformer.
pub struct Latte {
    pos_embed: Tensor,
    temp_embed: Tensor,
    x_embedder: Linear,
    t_embedder: [Linear; 2],
    /// A row a class, and one more for "no label".
    labels: Option<Tensor>,
    // where activations are computed again, a GPU's backward pass does it in a thread of its own
    blocks: Vec<Arc<Mutex<Block>>>,
    final_modulation: Modulation,
    final_linear: Linear,
    patch: i64,
    recompute: bool,
    ports: Ports,
}

impl Latte {
    /// Declares the parameters under `scope`, with the released names.
    pub fn new(scope: &Scope, config: &LatteConfig, ports: &Ports) -> Self {
        let LatteConfig { depth, hidden_size: width, patch_size: p, .. } = *config;
        let [pos_embed, temp_embed] = config.embeddings(ports).map(|(name, embedding)| scope.fixed(name, embedding));
        let window = ports.inputs() * p * p;
        let x_embedder = Linear::of_kernel(
            &scope.sub("x_embedder").sub("proj"),
            &[width, ports.inputs(), p, p],
            [Init::xavier(window, width), Init::ZEROS],
        );
        let small = Init::Normal(0.0, 0.02);
        let time = scope.sub("t_embedder").sub("mlp");
        let t_embedder = [(0, TIME_WIDTH), (2, width)]
            .map(|(i, inputs)| Linear::of_kernel(&time.sub(i), &[width, inputs], [small, Init::ZEROS]));
        let labels = ports.classes.map(|classes| scope.parameter(CLASSES, &[classes + 1, width], small));
        let blocks = scope.sub("blocks");
        let block = |i| Block::new(&blocks.sub(i), if i % 2 == 0 { Axis::Places } else { Axis::Frames }, config);
        let blocks = (0..depth).map(|i| Arc::new(Mutex::new(block(i)))).collect();
        let last = scope.sub("final_layer");
        Latte {
            pos_embed,
            temp_embed,
            x_embedder,
            t_embedder,
            labels,
            blocks,
            final_linear: Linear::of_kernel(&last.sub("linear"), &[p * p * ports.outputs, width], [Init::ZEROS; 2]),
            final_modulation: Modulation::new(&last, width, 2),
            patch: p,
            recompute: config.recompute,
            ports: ports.clone(),
        }
    }
}

impl Network for Latte {
    fn ports(&self) -> &Ports {
        &self.ports
    }

    fn forward(&self, z_t: &Tensor, t: &Tensor, given: &Inputs) -> Tensor {
        let z_t = given.beside(z_t, &self.ports);
        let (b, c, f, h, w) = z_t.size5().expect("latents [B, C, F, h, w]");
        let p = self.patch;
        let (rows, columns) = (h / p, w / p);
        assert!(
            self.pos_embed.size()[1] == rows * columns && (given.stills || self.temp_embed.size()[1] == f),
            "a clip of {f} frames of {h}x{w}: this Latte was made for {} frames of {} patches",
            self.temp_embed.size()[1],
            self.pos_embed.size()[1]
        );
        let condition = self.condition(t, given.label.as_ref(), z_t.kind()).silu(); // [B, 1 or F, 1, D]

        let windows = z_t.reshape([b, c, f, rows, p, columns, p]).permute([0, 2, 3, 5, 1, 4, 6]);
        let windows = windows.reshape([b, f, rows * columns, c * p * p]);
        let x = self.x_embedder.forward(&windows) + self.pos_embed.unsqueeze(1); // [B, F, N, D]
        let mut x = ResidualStream::new(&x);
        let over_frames = |i: usize| i % 2 == 1;
        for (i, block) in self.blocks.iter().enumerate().filter(|(i, _)| !(given.stills && over_frames(*i))) {
            if i == 1 {
                x = ResidualStream::new(&(x.sum() + self.temp_embed.unsqueeze(2))); // [1, F, 1, D]
            }
            self.through(block, &mut x, &condition);
        }
        let [shift, scale] = self.final_modulation.parts(&condition);
        let x = {
            let _full = Autocast::bfloat16(z_t.device(), false);
            full_precision(&x.modulated(&scale, &shift))
        };
        let x = self.final_linear.forward_full(&x);
        let x = x.reshape([b, f, rows, columns, p, p, -1]).permute([0, 6, 1, 2, 4, 3, 5]);
        x.reshape([b, -1, f, h, w])
    }
}

impl Latte {
    /// The time's embedding plus the label's, `[B, 1 or F, 1, D]`.
    fn condition(&self, t: &Tensor, label: Option<&Tensor>, kind: Kind) -> Tensor {
        let kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let b = t.size()[0];
        let [first, second] = &self.t_embedder;
        let time = timestep_embedding(&t.flatten(0, -1), TIME_WIDTH, kind);
        let time = second.forward_full(&first.forward_full(&time).silu());
        let time = time.reshape([b, -1, 1, time.size()[1]]);
        let Some(table) = &self.labels else { return time };
        let label = match label {
            Some(label) => table.index_select(0, label),
            None => table.narrow(0, table.size()[0] - 1, 1),
        };
        time + label.unsqueeze(1).unsqueeze(1)
    }

    fn through(&self, block: &Arc<Mutex<Block>>, x: &mut ResidualStream, condition: &Tensor) {
        // after a panic in one of them the others, and it, are as they were: a forward pass changes nothing
        let run = |block: &Mutex<Block>, x: &mut ResidualStream, condition: &Tensor| {
            block.lock().unwrap_or_else(PoisonError::into_inner).forward(x, condition)
        };
        if !self.recompute {
            return run(block, x, condition);
        }
        let block = Arc::clone(block);
        let after = recompute(&[&x.sum(), condition], move |inputs| {
            let mut x = ResidualStream::new(&inputs[0]);
            run(&block, &mut x, &inputs[1]);
            x.sum()
        });
        *x = ResidualStream::new(&after);
    }
}
