//! The denoising U-Net on video latents (paper, section 3.2): space-only convolutions, and in some
//! levels attention over the positions of a frame, then over the frames of a position.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Result;
use tch::{Kind, Tensor};

use super::{Inputs, Network, NetworkSettings, Ports, Takes};
use crate::{
    nn::{
        FrameStack, GroupNorm, Init, Linear, Scope, SpatialConv, full_precision, full_sum, rounded, timestep_embedding,
    },
    torch::{Keeps, recompute},
    weights::stable_diffusion::is_temporal,
};

mod attention;
mod config;
mod flops;

use attention::{FactorizedAttention, Transformer};
pub use attention::{JointAttention, SelfAttention};
use config::over;
pub use config::{AttentionKind, UNetConfig};

impl NetworkSettings for UNetConfig {
    fn validate(&self) -> Result<()> {
        UNetConfig::validate(self)
    }

    fn multiple_of(&self) -> [i64; 3] {
        let factor = 1 << (self.multipliers.len() - 1);
        [1, factor, factor]
    }

    fn build(&self, scope: &Scope, ports: &Ports) -> Result<Box<dyn Network>> {
        Ok(Box::new(UNet3d::new(scope, self, ports)))
    }

    fn takes(&self) -> Takes {
        Takes {
            text: self.text_width(),
            labels: true,
            levels: true,
            concat_time: true,
            stills: true,
            other_clips: true,
            ..Takes::default()
        }
    }

    /// Input channels and embeddings of levels, classes and the time of further channels start at zero; relative positions are matched by distance, and
    /// those beyond the old table start as its farthest.
    fn adopt(&self, weights: &mut BTreeMap<String, Tensor>, ports: &Ports) {
        for (name, weight) in weights.iter_mut() {
            if name == FIRST_KERNEL {
                let more = ports.inputs() - weight.size()[1];
                if more > 0 {
                    *weight = weight.constant_pad_nd([0, 0, 0, 0, 0, 0, 0, more]);
                }
            } else if name.ends_with("embeddings_table") {
                let known = (weight.size()[0] - 1) / 2;
                let wanted = Tensor::arange_start(-ports.frames, ports.frames + 1, (Kind::Int64, weight.device()));
                *weight = weight.index_select(0, &(wanted.clamp(-known, known) + known));
            }
        }
        for (name, rows) in [(LEVELS, ports.levels), (CLASSES, ports.classes.map(|classes| classes + 1))] {
            if let Some(rows) = rows {
                let zeros = || Tensor::zeros([rows, 4 * self.channels], (Kind::Float, tch::Device::Cpu));
                weights.entry(name.to_string()).or_insert_with(zeros);
            }
        }
        if ports.concat_time {
            for ending in ["0.weight", "0.bias", "2.weight", "2.bias"] {
                let Some(of_time) = weights.get(&format!("{TIME}.{ending}")) else { continue };
                let start = if ending.starts_with('0') { of_time.copy() } else { of_time.zeros_like() };
                weights.entry(format!("{CONCAT_TIME}.{ending}")).or_insert(start);
            }
        }
    }

    fn class_table(&self) -> Option<&str> {
        Some(CLASSES)
    }

    fn is_temporal(&self, name: &str) -> bool {
        is_temporal(name)
    }

    fn sees_given_frames(&self, name: &str) -> bool {
        name == FIRST_KERNEL || name == LEVELS
    }

    fn flops(&self, ports: &Ports, latent: [i64; 4], tokens: i64) -> i64 {
        flops::forward(self, ports, latent, tokens)
    }
}

/// Its channels are those of z, and what lies beside it.
const FIRST_KERNEL: &str = "input_blocks.0.0.weight";

/// The released name of the table of noise levels.
const LEVELS: &str = "label_emb.weight";

/// The embedding of time, and that of the noise of further channels.
const TIME: &str = "time_embed";
const CONCAT_TIME: &str = "concat_time_embed";

/// The table of classes; its last row is "no class".
const CLASSES: &str = "class_emb.weight";

/// norm → SiLU → conv → (time) → SiLU → conv, plus a skip.
struct ResBlock {
    in_norm: GroupNorm,
    in_conv: SpatialConv,
    time: Linear,
    out_norm: GroupNorm,
    out_conv: SpatialConv,
    skip: Option<Linear>,
    adaptive: bool,
    per_frame: bool,
}

impl ResBlock {
    fn new(scope: &Scope, inputs: i64, outputs: i64, config: &UNetConfig) -> Self {
        let time_outputs = if config.adaptive_norm { 2 * outputs } else { outputs };
        let (in_layers, out_layers) = (scope.sub("in_layers"), scope.sub("out_layers"));
        ResBlock {
            in_norm: GroupNorm::new(&in_layers.sub(0), config.norm_groups, inputs, 1e-5),
            in_conv: SpatialConv::new(&in_layers.sub(2), inputs, outputs, 3, 1),
            time: Linear::new(&scope.sub("emb_layers").sub(1), 4 * config.channels, time_outputs),
            out_norm: GroupNorm::new(&out_layers.sub(0), config.norm_groups, outputs, 1e-5),
            out_conv: SpatialConv::zero(&out_layers.sub(3), outputs, outputs, 3),
            skip: (inputs != outputs)
                .then(|| Linear::pointwise(&scope.sub("skip_connection"), inputs, outputs, 3, Init::fan_in(inputs))),
            adaptive: config.adaptive_norm,
            per_frame: config.norm_per_frame,
        }
    }

    /// x, on the way up the skip connection from the way down, whose channels are behind those of x, and SiLU of the time embedding,
    /// `[B, 4·channels]`.
    fn forward(&self, x: FrameStack, beside: Option<FrameStack>, embedding: &Tensor) -> FrameStack {
        let over = over(self.per_frame);
        let keeps = if self.skip.is_some() { Keeps::Narrow } else { Keeps::Stream };
        // from here on x is what the other branch takes, and what it was made of is not held on to
        let (h, x) = match (beside, &self.skip) {
            (Some(beside), Some(_)) => self.in_norm.of_pair(x, beside, over, true),
            (beside, _) => {
                let joined = beside.map(|beside| x.with(Tensor::cat(&[&x.x, &beside.x], 1)));
                let x = joined.unwrap_or(x);
                self.in_norm.of_stream(&x, None, over, true, keeps)
            }
        };
        let h = self.in_conv.rounded(&h);
        let time = self.time.forward_full(embedding); // [B, ·]
        let h = if self.adaptive {
            self.out_norm.of_frames(&h, over, Some(&time), true)
        } else {
            self.out_norm.of_frames_plus(&h, &time, over, true)
        };
        let h = self.out_conv.rounded(&h);
        match &self.skip {
            Some(skip) => {
                let skipped = x.from_positions(&skip.forward(&x.positions()));
                h.with(full_sum(&skipped.x, &h.x))
            }
            None => &x + &h,
        }
    }
}

/// One place of a block of the U-Net.
enum Layer {
    Conv(SpatialConv),
    Res(ResBlock),
    Factorized(FactorizedAttention),
    Joint(JointAttention),
    Text(Box<Transformer>),
    Down(SpatialConv),
    /// Nearest ×2, then a convolution.
    Up(SpatialConv),
}

impl Layer {
    fn attention(scope: &Scope, channels: i64, config: &UNetConfig, ports: &Ports) -> Layer {
        match config.attention {
            AttentionKind::Factorized => Layer::Factorized(FactorizedAttention::new(scope, channels, config, ports)),
            AttentionKind::Joint => {
                let distance = config.relative_position.then_some(ports.frames);
                Layer::Joint(JointAttention::new(
                    scope,
                    channels,
                    config.heads_of(channels),
                    config.norm_groups,
                    distance,
                ))
            }
            AttentionKind::Text => Layer::Text(Box::new(Transformer::new(scope, channels, config, ports))),
        }
    }

    fn forward(&self, x: FrameStack, given: Given) -> FrameStack {
        let Given { beside, embedding, context } = given;
        match self {
            Layer::Conv(conv) | Layer::Down(conv) => conv.forward(&x),
            Layer::Res(block) => {
                let beside = beside.map(|beside| x.with(beside));
                block.forward(x, beside, &embedding.expect("a residual block is given the time"))
            }
            Layer::Factorized(block) => block.forward(&x),
            Layer::Joint(block) => block.forward(&x),
            Layer::Text(block) => block.forward(&x, &context.expect("a network that attends to a text is given one")),
            Layer::Up(conv) => {
                let (_, _, h, w) = x.x.size4().expect("frames [B·F, C, H, W]");
                conv.forward(&x.with(rounded(&x.x).upsample_nearest2d([2 * h, 2 * w], None, None)))
            }
        }
    }
}

/// What a layer is given besides.
struct Given {
    /// For the first residual block of each block on the way up: the skip connection from the way down, `[B·F, C, H, W]`.
    beside: Option<Tensor>,
    /// For all residual blocks: SiLU of the time embedding, `[B, 4·channels]`.
    embedding: Option<Tensor>,
    /// The text, where there is one.
    context: Option<Tensor>,
}

/// Layers in a row.
struct Block {
    layers: Vec<Place>,
    recompute: bool,
}

/// A layer at its place.
struct Place {
    // where activations are computed again, a GPU's backward pass does it in a thread of its own
    layer: Arc<Mutex<Layer>>,
    takes_time: bool,
}

impl Block {
    fn new(layers: impl IntoIterator<Item = Layer>, recompute: bool) -> Self {
        let place = |layer| {
            let takes_time = matches!(layer, Layer::Res(_));
            Place { layer: Arc::new(Mutex::new(layer)), takes_time }
        };
        Block { layers: layers.into_iter().map(place).collect(), recompute }
    }

    /// x, and the skip connection that its first layer is given; `embeddings` has one for each residual block, in the order of use.
    fn forward(
        &self,
        x: FrameStack,
        mut beside: Option<Tensor>,
        embeddings: &mut impl Iterator<Item = Tensor>,
        context: Option<&Tensor>,
    ) -> FrameStack {
        self.layers.iter().fold(x, |x, place| {
            // after a panic in one of them the others, and it, are as they were: a forward pass changes nothing
            let of = |layer: &Mutex<Layer>, x: FrameStack, given: Given| {
                layer.lock().unwrap_or_else(PoisonError::into_inner).forward(x, given)
            };
            let embedding = if place.takes_time { embeddings.next() } else { None };
            let given = Given { beside: beside.take(), embedding, context: context.map(Tensor::shallow_clone) };
            if !self.recompute {
                return of(&place.layer, x, given);
            }
            let (layer, frames, stills) = (Arc::clone(&place.layer), x.frames, x.stills);
            let others = [&given.beside, &given.embedding, &given.context];
            let is_there = others.map(Option::is_some);
            let inputs: Vec<&Tensor> = [&x.x].into_iter().chain(others.into_iter().flatten()).collect();
            let output = recompute(&inputs, move |inputs| {
                let mut inputs = inputs.iter().map(Tensor::shallow_clone);
                let x = FrameStack { x: inputs.next().expect("x comes first"), frames, stills };
                let [beside, embedding, context] = is_there.map(|is_there| if is_there { inputs.next() } else { None });
                of(&layer, x, Given { beside, embedding, context }).x
            });
            x.with(output)
        })
    }
}

/// Sines and cosines of a time → linear → SiLU → linear.
struct TimeEmbedding([Linear; 2]);

impl TimeEmbedding {
    fn new(scope: &Scope, channels: i64) -> Self {
        TimeEmbedding([
            Linear::new(&scope.sub(0), channels, 4 * channels),
            Linear::new(&scope.sub(2), 4 * channels, 4 * channels),
        ])
    }

    /// t `[B]` → `[B, 4·channels]`
    fn forward(&self, t: &Tensor, channels: i64, kind: Kind) -> Tensor {
        let TimeEmbedding([first, second]) = self;
        second.forward_full(&first.forward_full(&timestep_embedding(t, channels, kind)).silu())
    }
}

/// The denoising U-Net.
pub struct UNet3d {
    time_embed: TimeEmbedding,
    concat_time_embed: Option<TimeEmbedding>,
    label_emb: Option<Tensor>,
    class_emb: Option<Tensor>,
    input_blocks: Vec<Block>,
    middle_block: Block,
    output_blocks: Vec<Block>,
    out_norm: GroupNorm,
    out_conv: SpatialConv,
    res_blocks: i64,
    channels: i64,
    per_frame: bool,
    ports: Ports,
}

impl UNet3d {
    /// Declares the parameters under `scope`, with the released names.
    pub fn new(scope: &Scope, config: &UNetConfig, ports: &Ports) -> Self {
        let width = 4 * config.channels;
        let time_embed = TimeEmbedding::new(&scope.sub(TIME), config.channels);
        let concat_time_embed = ports.concat_time.then(|| TimeEmbedding::new(&scope.sub(CONCAT_TIME), config.channels));
        let table = |name: &str, rows: i64, init| scope.parameter(name, &[rows, width], init);
        let label_emb = ports.levels.map(|rows| table(LEVELS, rows, Init::Normal(0.0, 1.0)));
        // zero: at first no class differs from "no class"
        let class_emb = ports.classes.map(|classes| table(CLASSES, classes + 1, Init::ZEROS));

        let attends = |level: usize| config.attention_factors.contains(&(1 << level));
        let levels = config.multipliers.len();

        // the way down; `widths` is the stack of skips
        let inputs = scope.sub("input_blocks");
        let mut channels = config.channels;
        let first = SpatialConv::new(&inputs.sub(0).sub(0), ports.inputs(), channels, 3, 1);
        let recompute_at = |level: usize| config.recompute.at(1 << level);
        let mut input_blocks = vec![Block::new([Layer::Conv(first)], recompute_at(0))];
        let mut widths = vec![channels];
        for (level, &multiplier) in config.multipliers.iter().enumerate() {
            for _ in 0..config.blocks_per_level {
                let scope = inputs.sub(input_blocks.len());
                let outputs = multiplier * config.channels;
                let mut layers = vec![Layer::Res(ResBlock::new(&scope.sub(0), channels, outputs, config))];
                channels = outputs;
                if attends(level) {
                    layers.push(Layer::attention(&scope.sub(1), channels, config, ports));
                }
                input_blocks.push(Block::new(layers, recompute_at(level)));
                widths.push(channels);
            }
            if level + 1 < levels {
                let scope = inputs.sub(input_blocks.len()).sub(0).sub("op");
                let down = Layer::Down(SpatialConv::new(&scope, channels, channels, 3, 2));
                input_blocks.push(Block::new([down], recompute_at(level)));
                widths.push(channels);
            }
        }

        let middle = scope.sub("middle_block");
        let res = |i: i64| Layer::Res(ResBlock::new(&middle.sub(i), channels, channels, config));
        let layers = [res(0), Layer::attention(&middle.sub(1), channels, config, ports), res(2)];
        let middle_block = Block::new(layers, recompute_at(levels - 1));

        // the way up: each block takes a skip more
        let outputs = scope.sub("output_blocks");
        let mut output_blocks: Vec<Block> = Vec::new();
        for (level, &multiplier) in config.multipliers.iter().enumerate().rev() {
            for i in 0..=config.blocks_per_level {
                let scope = outputs.sub(output_blocks.len());
                let skip = widths.pop().expect("as many skips as output blocks");
                let width = multiplier * config.channels;
                let mut layers = vec![Layer::Res(ResBlock::new(&scope.sub(0), channels + skip, width, config))];
                channels = width;
                if attends(level) {
                    layers.push(Layer::attention(&scope.sub(1), channels, config, ports));
                }
                if level > 0 && i == config.blocks_per_level {
                    let scope = scope.sub(layers.len()).sub("conv");
                    layers.push(Layer::Up(SpatialConv::new(&scope, channels, channels, 3, 1)));
                }
                output_blocks.push(Block::new(layers, recompute_at(level)));
            }
        }

        let out = scope.sub("out");
        let blocks = input_blocks.iter().chain([&middle_block]).chain(&output_blocks);
        let res_blocks = blocks.flat_map(|block| &block.layers).filter(|place| place.takes_time).count() as i64;
        UNet3d {
            time_embed,
            concat_time_embed,
            label_emb,
            class_emb,
            input_blocks,
            middle_block,
            output_blocks,
            out_norm: GroupNorm::new(&out.sub(0), config.norm_groups, channels, 1e-5),
            out_conv: SpatialConv::zero(&out.sub(2), channels, ports.outputs, 3),
            res_blocks,
            channels: config.channels,
            per_frame: config.norm_per_frame,
            ports: ports.clone(),
        }
    }
}

impl Network for UNet3d {
    fn ports(&self) -> &Ports {
        &self.ports
    }

    fn forward(&self, z_t: &Tensor, t: &Tensor, given: &Inputs) -> Tensor {
        let kind = if z_t.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let mut embedding = self.time_embed.forward(t, self.channels, kind);
        if let Some(embed) = &self.concat_time_embed {
            let time =
                given.concat_time.as_ref().expect("a network that is told the noise of its channels is given it");
            embedding += embed.forward(time, self.channels, kind);
        }
        if let (Some(table), Some(level)) = (&self.label_emb, &given.level) {
            let has_level = level.ge(0).to_kind(kind).unsqueeze(-1);
            embedding += table.index_select(0, &level.clamp_min(0)) * has_level;
        }
        if let (Some(table), Some(label)) = (&self.class_emb, &given.label) {
            embedding += table.index_select(0, label);
        }
        // one for each residual block, so that what comes back from them is added up at once
        let embeddings = embedding.silu().expand([self.res_blocks, -1, -1], false).unbind(0);
        let embeddings = &mut embeddings.into_iter();
        let x = FrameStack { stills: given.stills, ..FrameStack::fold(&given.beside(z_t, &self.ports)) };
        // in mixed precision every layer would cast it anew
        let context = given.text.as_ref().map(rounded);
        let context = context.as_ref();

        let mut skips: Vec<FrameStack> = Vec::new();
        let mut h = x;
        for block in &self.input_blocks {
            h = block.forward(h, None, embeddings, context);
            skips.push(h.with(h.x.shallow_clone()));
        }
        h = self.middle_block.forward(h, None, embeddings, context);
        for block in &self.output_blocks {
            let skip = skips.pop().expect("as many skips as output blocks");
            h = block.forward(h, Some(skip.x), embeddings, context);
        }
        let h = self.out_norm.of_frames(&h, over(self.per_frame), None, true);
        full_precision(&self.out_conv.forward(&h).video().contiguous())
    }
}
