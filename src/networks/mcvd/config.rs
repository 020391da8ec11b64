//! The settings of MCVD's U-Net, its layers in their order, and the operations that they take.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::super::{ports::Ports, recompute::Recompute};
use crate::nn::linear_flops;

/// What the U-Net looks like. The default is the one released for UCF-101, whose frames are 64×64 pixels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct McvdConfig {
    /// Width of the first level.
    pub channels: i64,
    /// Width of each level, in units of `channels`.
    pub multipliers: Vec<i64>,
    /// Residual blocks a level.
    pub blocks_per_level: i64,
    /// Downsampling factors (not sizes) at which there is attention.
    pub attention_factors: Vec<i64>,
    /// Channels of each head of an attention; where there are fewer, there is one head.
    pub head_width: i64,
    /// Space-time adaptive normalisation (SPATIN): the frames around a clip steer every norm, by way of a convolution of so
    /// many channels, in place of standing beside the clip as further input channels.
    pub spatin: Option<i64>,
    /// Share of activations that training drops in every residual block.
    pub dropout: f64,
    /// Activations that are computed again in the backward pass instead of being kept: `true` for all, `false` for none, or
    /// the downsampling factors of the levels, such as `[1, 2]`. Less memory in training for more time.
    pub recompute: Recompute,
}

impl Default for McvdConfig {
    fn default() -> Self {
        McvdConfig {
            channels: 288,
            multipliers: vec![1, 2, 3, 4],
            blocks_per_level: 2,
            attention_factors: vec![2, 4, 8],
            head_width: 288,
            spatin: None,
            dropout: 0.1,
            recompute: Recompute::Everywhere(false),
        }
    }
}

/// Whether a residual block changes the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Resample {
    No,
    Down,
    Up,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Res(Resample),
    Attention,
}

/// One layer of the U-Net and its place, in the order of use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) of: Kind,
    /// Channels, of a layer that takes a skip with those of the skip.
    pub(super) inputs: i64,
    pub(super) outputs: i64,
    /// Of what goes in: its size is the clip's over 2^level.
    pub(super) level: usize,
    /// The last of the stack of skips joins what goes in.
    pub(super) takes_skip: bool,
    /// What comes out goes onto the stack.
    pub(super) leaves_skip: bool,
}

impl McvdConfig {
    /// # Errors
    /// Names the number that does not fit, and the rule.
    pub fn validate(&self) -> Result<()> {
        let Self { channels, multipliers, blocks_per_level, attention_factors, head_width, .. } = self;
        ensure!((4..=1 << 16).contains(channels), "channels must be from 4 to 65536, not {channels}");
        ensure!(
            channels % 2 == 0,
            "channels = {channels} is odd, and the embedding of time is half sines, half cosines"
        );
        ensure!(
            (1..=16).contains(&multipliers.len()) && multipliers.iter().all(|m| (1..=64).contains(m)),
            "multipliers are 1 to 16 numbers from 1 to 64, not {multipliers:?}"
        );
        ensure!((1..=1000).contains(blocks_per_level), "blocks_per_level must be from 1 to 1000");
        ensure!(*head_width >= 1, "head_width must be at least 1, not {head_width}");
        for (level, multiplier) in multipliers.iter().enumerate() {
            let width = channels * multiplier;
            let attends = level + 1 == multipliers.len() || attention_factors.contains(&(1 << level));
            ensure!(
                !attends || width < *head_width || width % head_width == 0,
                "{width} channels do not divide into heads of {head_width} (head_width)"
            );
        }
        let recompute = if let Recompute::At(factors) = &self.recompute { factors.as_slice() } else { &[] };
        for (key, factors) in [("attention_factors", attention_factors.as_slice()), ("recompute", recompute)] {
            for factor in factors {
                ensure!(
                    (0..multipliers.len()).any(|level| 1 << level == *factor),
                    "{key}: {factor} is not one of this network's downsampling factors 1 … {}",
                    1 << (multipliers.len() - 1)
                );
            }
        }
        ensure!(self.spatin.is_none_or(|width| width >= 1), "spatin must be at least 1, or null");
        ensure!((0.0..1.0).contains(&self.dropout), "dropout must lie in [0, 1), not {}", self.dropout);
        Ok(())
    }

    /// Channels of the first convolution's input, and of the last one's output.
    pub(super) fn ends(&self, ports: &Ports) -> [i64; 2] {
        let around = if self.spatin.is_some() { 0 } else { (ports.past + ports.future) * ports.channels };
        [ports.frames * ports.channels + around, ports.frames * ports.outputs]
    }

    /// All layers between the first convolution, which leaves a skip, and the last norm.
    pub(super) fn steps(&self) -> Vec<Place> {
        let deepest = self.multipliers.len() - 1;
        let attends = |level: usize| self.attention_factors.contains(&(1 << level));
        let mut steps: Vec<Place> = Vec::new();
        let mut skips = vec![self.channels];
        let mut c = self.channels;
        let step =
            |of, inputs, outputs, level| Place { of, inputs, outputs, level, takes_skip: false, leaves_skip: false };
        for (level, multiplier) in self.multipliers.iter().enumerate() {
            for _ in 0..self.blocks_per_level {
                let outputs = multiplier * self.channels;
                steps.push(step(Kind::Res(Resample::No), c, outputs, level));
                c = outputs;
                if attends(level) {
                    steps.push(step(Kind::Attention, c, c, level));
                }
                steps.last_mut().expect("one is there").leaves_skip = true;
                skips.push(c);
            }
            if level < deepest {
                steps.push(Place { leaves_skip: true, ..step(Kind::Res(Resample::Down), c, c, level) });
                skips.push(c);
            }
        }
        for of in [Kind::Res(Resample::No), Kind::Attention, Kind::Res(Resample::No)] {
            steps.push(step(of, c, c, deepest));
        }
        for (level, multiplier) in self.multipliers.iter().enumerate().rev() {
            for _ in 0..=self.blocks_per_level {
                let (skip, outputs) = (skips.pop().expect("as many as are taken"), multiplier * self.channels);
                steps.push(Place { takes_skip: true, ..step(Kind::Res(Resample::No), c + skip, outputs, level) });
                c = outputs;
            }
            if attends(level) {
                steps.push(step(Kind::Attention, c, c, level));
            }
            if level > 0 {
                steps.push(step(Kind::Res(Resample::Up), c, c, level));
            }
        }
        steps
    }
}

/// Of one forward pass over one latent `[C, F, h, w]`.
pub(super) fn flops(config: &McvdConfig, ports: &Ports, [_, _, h, w]: [i64; 4]) -> i64 {
    let mut total = linear_flops(1, config.channels, 4 * config.channels)
        + linear_flops(1, 4 * config.channels, 4 * config.channels);
    let places = |level: usize| (h >> level) * (w >> level);
    let around = (ports.past + ports.future) * ports.channels;
    // of one norm: time, and the maps of SPATIN
    let norm = |level: usize, c: i64| {
        let maps = config.spatin.map_or(0, |width| linear_flops(places(level), 9, around * width + 2 * width * c));
        maps + linear_flops(1, 4 * config.channels, 2 * c)
    };
    let [inputs, outputs] = config.ends(ports);
    total += linear_flops(places(0), 9 * inputs, config.channels);
    for step in config.steps() {
        let Place { inputs, outputs, level, .. } = step;
        total += match step.of {
            Kind::Attention => {
                4 * linear_flops(places(level), inputs, inputs) + 2 * linear_flops(places(level), inputs, places(level))
            }
            Kind::Res(resample) => {
                let inside = match resample {
                    Resample::No => level,
                    Resample::Down => level + 1,
                    Resample::Up => level - 1,
                };
                let skip = inputs != outputs || resample != Resample::No;
                norm(level, inputs)
                    + norm(inside, outputs)
                    + linear_flops(places(inside), 9 * inputs, outputs)
                    + linear_flops(places(inside), 9 * outputs, outputs)
                    + if skip { linear_flops(places(inside), inputs, outputs) } else { 0 }
            }
        };
    }
    let maps =
        config.spatin.map_or(0, |width| linear_flops(places(0), 9, around * width + 2 * width * config.channels));
    total + maps + linear_flops(places(0), 9 * config.channels, outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two levels without attention but in the middle, counted by hand: 8 channels, frames of 4×4.
    #[test]
    fn operations_are_counted() {
        let config = McvdConfig {
            channels: 8,
            multipliers: vec![1, 2],
            blocks_per_level: 1,
            attention_factors: vec![],
            head_width: 8,
            ..McvdConfig::default()
        };
        let ports = Ports { past: 1, ..Ports::of([3, 2, 4, 4]) };
        let norm = |c: i64| 32 * 2 * c;
        // of places, width in and out, and whether there is a 1×1 beside
        let res = |p: i64, i: i64, o: i64, skip: bool| {
            norm(i) + norm(o) + p * 9 * (i * o + o * o) + if skip { p * i * o } else { 0 }
        };
        let ends = 16 * 9 * (9 * 8 + 8 * 6);
        let time = 8 * 32 + 32 * 32;
        let down = res(16, 8, 8, false) + res(4, 8, 8, true) + res(4, 8, 16, true);
        let attention = 4 * 4 * 16 * 16 + 2 * 4 * 4 * 16;
        let middle = 2 * res(4, 16, 16, false) + attention;
        // the skips, last first: 16 and 8 channels below; 8 and 8 above
        let below = res(4, 32, 16, true) + res(4, 24, 16, true) + res(16, 16, 16, true);
        let above = res(16, 24, 8, true) + res(16, 16, 8, true);
        assert_eq!(flops(&config, &ports, [3, 2, 4, 4]), 2 * (ends + time + down + middle + below + above));
    }
}
