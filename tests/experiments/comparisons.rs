//! Runs that are compared differ in what is compared alone.

use std::fs;

use lvdm::{
    experiment::{DiffusionExperiment, DiffusionSpace, parse},
    models,
    networks::{AttentionKind, UNet3d, UNetConfig},
    nn::Parameters,
};

use super::{common::source, latent_of};

fn diffusion(name: &str) -> DiffusionExperiment {
    let text = fs::read_to_string(source("experiments").join(name)).unwrap();
    parse(name, &text, &[]).unwrap()
}

/// What two experiments that are compared have in common, with their numbers of parameters.
fn compared(one: &DiffusionExperiment, other: &DiffusionExperiment) -> [i64; 2] {
    let settings = |experiment: &DiffusionExperiment| {
        let clips = experiment.trainer.batch * experiment.trainer.accumulate;
        let DiffusionExperiment { seed, data, schedule, objective, optimizer, sampler, trainer, .. } = experiment;
        serde_json::json!([seed, data, schedule, objective, optimizer, sampler, clips, trainer.ema_decay])
    };
    assert_eq!(settings(one), settings(other));
    [one, other].map(|experiment| {
        let parameters = Parameters::unfilled(tch::Device::Cpu);
        let ports = models::ports(experiment, latent_of(experiment));
        UNet3d::new(&parameters.root(), experiment.unet().unwrap(), &ports);
        parameters.count()
    })
}

/// Latents against pixels: one network, but for what the number of channels and frames decides, and one time.
#[test]
fn pixels_are_compared_with_latents_fairly() {
    for size in ["demo", "ucf101"] {
        let [latents, pixels] =
            ["latents", "pixels"].map(|space| diffusion(&format!("efficiency/{size}/{space}.yaml")));
        assert!(pixels.autoencoder == DiffusionSpace::Pixels && latents.autoencoder != DiffusionSpace::Pixels);
        let unet =
            UNetConfig { recompute: pixels.unet().unwrap().recompute.clone(), ..latents.unet().unwrap().clone() };
        assert_eq!(&unet, pixels.unet().unwrap(), "{size}");
        assert_eq!((latents.trainer.minutes, latents.trainer.steps), (pixels.trainer.minutes, pixels.trainer.steps));
        assert!(latents.trainer.minutes.is_some());
        let [a, b] = compared(&latents, &pixels).map(|count| count as f64);
        println!("{size}: {a} parameters on latents, {b} on pixels");
        assert!((a / b - 1.0).abs() < 0.01, "{size}: {a} and {b} parameters");
    }
}

/// Latents, a cascade and MCVD: the same clips, size for size, and as many minutes, which the cascade's stages share. Each
/// is as its own experiments have it.
#[test]
fn the_papers_opponents_are_compared_at_equal_time() {
    for (size, mcvd_alone) in [("demo", "mcvd/demo.yaml"), ("ucf101", "mcvd/ucf101.yaml")] {
        let [latents, base, cascade, mcvd] = ["latents", "cascade_base", "cascade", "mcvd"]
            .map(|run| diffusion(&format!("efficiency/{size}/{run}.yaml")));
        let minutes = |run: &DiffusionExperiment| run.trainer.minutes.unwrap();
        assert_eq!(minutes(&base) + minutes(&cascade), minutes(&latents), "{size}");
        assert_eq!(minutes(&mcvd), minutes(&latents), "{size}");
        for run in [&base, &cascade, &mcvd] {
            assert_eq!((run.seed, &run.data.dataset), (latents.seed, &latents.data.dataset), "{size}");
            // a learning rate that decays would do so over the steps, which nobody counts here
            assert_eq!(run.optimizer.decay, latents.optimizer.decay, "{size}");
        }
        let side = latents.data.resolution;
        assert_eq!([cascade.data.resolution, mcvd.data.resolution], [side; 2], "{size}");
        let stage = cascade.superresolution.as_ref().unwrap();
        assert_eq!(stage.resolution, base.data.resolution, "{size}");
        assert!(stage.base.ends_with(format!("runs/efficiency/{size}/cascade_base")), "{size}");
        let frames = latents.data.frames;
        assert_eq!([base.data.frames, cascade.data.frames], [frames; 2], "{size}");
        assert_eq!(mcvd.blocks.as_ref().unwrap().video_frames, Some(frames), "{size}");
        let alone = diffusion(mcvd_alone);
        assert_eq!((&mcvd.schedule, &mcvd.objective), (&alone.schedule, &alone.objective), "{size}");
        if size == "demo" {
            assert_eq!(mcvd.network, alone.network);
        } else {
            let [published, second] = ["base", "superresolution"].map(|run| diffusion(&format!("vdm/{run}.yaml")));
            for (run, published) in [(&base, &published), (&cascade, &second)] {
                assert_eq!(
                    (&run.network, &run.schedule, &run.objective),
                    (&published.network, &published.schedule, &published.objective)
                );
                assert_eq!((&run.optimizer, run.sampler), (&published.optimizer, published.sampler));
            }
        }
    }
}

/// Joint against factorized attention: nothing else differs.
#[test]
fn attention_is_compared_fairly() {
    for (factorized, joint) in [
        ("ablation/demo/factorized.yaml", "ablation/demo/joint.yaml"),
        ("ucf101/diffusion.yaml", "ablation/ucf101/joint.yaml"),
    ] {
        let [factorized, joint] = [factorized, joint].map(diffusion);
        assert_eq!(factorized.unet().unwrap().attention, AttentionKind::Factorized);
        assert_eq!(
            joint.unet().unwrap(),
            &UNetConfig { attention: AttentionKind::Joint, ..factorized.unet().unwrap().clone() }
        );
        assert_eq!(joint.trainer, factorized.trainer);
        assert_eq!((&joint.autoencoder, &joint.latents), (&factorized.autoencoder, &factorized.latents));
        let [a, b] = compared(&factorized, &joint);
        println!("{a} parameters with factorized attention, {b} with joint");
    }
}

/// Networks, noise paths and objectives: the same clips, latents, steps and seed; a network is the same in all its runs.
#[test]
fn networks_and_noise_paths_are_compared_fairly() {
    let of = |run: &str| diffusion(&format!("comparison/demo/{run}.yaml"));
    let same = |experiment: &DiffusionExperiment| {
        let DiffusionExperiment { seed, data, latents, autoencoder, trainer, .. } = experiment;
        serde_json::json!([seed, data, latents, autoencoder, trainer])
    };
    let unets = ["unet_noise", "unet_velocity", "unet_flow", "unet_class"].map(of);
    let lattes = ["latte", "latte_flow"].map(of);
    for runs in [&unets[..], &lattes] {
        for run in runs {
            assert_eq!(same(run), same(&unets[0]));
            assert_eq!((&run.network, &run.optimizer), (&runs[0].network, &runs[0].optimizer));
        }
    }
    let [noise, velocity, flow, class] = &unets;
    // the paper's network, noise and loss, and the demo's
    let paper = diffusion("ucf101/diffusion.yaml");
    assert_eq!((&noise.schedule, &noise.objective), (&paper.schedule, &paper.objective));
    let demo = diffusion("demo/diffusion.yaml");
    for run in [noise, velocity, class] {
        assert_eq!((&run.network, &run.schedule, &run.optimizer), (&demo.network, &demo.schedule, &demo.optimizer));
    }
    assert_eq!((&velocity.objective, &class.objective), (&demo.objective, &demo.objective));
    assert_eq!(unets.each_ref().map(|run| run.labels.is_some()), [false, false, false, true]);
    let [latte, latte_flow] = &lattes;
    let small = diffusion("latte/demo.yaml");
    assert_eq!(
        (&latte.network, &latte.schedule, &latte.objective, &latte.optimizer, latte.sampler),
        (&small.network, &small.schedule, &small.objective, &small.optimizer, small.sampler)
    );
    assert_eq!((&latte_flow.schedule, &latte_flow.objective), (&flow.schedule, &flow.objective));
}
