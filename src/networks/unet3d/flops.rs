//! Operations of the U-Net, counted from shapes.

use super::config::{AttentionKind, UNetConfig};
use crate::{networks::Ports, nn::linear_flops as product};

/// Of one forward pass over one latent `[C, F, h, w]`; with `attention: text`, given `context` tokens.
pub(super) fn forward(config: &UNetConfig, ports: &Ports, latent: [i64; 4], context: i64) -> i64 {
    let [_, f, h, w] = latent;
    let places = |level: usize| (h >> level) * (w >> level);
    let conv = |level: usize, inputs, outputs| product(f * places(level), 9 * inputs, outputs);
    let embedding = 4 * config.channels;
    let time_outputs = if config.adaptive_norm { 2 } else { 1 };
    let res = |level: usize, inputs: i64, outputs: i64| {
        let skip = if inputs == outputs { 0 } else { product(f * places(level), inputs, outputs) };
        let time = product(1, embedding, time_outputs * outputs);
        conv(level, inputs, outputs) + conv(level, outputs, outputs) + time + skip
    };
    let attention = |level: usize, c: i64| {
        let p = places(level);
        let rows = f * p;
        // n sequences of q tokens against k
        let attend = |n: i64, q: i64, k: i64| 2 * product(n * q, c, k);
        let layer = product(rows, c, 4 * c);
        match config.attention {
            AttentionKind::Factorized => 2 * layer + attend(f, p, p) + attend(p, f, f),
            AttentionKind::Joint => layer + attend(1, rows, rows),
            AttentionKind::Text => {
                let cross = product(rows, c, 2 * c) + product(context, config.context_width, 2 * c);
                let feed_forward = product(rows, c, 8 * c) + product(rows, 4 * c, c);
                let temporal = if config.temporal { 2 * (layer + attend(p, f, f)) } else { 0 };
                let spatial = layer + attend(f, p, p) + cross + attend(f, p, context);
                temporal + spatial + feed_forward + product(rows, c, 2 * c)
            }
        }
    };
    let attends = |level: usize| config.attention_factors.contains(&(1 << level));

    let mut total = product(1, config.channels, embedding) + product(1, embedding, embedding);
    total *= if ports.concat_time { 2 } else { 1 };
    total += conv(0, ports.inputs(), config.channels);
    let mut channels = config.channels;
    let mut skips = vec![channels];
    let deepest = config.multipliers.len() - 1;
    for (level, multiplier) in config.multipliers.iter().enumerate() {
        for _ in 0..config.blocks_per_level {
            let outputs = multiplier * config.channels;
            total += res(level, channels, outputs);
            channels = outputs;
            total += if attends(level) { attention(level, channels) } else { 0 };
            skips.push(channels);
        }
        if level < deepest {
            total += conv(level + 1, channels, channels);
            skips.push(channels);
        }
    }
    total += 2 * res(deepest, channels, channels) + attention(deepest, channels);
    for (level, multiplier) in config.multipliers.iter().enumerate().rev() {
        for block in 0..=config.blocks_per_level {
            let outputs = multiplier * config.channels;
            total += res(level, channels + skips.pop().expect("as many skips as output blocks"), outputs);
            channels = outputs;
            total += if attends(level) { attention(level, channels) } else { 0 };
            if level > 0 && block == config.blocks_per_level {
                total += conv(level - 1, channels, channels);
            }
        }
    }
    total + conv(0, channels, ports.outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(flops: i64, wanted: f64) {
        let found = flops as f64 / 1e9;
        assert!((found - wanted).abs() < 0.05, "{found} GFLOP, not {wanted}");
    }

    #[test]
    fn the_papers_network_has_361_7_gigaflops() {
        let latent = [4, 4, 32, 32];
        close(forward(&UNetConfig::default(), &Ports::of(latent), latent, 0), 361.7);
        let quarter = UNetConfig { channels: 64, ..UNetConfig::default() };
        // a sixteenth of the paper's is 22.6; attention's own products only shrink to a quarter
        close(forward(&quarter, &Ports::of(latent), latent, 0), 23.4);
    }

    /// Without attention everything grows with the number of places.
    #[test]
    fn convolutions_grow_with_the_latent() {
        let config = UNetConfig { attention_factors: vec![], ..UNetConfig::default() };
        let at = |side| forward(&config, &Ports::of([4, 4, side, side]), [4, 4, side, side], 0) as f64;
        assert!((at(64) / at(32) - 4.0).abs() < 0.01, "{}", at(64) / at(32));
    }
}
