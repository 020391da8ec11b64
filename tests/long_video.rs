//! Long videos: decoding in chunks, and what a network given frames starts from.

mod common;

use common::{largest_difference, noise, wake};
use lvdm::{
    models::{
        AutoencoderConfig, Chunks, LatentMoments, LatentSpace, UNet3d, UNetCondition, UNetConfig, UNetPorts,
        VideoAutoencoder,
    },
    nn::Parameters,
};
use tch::{Device, Kind, Tensor, no_grad};

const CPU: Device = Device::Cpu;

fn autoencoder(norm_groups: i64) -> (AutoencoderConfig, VideoAutoencoder, Parameters) {
    let config = AutoencoderConfig { channels: 8, factors: [4, 4, 4], norm_groups, ..AutoencoderConfig::default() };
    config.validate().unwrap();
    let parameters = Parameters::new(CPU, 3);
    let autoencoder = VideoAutoencoder::new(&parameters.root(), &config);
    parameters.freeze();
    for (name, mut weight) in parameters.named() {
        if weight.dim() == 5 {
            // as they start, kernels shrink what passes, and distance with it; trained ones do not
            let grown = &weight * if name.contains("conv_blocks") { 2.5 } else { 1.0 };
            // and each frame of an upsampled group is a picture of its own; these agree
            let even = if name.contains("convt") { grown.mean_dim([2].as_slice(), true, None) } else { grown };
            no_grad(|| weight.copy_(&even.expand_as(&weight)));
        }
    }
    (config, autoencoder, parameters)
}

/// Latents that drift: each frame keeps most of the one before.
fn drifting(frames: i64) -> Tensor {
    let fresh = noise(0, &[1, 4, frames, 4, 4]);
    let mut rows = vec![fresh.narrow(2, 0, 1)];
    for f in 1..frames as usize {
        rows.push(&rows[f - 1] * 0.995 + fresh.narrow(2, f as i64, 1) * 0.09987);
    }
    Tensor::cat(&rows, 2)
}

fn in_chunks(chunks: &Chunks, autoencoder: &VideoAutoencoder, z: &Tensor) -> Tensor {
    let mut pieces = Vec::new();
    let keep = &mut |piece: &Tensor| {
        pieces.push(piece.copy());
        Ok(())
    };
    no_grad(|| chunks.decode(z, &|z| autoencoder.decode(z), keep)).unwrap();
    Tensor::cat(&pieces, 1).unsqueeze(0)
}

/// Without group norms a decoded frame depends on a few neighbours only, and where an overlap is wide enough for
/// these, chunks give what the whole gives.
#[test]
fn without_norms_chunks_are_the_whole() {
    let (config, autoencoder, _parameters) = autoencoder(0);
    let (z, factor, reach) = (drifting(70), config.factors[0], config.decoder_reach());
    let overlap = 2 * reach.div_euclid(factor) + 3;
    let chunks = Chunks { length: overlap + 6, overlap, factor, reach };
    assert!(chunks.starts(70).len() > 5);
    let whole = no_grad(|| autoencoder.decode(&z));
    let difference = largest_difference(&in_chunks(&chunks, &autoencoder, &z), &whole);
    let range = whole.abs().max().double_value(&[]);
    println!("largest difference {difference:.1e} at values up to {range:.2}");
    assert!(difference < 1e-5 * range.max(1.0), "{difference:e}");
    // and it is the overlap that does it
    let narrow = Chunks { overlap: 1, ..chunks };
    assert!(largest_difference(&in_chunks(&narrow, &autoencoder, &z), &whole) > 1e-3);
}

/// The reach is far enough: a frame beyond it does not feel the edge.
#[test]
fn no_edge_is_felt_beyond_the_reach() {
    let (config, autoencoder, _parameters) = autoencoder(0);
    let (z, factor, reach) = (drifting(40), config.factors[0], config.decoder_reach());
    let (cut, length) = (10, 30);
    let (whole, part) = no_grad(|| (autoencoder.decode(&z), autoencoder.decode(&z.narrow(2, cut, length))));
    let differs = |f: i64| largest_difference(&whole.narrow(2, cut * factor + f, 1), &part.narrow(2, f, 1)) > 1e-6;
    assert!(differs(0) && differs(reach / 2));
    let felt = (0..length * factor).filter(|&f| differs(f)).max().unwrap() + 1;
    println!("felt for {felt} frames, the reach is {reach}");
    assert!(felt <= reach && reach <= felt + 10, "{felt} {reach}");
}

/// Mean absolute differences of neighbouring frames: their mean at seams, and the median elsewhere.
fn seams(video: &Tensor, chunks: &Chunks, latents: i64) -> (f64, f64) {
    let frames = video.size()[2];
    let steps = (video.narrow(2, 1, frames - 1) - video.narrow(2, 0, frames - 1)).abs();
    let steps: Vec<f64> = steps.mean_dim([0, 1, 3, 4].as_slice(), false, Kind::Double).try_into().unwrap();
    let mut at_seam = vec![false; steps.len()];
    for (first, count) in chunks.seams(latents) {
        (first - 1..first + count).for_each(|i| at_seam[i as usize] = true);
    }
    let of = |wanted: bool| steps.iter().zip(&at_seam).filter(|(_, s)| **s == wanted).map(|(d, _)| *d).collect();
    let (seam, mut other): (Vec<f64>, Vec<f64>) = (of(true), of(false));
    other.sort_by(f64::total_cmp);
    (seam.iter().sum::<f64>() / seam.len() as f64, other[other.len() / 2])
}

/// Chunks of the training length, cross-faded: no jump where they meet. Put side by side they do jump.
#[test]
fn seams_do_not_show() {
    let (config, _, parameters) = autoencoder(8);
    let weights = parameters.named().into_iter().collect();
    let clip = 4;
    let space = LatentSpace::new(&config.clone().into(), &weights, LatentMoments { scale: 2.0, shift: 0.5 }, clip, CPU)
        .unwrap();
    let z = drifting(64);
    let mut pieces = Vec::new();
    space
        .decode_long(&z, &mut |piece| {
            assert!(piece.size()[1] <= clip * config.factors[0], "a piece is longer than a chunk");
            pieces.push(piece.copy());
            Ok(())
        })
        .unwrap();
    let video = Tensor::cat(&pieces, 1).unsqueeze(0);
    let (seam, elsewhere) = seams(&video, &space.chunks(), 64);
    let side_by_side: Vec<Tensor> = (0..16).map(|i| space.decode(&z.narrow(2, i * clip, clip))).collect();
    let hard = Chunks { overlap: 0, ..space.chunks() };
    let (hard_seam, hard_elsewhere) = seams(&Tensor::cat(&side_by_side, 2), &hard, 64);
    println!("cross-faded {:.2}, side by side {:.2}", seam / elsewhere, hard_seam / hard_elsewhere);
    assert!(seam <= 1.2 * elsewhere, "{seam} {elsewhere}");
    assert!(hard_seam > 1.2 * hard_elsewhere, "{hard_seam} {hard_elsewhere}");
}

/// A short model's weights in a network with a mask channel, levels and a longer or shorter clip: with an empty mask it computes
/// the same.
#[test]
fn a_grown_network_starts_as_the_short_one() {
    let config = UNetConfig {
        channels: 32,
        multipliers: vec![1, 2],
        blocks_per_level: 1,
        attention_factors: vec![1, 2],
        ..UNetConfig::default()
    };
    let short = UNetPorts { inputs: 4, outputs: 4, temporal_length: 4, classes: None };
    let parameters = Parameters::new(CPU, 1);
    let network = UNet3d::new(&parameters.root(), &config, &short);
    wake(&parameters);
    parameters.freeze();
    let t = Tensor::from_slice(&[10i64, 700]);
    for length in [3, 4, 6] {
        let ports = UNetPorts { inputs: 5, temporal_length: length, classes: Some(251), ..short };
        let mut weights = parameters.named().into_iter().collect();
        ports.adopt(&mut weights, &config);
        let grown_parameters = Parameters::new(CPU, 2);
        let grown = UNet3d::new(&grown_parameters.root(), &config, &ports);
        grown_parameters.load(&weights).unwrap();
        grown_parameters.freeze();
        let z = noise(1, &[2, 4, length, 8, 8]);
        let with_mask = |value: f64| {
            Tensor::cat(&[z.shallow_clone(), Tensor::full([2, 1, length, 8, 8], value, (Kind::Float, CPU))], 1)
        };
        let expected = network.forward(&z, &t, &UNetCondition::default());
        for level in [None, Some(Tensor::from_slice(&[0i64, 249]))] {
            let found = grown.forward(&with_mask(0.0), &t, &UNetCondition { level, context: None });
            let difference = largest_difference(&found, &expected);
            assert!(difference < 1e-6, "{length} frames: {difference:e}");
        }
        // the mask channel is there to be learned: its kernel has a gradient
        let name = "input_blocks.0.0.weight";
        let (_, mut kernel) = grown_parameters.named().into_iter().find(|(n, _)| n == name).unwrap();
        let _ = kernel.requires_grad_(true);
        grown.forward(&with_mask(1.0), &t, &UNetCondition::default()).square().mean(None).backward();
        assert!(kernel.grad().narrow(1, 4, 1).abs().max().double_value(&[]) > 0.0);
    }
}
