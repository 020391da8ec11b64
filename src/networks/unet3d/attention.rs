//! How positions and frames of the U-Net attend to each other, and to a text.

use tch::Tensor;

use super::config::{UNetConfig, over};
use crate::{
    networks::Ports,
    nn::{
        FrameStack, GroupNorm, Init, KeyTerm, LayerNorm, Linear, Over, RelativePosition, ResidualStream, Scope,
        attends_in_place, attention,
    },
    torch::{Keeps, gpu_geglu, has_gpu_kernels},
};

/// Group norm, multi-head self-attention, a projection that starts at zero, and the residual, over `[N, T, C]`.
pub struct SelfAttention {
    norm: GroupNorm,
    qkv: Linear,
    proj_out: Linear,
    heads: i64,
}

impl SelfAttention {
    /// Parameters `norm_…`, `qkv_…`, `proj_out_…` with the given ending (`s` for space, `t` for time).
    pub fn new(scope: &Scope, ending: &str, channels: i64, heads: i64, norm_groups: i64) -> Self {
        SelfAttention {
            norm: GroupNorm::new(&scope.sub(format!("norm_{ending}")), norm_groups, channels, 1e-5),
            qkv: Linear::pointwise(
                &scope.sub(format!("qkv_{ending}")),
                channels,
                3 * channels,
                1,
                Init::fan_in(channels),
            ),
            proj_out: Linear::pointwise(&scope.sub(format!("proj_out_{ending}")), channels, channels, 1, Init::ZEROS),
            heads,
        }
    }

    /// `attend(q, k, v)` over tokens `[N, T, C]`; the norm pools over T. The tokens, and what is to be added to them.
    fn parts(&self, tokens: &Tensor, attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> [Tensor; 2] {
        let (normed, tokens) = self.norm.of_tokens(tokens);
        let qkv = self.qkv.forward(&normed).chunk(3, -1);
        [tokens, self.proj_out.forward(&attend(&qkv[0], &qkv[1], &qkv[2]))]
    }

    fn with(&self, tokens: &Tensor, attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor) -> Tensor {
        let [tokens, update] = self.parts(tokens, attend);
        tokens + update
    }

    /// Without positions.
    pub fn forward(&self, tokens: &Tensor) -> Tensor {
        self.with(tokens, |q, k, v| attention(q, k, v, self.heads))
    }
}

/// Attention over the positions of each frame, then over the frames of each position.
pub(super) struct FactorizedAttention {
    spatial: SelfAttention,
    temporal: SelfAttention,
    relative: Option<RelativePosition>,
}

impl FactorizedAttention {
    pub(super) fn new(scope: &Scope, channels: i64, config: &UNetConfig, ports: &Ports) -> Self {
        FactorizedAttention {
            spatial: SelfAttention::new(scope, "s", channels, config.heads_of(channels), config.norm_groups),
            temporal: SelfAttention::new(scope, "t", channels, config.heads_of(channels), config.norm_groups),
            relative: config
                .relative_position
                .then(|| RelativePosition::new(scope, ports.frames, channels / config.heads_of(channels))),
        }
    }

    pub(super) fn forward(&self, x: &FrameStack) -> FrameStack {
        let heads = self.spatial.heads;
        let parts = self.spatial.parts(&x.positions(), |q, k, v| attention(q, k, v, heads));
        let [x, update] = parts.map(|positions| x.from_positions(&positions));
        if x.stills {
            return &x + &update;
        }
        match &self.relative {
            Some(relative) if attends_in_place(&x.x) => self.over_frames_in_place(&x, &update, relative),
            _ => self.over_frames(&(&x + &update)),
        }
    }

    fn over_frames(&self, x: &FrameStack) -> FrameStack {
        let tracks = x.tracks();
        let tracks = match &self.relative {
            None => self.temporal.forward(&tracks),
            Some(relative) => self
                .temporal
                .with(&tracks, |q, k, v| relative.attention(q, k, v, self.temporal.heads, KeyTerm::Transposed)),
        };
        x.from_tracks(&tracks)
    }

    /// Of x + update, without moving frames in memory, where there are kernels for it.
    fn over_frames_in_place(&self, x: &FrameStack, update: &FrameStack, relative: &RelativePosition) -> FrameStack {
        let layer = &self.temporal;
        let (normed, x) = layer.norm.of_stream(x, Some(update), Over::Track, false, Keeps::Stream);
        let qkv = layer.qkv.forward(&normed.positions());
        let (bf, places, channels) = qkv.size3().expect("[B·F, P, 3·C]");
        let by_clip = qkv.reshape([bf / x.frames, x.frames, places, channels]);
        let Some(attended) = relative.in_place(&by_clip, layer.heads, KeyTerm::Transposed) else {
            return self.over_frames(&x);
        };
        &x + &x.from_positions(&layer.proj_out.forward(&attended.flatten(0, 1)))
    }
}

/// Attention over all positions of all frames. With one frame it is spatial attention.
pub struct JointAttention {
    attention: SelfAttention,
    relative: Option<RelativePosition>,
}

impl JointAttention {
    /// `max_distance` of frames for relative positions, or none.
    pub fn new(scope: &Scope, channels: i64, heads: i64, norm_groups: i64, max_distance: Option<i64>) -> Self {
        JointAttention {
            attention: SelfAttention::new(scope, "s", channels, heads, norm_groups),
            relative: max_distance.map(|l| RelativePosition::new(scope, l, channels / heads)),
        }
    }

    /// x → the same shape.
    pub fn forward(&self, x: &FrameStack) -> FrameStack {
        let (bf, c, h, w) = x.x.size4().expect("frames [B·F, C, H, W]");
        let tokens = x.positions().reshape([bf / x.frames, x.frames * h * w, c]); // [B, F·H·W, C]
        let tokens = match &self.relative {
            None => self.attention.forward(&tokens),
            Some(relative) => self
                .attention
                .with(&tokens, |q, k, v| relative.joint_attention(q, k, v, self.attention.heads, x.frames)),
        };
        x.from_positions(&tokens)
    }
}

/// Queries from one sequence, keys and values from another; Stable Diffusion's layer.
struct CrossAttention {
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
    relative: Option<RelativePosition>,
    heads: i64,
}

impl CrossAttention {
    /// One of its linear maps, which can have an adapter.
    fn map(scope: &Scope, inputs: i64, outputs: i64, init: Init, bias: bool) -> Linear {
        Linear::with_init(scope, inputs, outputs, init, bias).adapted(scope)
    }

    fn new(scope: &Scope, channels: i64, context: i64, heads: i64) -> Self {
        CrossAttention {
            to_q: Self::map(&scope.sub("to_q"), channels, channels, Init::fan_in(channels), false),
            to_k: Self::map(&scope.sub("to_k"), context, channels, Init::fan_in(context), false),
            to_v: Self::map(&scope.sub("to_v"), context, channels, Init::fan_in(context), false),
            to_out: Self::map(&scope.sub("to_out").sub(0), channels, channels, Init::fan_in(channels), true),
            relative: None,
            heads,
        }
    }

    /// Over frames: all four maps start at zero, so the layer starts as the identity of its residual;
    /// the value table of the relative positions is what lets a gradient in.
    fn temporal(scope: &Scope, channels: i64, heads: i64, max_distance: Option<i64>) -> Self {
        let zero = |scope: &Scope, bias| Self::map(scope, channels, channels, Init::ZEROS, bias);
        CrossAttention {
            to_q: zero(&scope.sub("to_q"), false),
            to_k: zero(&scope.sub("to_k"), false),
            to_v: zero(&scope.sub("to_v"), false),
            to_out: zero(&scope.sub("to_out").sub(0), true),
            relative: max_distance.map(|l| RelativePosition::new(scope, l, channels / heads)),
            heads,
        }
    }

    /// x `[N, T, C]`, context `[N, S, context]` → `[N, T, C]`
    fn forward(&self, x: &Tensor, context: &Tensor) -> Tensor {
        self.attend(&self.to_q.forward(x), &self.to_k.forward(context), &self.to_v.forward(context))
    }

    /// Of x to itself.
    fn of_itself(&self, x: &Tensor) -> Tensor {
        if !has_gpu_kernels(x.device()) {
            return self.forward(x, x);
        }
        let parts = self.qkv(x).chunk(3, -1);
        self.attend(&parts[0], &parts[1], &parts[2])
    }

    /// Queries, keys and values of x, `[N, T, 3·C]`.
    fn qkv(&self, x: &Tensor) -> Tensor {
        Linear::side_by_side(&[&self.to_q, &self.to_k, &self.to_v], x)
    }

    fn attend(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        self.to_out.forward(&match &self.relative {
            None => attention(q, k, v, self.heads),
            Some(relative) => relative.attention(q, k, v, self.heads, KeyTerm::Scaled),
        })
    }
}

impl CrossAttention {
    /// Self-attention over frames of `[B·F, P, C]` without moving them in memory, where there is a kernel for it.
    fn over_frames(&self, x: &Tensor, frames: i64) -> Option<Tensor> {
        let relative = self.relative.as_ref()?;
        let (bf, places, _) = x.size3().expect("[B·F, P, C]");
        let qkv = self.qkv(x).reshape([bf / frames, frames, places, -1]);
        Some(self.to_out.forward(&relative.in_place(&qkv, self.heads, KeyTerm::Scaled)?.flatten(0, 1)))
    }
}

/// Linear → (first half · GELU of the second) → linear.
struct FeedForward {
    proj: Linear,
    out: Linear,
}

impl FeedForward {
    fn new(scope: &Scope, channels: i64) -> Self {
        let net = scope.sub("net");
        FeedForward {
            proj: Linear::new(&net.sub(0).sub("proj"), channels, 8 * channels),
            out: Linear::new(&net.sub(2), 4 * channels, channels),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let both = self.proj.forward(x);
        if has_gpu_kernels(both.device()) {
            return self.out.forward(&gpu_geglu(&both));
        }
        let halves = both.chunk(2, -1);
        self.out.forward(&(&halves[0] * halves[1].gelu("none")))
    }
}

/// One block of Stable Diffusion's transformer with two temporal layers (reference: the text model).
struct TransformerBlock {
    attn1: CrossAttention,
    attn2: CrossAttention,
    ff: FeedForward,
    norms: [LayerNorm; 3],
    /// After `attn1` and after `attn2`, each with its norm.
    temporal: Option<[(LayerNorm, CrossAttention); 2]>,
}

impl TransformerBlock {
    fn new(scope: &Scope, channels: i64, config: &UNetConfig, ports: &Ports) -> Self {
        let distance = config.relative_position.then_some(ports.frames);
        let norm = |i: i64| LayerNorm::new(&scope.sub(format!("norm{i}")), channels);
        let temporal = |(i, name): (i64, &str)| {
            (norm(i), CrossAttention::temporal(&scope.sub(name), channels, config.heads_of(channels), distance))
        };
        let attn1 = CrossAttention::new(&scope.sub("attn1"), channels, channels, config.heads_of(channels));
        let attn2 = CrossAttention::new(&scope.sub("attn2"), channels, config.context_width, config.heads_of(channels));
        TransformerBlock {
            attn1,
            attn2,
            ff: FeedForward::new(&scope.sub("ff"), channels),
            norms: [1, 2, 3].map(norm),
            temporal: config.temporal.then(|| [(4, "attn1_tmp"), (5, "attn2_tmp")].map(temporal)),
        }
    }

    /// context `[B, S, context]`, the same for all frames of a clip
    fn forward(&self, x: &FrameStack, context: &Tensor) -> FrameStack {
        let [norm1, norm2, norm3] = &self.norms;
        let mut stream = ResidualStream::new(&x.positions()); // [B·F, P, C]
        let normed = stream.normed(norm1);
        stream.add(self.attn1.of_itself(&normed));
        self.over_frames(0, x, &mut stream);
        // all places of all frames ask the one text
        let normed = stream.normed(norm2);
        let (bf, places, c) = normed.size3().expect("[B·F, P, C]");
        let clips = normed.reshape([bf / x.frames, x.frames * places, c]);
        stream.add(self.attn2.forward(&clips, context).reshape([bf, places, c]));
        self.over_frames(1, x, &mut stream);
        let normed = stream.normed(norm3);
        stream.add(self.ff.forward(&normed));
        x.from_positions(&stream.rounded_sum())
    }

    /// One of the layers over frames, where there are any; `x` is the stack whose positions the stream is of.
    fn over_frames(&self, layer: usize, x: &FrameStack, stream: &mut ResidualStream) {
        let layers = self.temporal.as_ref().filter(|_| !x.stills);
        let Some((norm, attention)) = layers.map(|layers| &layers[layer]) else { return };
        if attends_in_place(&x.x) {
            let normed = stream.normed(norm);
            if let Some(attended) = attention.over_frames(&normed, x.frames) {
                return stream.add(attended);
            }
        }
        let sum = x.from_positions(&stream.sum());
        let tracks = sum.tracks();
        let normed = norm.forward(&tracks);
        let tracks = &tracks + attention.of_itself(&normed);
        *stream = ResidualStream::new(&sum.from_tracks(&tracks).positions());
    }
}

/// Norm, projection, one transformer block, projection, and the residual.
pub(super) struct Transformer {
    norm: GroupNorm,
    proj_in: Linear,
    block: TransformerBlock,
    proj_out: Linear,
    per_frame: bool,
}

impl Transformer {
    pub(super) fn new(scope: &Scope, channels: i64, config: &UNetConfig, ports: &Ports) -> Self {
        let project = |name: &str, init| Linear::pointwise(&scope.sub(name), channels, channels, 3, init);
        Transformer {
            norm: GroupNorm::new(&scope.sub("norm"), config.norm_groups, channels, 1e-6),
            proj_in: project("proj_in", Init::fan_in(channels)),
            block: TransformerBlock::new(&scope.sub("transformer_blocks").sub(0), channels, config, ports),
            proj_out: project("proj_out", Init::ZEROS),
            per_frame: config.norm_per_frame,
        }
    }

    pub(super) fn forward(&self, x: &FrameStack, context: &Tensor) -> FrameStack {
        let (h, x) = self.norm.of_stream(x, None, over(self.per_frame), false, Keeps::Stream);
        let h = h.from_positions(&self.proj_in.forward(&h.positions()));
        let h = self.block.forward(&h, context);
        &x + &h.from_positions(&self.proj_out.forward(&h.positions()))
    }
}
