//! The image U-Net of MCVD over stacked frames (Voleti et al. 2022, arXiv 2205.09853): the channels of a clip's frames, and
//! of the frames before and after it, stand side by side as those of one image.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use tch::{Kind, Tensor};

use super::{Inputs, Network, NetworkSettings, Ports, Takes};
use crate::{
    nn::{
        Dropout, FrameStack, GroupNorm, Init, Linear, Over, Scope, SpatialConv, attention, full_precision,
        normalize_frames,
    },
    torch::{Autocast, recompute},
};

mod config;

pub use config::McvdConfig;
use config::{Kind as LayerKind, Resample};

impl NetworkSettings for McvdConfig {
    fn validate(&self) -> Result<()> {
        McvdConfig::validate(self)
    }

    fn multiple_of(&self) -> [i64; 3] {
        let factor = 1 << (self.multipliers.len() - 1);
        [1, factor, factor]
    }

    fn build(&self, scope: &Scope, ports: &Ports) -> Result<Box<dyn Network>> {
        ensure!(
            self.spatin.is_none() || ports.past + ports.future > 0,
            "spatin: the norms are steered by the frames around a clip, and there are none: give the experiment `blocks`"
        );
        Ok(Box::new(Mcvd::new(scope, self, ports)))
    }

    fn takes(&self) -> Takes {
        Takes { around: true, dropout: self.dropout > 0.0, ..Takes::default() }
    }

    fn flops(&self, ports: &Ports, latent: [i64; 4], _tokens: i64) -> i64 {
        config::flops(self, ports, latent)
    }
}

/// The most groups of so many channels that divide them: a quarter of them, and no more than 32.
fn groups(channels: i64) -> i64 {
    (1..=(channels / 4).clamp(1, 32)).rev().find(|groups| channels % groups == 0).unwrap_or(1)
}

/// Uniform with the variance scale / mean(fan-in, fan-out).
fn init(fan_in: i64, fan_out: i64, scale: f64) -> Init {
    Init::Uniform((6.0 * scale / (fan_in + fan_out) as f64).sqrt())
}

/// Zero in effect.
const FAINT: f64 = 1e-10;

/// A k×k convolution of images, or frames.
fn conv(scope: &Scope, inputs: i64, outputs: i64, kernel: i64, scale: f64) -> SpatialConv {
    let area = kernel * kernel;
    SpatialConv::of_images(scope, inputs, outputs, kernel, init(inputs * area, outputs * area, scale))
}

fn dense(scope: &Scope, inputs: i64, outputs: i64) -> Linear {
    Linear::of_kernel(scope, &[outputs, inputs], [init(inputs, outputs, 1.0), Init::ZEROS])
}

/// `[sin | cos]` of label·exp(−ln 10000·i/(width/2 − 1)): `[B]` → `[B, width]` in `kind`.
fn label_embedding(label: &Tensor, width: i64, kind: Kind) -> Tensor {
    let half = width / 2;
    let i = Tensor::arange(half, (kind, label.device()));
    let frequencies = (i * (-(10000f64.ln()) / (half - 1) as f64)).exp();
    let angles = label.to_kind(kind).unsqueeze(1) * frequencies.unsqueeze(0);
    Tensor::cat(&[angles.sin(), angles.cos()], 1)
}

/// The kernel `[C, 1, 4, 4]` of [1, 3, 3, 1] in both directions, which sum to `sum`; made where it is used.
fn fir(channels: i64, sum: f64, like: &Tensor) -> Tensor {
    let i = Tensor::arange(4, (like.kind(), like.device()));
    let line: Tensor = 4.0 - (i * 2.0 - 3.0).abs();
    (line.unsqueeze(0) * line.unsqueeze(1) * (sum / 64.0)).expand([channels, 1, 4, 4], false)
}

/// Half or twice the size, through the filter; nothing is beyond the edges.
fn resampled(x: &FrameStack, resample: Resample) -> FrameStack {
    let _full = Autocast::bfloat16(x.x.device(), false);
    let c = x.x.size()[1];
    let none = None::<&Tensor>;
    match resample {
        Resample::No => x.with(x.x.shallow_clone()),
        Resample::Down => x.with(x.x.conv2d(&fir(c, 1.0, &x.x), none, [2, 2], [1, 1], [1, 1], c)),
        Resample::Up => x.with(x.x.conv_transpose2d(&fir(c, 4.0, &x.x), none, [2, 2], [1, 1], [0, 0], c, [1, 1])),
    }
}

/// What steers the layers.
struct Condition {
    /// `[B, 4·channels]`
    time: Tensor,
    /// The frames around the clip, `[B, (past + future)·C, h, w]`, for SPATIN.
    around: Option<Tensor>,
    /// Keys of dropped activations, `[B]`.
    dropout: Option<Tensor>,
}

impl Condition {
    fn tensors(&self) -> Vec<&Tensor> {
        [&self.time].into_iter().chain(&self.around).chain(&self.dropout).collect()
    }

    /// From such tensors, of the same parts.
    fn like(parts: [bool; 2], tensors: &[Tensor]) -> Self {
        let mut tensors = tensors.iter().map(Tensor::shallow_clone);
        let time = tensors.next().expect("time is there");
        let around = if parts[0] { tensors.next() } else { None };
        Condition { time, around, dropout: if parts[1] { tensors.next() } else { None } }
    }
}

/// x̂·(1 + γ) + β, where γ and β are convolutions of the frames around the clip (SPATIN).
struct Spatin {
    shared: SpatialConv,
    gamma: SpatialConv,
    beta: SpatialConv,
}

impl Spatin {
    fn new(scope: &Scope, channels: i64, width: i64, ports: &Ports) -> Self {
        let around = (ports.past + ports.future) * ports.channels;
        Spatin {
            shared: conv(&scope.sub("mlp_shared").sub(0), around, width, 3, 1.0),
            gamma: conv(&scope.sub("mlp_gamma"), width, channels, 3, 1.0),
            beta: conv(&scope.sub("mlp_beta"), width, channels, 3, 1.0),
        }
    }

    fn forward(&self, x: &FrameStack, around: &Tensor) -> FrameStack {
        let (_, c, h, w) = x.x.size4().expect("images [B, C, h, w]");
        let [one, zero] = [1.0, 0.0].map(|value| Tensor::full([1, c], value, (Kind::Float, x.x.device())));
        let [one, zero] = [one, zero].map(|t| if x.x.kind() == Kind::Double { t.to_kind(Kind::Double) } else { t });
        let normal = normalize_frames(x, [&one, &zero], groups(c), 1e-6, false, false);
        let around = x.with(around.upsample_nearest2d([h, w], None, None));
        let shared = self.shared.forward(&around);
        let shared = shared.with(shared.x.silu());
        let [gamma, beta] = [&self.gamma, &self.beta].map(|map| map.forward(&shared).x);
        x.with(&normal.x * (gamma + 1.0) + beta)
    }
}

/// SiLU(norm(x)·(1 + scale) + shift), scale and shift from the time.
struct ActNorm {
    dense: Linear,
    spatin: Option<Spatin>,
}

impl ActNorm {
    fn new(scope: &Scope, channels: i64, config: &McvdConfig, ports: &Ports) -> Self {
        ActNorm {
            dense: dense(&scope.sub("Dense_0"), 4 * config.channels, 2 * channels),
            spatin: config.spatin.map(|width| Spatin::new(&scope.sub("Norm_0"), channels, width, ports)),
        }
    }

    /// In mixed precision a convolution is to take it, where it `may_round`.
    fn forward(&self, x: &FrameStack, condition: &Condition, may_round: bool) -> FrameStack {
        let parts = self.dense.forward_full(&condition.time.silu()).chunk(2, 1);
        let (scale, shift) = (&parts[0] + 1.0, &parts[1]);
        match (&self.spatin, &condition.around) {
            (Some(spatin), Some(around)) => {
                let y = spatin.forward(x, around);
                let of_places = |t: &Tensor| t.unsqueeze(-1).unsqueeze(-1);
                y.with((&y.x * of_places(&scale) + of_places(shift)).silu())
            }
            _ => normalize_frames(x, [&scale, shift], groups(x.x.size()[1]), 1e-5, true, may_round),
        }
    }
}

/// (x + conv(act(conv(act(x)))))/√2, perhaps of another size.
struct ResBlock {
    norms: [ActNorm; 2],
    convs: [SpatialConv; 2],
    skip: Option<SpatialConv>,
    resample: Resample,
    dropout: Dropout,
}

impl ResBlock {
    fn new(
        scope: &Scope,
        [inputs, outputs]: [i64; 2],
        resample: Resample,
        config: &McvdConfig,
        ports: &Ports,
        layer: i64,
    ) -> Self {
        let norm = |name: &str, channels| ActNorm::new(&scope.sub(name), channels, config, ports);
        ResBlock {
            norms: [norm("actnorm0", inputs), norm("actnorm1", outputs)],
            convs: [
                conv(&scope.sub("Conv_0"), inputs, outputs, 3, 1.0),
                conv(&scope.sub("Conv_1"), outputs, outputs, 3, FAINT),
            ],
            skip: (inputs != outputs || resample != Resample::No)
                .then(|| conv(&scope.sub("Conv_2"), inputs, outputs, 1, 1.0)),
            resample,
            dropout: Dropout { share: config.dropout, layer },
        }
    }

    fn forward(&self, x: &FrameStack, condition: &Condition) -> FrameStack {
        let h = resampled(&self.norms[0].forward(x, condition, self.resample == Resample::No), self.resample);
        let h = self.norms[1].forward(&self.convs[0].rounded(&h), condition, true);
        let h = h.with(self.dropout.forward(&h.x, condition.dropout.as_ref()));
        let h = self.convs[1].forward(&h);
        let x = resampled(x, self.resample);
        let x = self.skip.as_ref().map_or_else(|| x.with(x.x.shallow_clone()), |skip| skip.forward(&x));
        x.with((&x.x + &h.x) * std::f64::consts::FRAC_1_SQRT_2)
    }
}

/// h·W + b of every place, W `[inputs, outputs]` as released.
struct PlaceMap {
    weight: Tensor,
    bias: Tensor,
}

impl PlaceMap {
    fn new(scope: &Scope, channels: i64, scale: f64) -> Self {
        PlaceMap {
            weight: scope.parameter("W", &[channels, channels], init(channels, channels, scale)),
            bias: scope.parameter("b", &[channels], Init::ZEROS),
        }
    }

    fn forward(&self, tokens: &Tensor) -> Tensor {
        tokens.linear(&self.weight.tr(), Some(&self.bias))
    }
}

/// (x + attention over the places of the image)/√2.
struct Attention {
    norm: GroupNorm,
    maps: [PlaceMap; 4],
    heads: i64,
}

impl Attention {
    fn new(scope: &Scope, channels: i64, config: &McvdConfig) -> Self {
        let map = |i: i64| PlaceMap::new(&scope.sub(format!("NIN_{i}")), channels, if i == 3 { FAINT } else { 0.1 });
        Attention {
            norm: GroupNorm::new(&scope.sub("GroupNorm_0"), groups(channels), channels, 1e-6),
            maps: [0, 1, 2, 3].map(map),
            heads: (channels / config.head_width).max(1),
        }
    }

    fn forward(&self, x: &FrameStack) -> FrameStack {
        let tokens = self.norm.of_frames(x, Over::Frame, None, false).positions(); // [B, h·w, C]
        let [query, key, value, out] = &self.maps;
        let [q, k, v] = [query, key, value].map(|map| map.forward(&tokens));
        let h = x.from_positions(&out.forward(&attention(&q, &k, &v, self.heads)));
        x.with((&x.x + &h.x) * std::f64::consts::FRAC_1_SQRT_2)
    }
}

enum Layer {
    Res(Box<ResBlock>),
    Attention(Attention),
}

impl Layer {
    fn forward(&self, x: &FrameStack, condition: &Condition) -> FrameStack {
        match self {
            Layer::Res(block) => block.forward(x, condition),
            Layer::Attention(block) => block.forward(x),
        }
    }
}

/// A layer at its place.
struct Step {
    // where activations are computed again, a GPU's backward pass does it in a thread of its own
    layer: Arc<Mutex<Layer>>,
    recompute: bool,
    takes_skip: bool,
    leaves_skip: bool,
}

impl Step {
    fn forward(&self, x: &FrameStack, condition: &Condition) -> FrameStack {
        // after a panic in one of them the others, and it, are as they were: a forward pass changes nothing
        let of = |layer: &Mutex<Layer>, x: &FrameStack, condition: &Condition| {
            layer.lock().unwrap_or_else(PoisonError::into_inner).forward(x, condition)
        };
        if !self.recompute {
            return of(&self.layer, x, condition);
        }
        let layer = Arc::clone(&self.layer);
        let parts = [condition.around.is_some(), condition.dropout.is_some()];
        let inputs: Vec<&Tensor> = [&x.x].into_iter().chain(condition.tensors()).collect();
        x.with(recompute(&inputs, move |inputs| {
            let x = FrameStack { x: inputs[0].shallow_clone(), frames: 1, stills: false };
            of(&layer, &x, &Condition::like(parts, &inputs[1..])).x
        }))
    }
}

/// The last norm: with SPATIN by the frames around the clip, else with weights of its own.
enum LastNorm {
    Plain(GroupNorm),
    Spatin(Spatin),
}

/// The denoising network.
pub struct Mcvd {
    time: [Linear; 2],
    first: SpatialConv,
    steps: Vec<Step>,
    last_norm: LastNorm,
    last: SpatialConv,
    channels: i64,
    spatin: bool,
    ports: Ports,
}

impl Mcvd {
    /// Declares the parameters under `scope` with the released names, where all layers are numbered in the order of use.
    pub fn new(scope: &Scope, config: &McvdConfig, ports: &Ports) -> Self {
        let all = scope.sub("all_modules");
        let c = config.channels;
        let time = [dense(&all.sub(0), c, 4 * c), dense(&all.sub(1), 4 * c, 4 * c)];
        let [inputs, outputs] = config.ends(ports);
        let first = conv(&all.sub(2), inputs, c, 3, 1.0);
        let steps: Vec<Step> = (3..)
            .zip(config.steps())
            .map(|(number, place)| {
                let scope = all.sub(number);
                let layer = match place.of {
                    LayerKind::Res(resample) => {
                        let channels = [place.inputs, place.outputs];
                        Layer::Res(Box::new(ResBlock::new(&scope, channels, resample, config, ports, number)))
                    }
                    LayerKind::Attention => Layer::Attention(Attention::new(&scope, place.inputs, config)),
                };
                Step {
                    layer: Arc::new(Mutex::new(layer)),
                    recompute: config.recompute.at(1 << place.level),
                    takes_skip: place.takes_skip,
                    leaves_skip: place.leaves_skip,
                }
            })
            .collect();
        let number = 3 + steps.len();
        let norm = all.sub(number).sub("Norm_0");
        Mcvd {
            time,
            first,
            steps,
            last_norm: match config.spatin {
                Some(width) => LastNorm::Spatin(Spatin::new(&norm, c, width, ports)),
                None => LastNorm::Plain(GroupNorm::new(&norm, groups(c), c, 1e-5)),
            },
            last: conv(&all.sub(number + 1), c, outputs, 3, FAINT),
            channels: c,
            spatin: config.spatin.is_some(),
            ports: ports.clone(),
        }
    }
}

/// `[B, C, F, h, w]` → `[B, F·C, h, w]`, frame after frame.
fn stacked(frames: &Tensor) -> Tensor {
    frames.transpose(1, 2).flatten(1, 2)
}

impl Network for Mcvd {
    fn forward(&self, z: &Tensor, t: &Tensor, given: &Inputs) -> Tensor {
        let (b, _, f, h, w) = z.size5().expect("latents [B, C, F, h, w]");
        let kind = if z.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let [first, second] = &self.time;
        let time = second.forward_full(&first.forward_full(&label_embedding(t, self.channels, kind)).silu());
        let has_around = self.ports.past + self.ports.future > 0;
        let around = has_around.then(|| stacked(&given.frames_around(z, &self.ports)));
        let (beside, around) = if self.spatin { (None, around) } else { (around, None) };
        let x = Tensor::cat(&[stacked(z)].into_iter().chain(beside).collect::<Vec<_>>(), 1);
        let dropout = given.dropout.as_ref().map(Tensor::shallow_clone);
        let condition = Condition { time, around, dropout };

        let mut x = self.first.forward(&FrameStack::fold(&x.unsqueeze(2))); // one image a clip
        let mut skips = vec![x.with(x.x.shallow_clone())];
        for step in &self.steps {
            if step.takes_skip {
                let skip = skips.pop().expect("as many skips as are taken");
                x = x.with(Tensor::cat(&[&x.x, &skip.x], 1));
            }
            x = step.forward(&x, &condition);
            if step.leaves_skip {
                skips.push(x.with(x.x.shallow_clone()));
            }
        }
        let x = match (&self.last_norm, &condition.around) {
            (LastNorm::Plain(norm), _) => norm.of_frames(&x, Over::Frame, None, true),
            (LastNorm::Spatin(norm), Some(around)) => {
                let y = norm.forward(&x, around);
                y.with(y.x.silu())
            }
            (LastNorm::Spatin(_), None) => unreachable!("such a network is built with frames around a clip"),
        };
        full_precision(&self.last.forward(&x).x).reshape([b, f, self.ports.outputs, h, w]).transpose(1, 2).contiguous()
    }

    fn ports(&self) -> &Ports {
        &self.ports
    }
}
