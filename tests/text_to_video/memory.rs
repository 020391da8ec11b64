//! How much memory imports, samples and training steps hold.

use lvdm::{
    checkpoint::{self, Checkpoint},
    exchange::{StableDiffusionOptions, import_stable_diffusion},
    models::LatentDiffusion,
    networks::{Inputs, Network as _, Ports, Recompute, UNet3d, UNetConfig},
    nn::Parameters,
    safetensors::read_safetensors,
    torch::{Autocast, peak_host_memory},
};
use tch::{Kind, Tensor};

use crate::{
    CPU,
    common::{
        noise,
        text_runs::{Tensors, write_diffusers_of, write_tensors},
    },
};

/// Importing and sampling hold the weights once: not the file's beside the network's, nor random ones before those of the
/// file, nor a second copy in another order. Half precision in the file does not change that, nor do averages and adapters
/// in a checkpoint.
#[test]
fn weights_are_held_once_by_import_and_sample() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_diffusers_of(&at.join("sd"), 5);
    let file = at.join("sd/unet/diffusion_pytorch_model.safetensors");
    let halves: Tensors =
        read_safetensors(&file).unwrap().0.into_iter().map(|(name, t)| (name, t.to_kind(Kind::Half))).collect();
    write_tensors(&file, &halves);
    drop(halves);
    let options = StableDiffusionOptions { frames: 4, resolution: 16, ..StableDiffusionOptions::default() };
    let run = at.join("run");
    let (imported, peak) = peak_host_memory(|| import_stable_diffusion(&at.join("sd"), &options, &run).unwrap());
    let weights = 4 * imported.iter().map(|network| network.part.parameters).sum::<i64>();
    assert!(weights > 60_000_000, "{weights} bytes are too few to tell");
    println!("import: {:.2} times the weights", peak as f64 / weights as f64);
    assert!(peak as f64 <= 1.3 * weights as f64, "import holds {peak} bytes for weights of {weights}");

    let (opened, peak) = peak_host_memory(|| LatentDiffusion::open(&run, CPU).unwrap());
    drop(opened);
    println!("opened: {:.2} times the weights", peak as f64 / weights as f64);
    assert!(peak as f64 <= 1.3 * weights as f64, "opening holds {peak} bytes for weights of {weights}");

    // a checkpoint of training: weights, averages and adapters
    let path = checkpoint::list(&run).unwrap().pop().unwrap();
    let mut found = Checkpoint::read(&path).unwrap();
    let rank = 4;
    let maps: Vec<(String, Vec<i64>)> = found
        .tensors
        .iter()
        .filter(|(name, _)| name.contains(".to_") && name.ends_with(".weight"))
        .map(|(name, tensor)| (name.trim_end_matches("weight").to_string(), tensor.size()))
        .collect();
    assert!(maps.len() > 20);
    for (place, size) in maps {
        for (name, shape) in [("adapter_down", [rank, size[1]]), ("adapter_up", [size[0], rank])] {
            found.tensors.insert(format!("{place}{name}"), noise(7, &shape) * 0.01);
        }
    }
    found.experiment["trained"] = serde_json::json!({"kind": "adapters", "rank": rank, "alpha": 4.0});
    let averages: Vec<_> =
        found.tensors.iter().map(|(name, tensor)| (name.replacen("model.", "ema.", 1), tensor * 1.0)).collect();
    found.tensors.extend(averages);
    found.write(&path).unwrap();
    drop(found);
    let (opened, peak) = peak_host_memory(|| LatentDiffusion::open(&run, CPU).unwrap());
    drop(opened);
    println!("averages and adapters: {:.2} times the weights", peak as f64 / weights as f64);
    assert!(peak as f64 <= 1.3 * weights as f64, "opening holds {peak} bytes for weights of {weights}");
}

/// The figures in `experiments/webvid/README.md`: the most that one pass forward and back holds beyond weights and
/// gradients, for clips of few frames of the paper's size, and so what a frame adds. Other kernels need a little more or
/// less beside what they compute.
#[test]
#[ignore = "needs 16 GB of memory and many minutes"]
fn memory_of_the_papers_setting() {
    let ports = Ports::of([4, 16, 1, 1]);
    // in GB with 2 and with 4 frames, as the table has them: without and with recomputation, each in float32 and bf16
    let stated_in_readme = [[[1.29, 2.58], [2.79, 3.76]], [[0.53, 0.60], [0.36, 0.42]]];
    for recompute in [false, true] {
        let parameters = Parameters::new(CPU, 0);
        let config = UNetConfig { recompute: Recompute::Everywhere(recompute), ..UNetConfig::stable_diffusion() };
        let unet = UNet3d::new(&parameters.root(), &config, &ports);
        for half in [false, true] {
            let peak = |frames: i64| {
                let (x, t) = (noise(1, &[1, 4, frames, 32, 32]), Tensor::from_slice(&[300i64]));
                let given = Inputs { text: Some(noise(2, &[1, 77, 768])), ..Inputs::default() };
                parameters.named().iter_mut().for_each(|(_, tensor)| tensor.zero_grad());
                let (_, bytes) = peak_host_memory(|| {
                    let _autocast = Autocast::bfloat16(CPU, half);
                    unet.forward(&x, &t, &given).square().mean(Kind::Float).backward();
                });
                bytes as f64 / 1e9
            };
            // the first pass makes the gradients, which stay
            let first = peak(1);
            let (two, four) = (peak(2), peak(4));
            println!(
                "recompute {recompute}, bf16 {half}: {two:.2} GB with 2 frames, {four:.2} GB with 4; first {first:.2} GB"
            );
            for (found, stated) in
                [two, four].into_iter().zip(stated_in_readme[usize::from(recompute)][usize::from(half)])
            {
                let difference = f64::abs(found - stated);
                assert!(
                    difference < 0.2 * stated + 0.05,
                    "recompute {recompute}, bf16 {half}: {found:.2} GB, not {stated}"
                );
            }
        }
    }
}
