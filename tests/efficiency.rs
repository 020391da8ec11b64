//! Diffusion on pixels from training to figures, and what `lvdm report efficiency` says of it beside latents.

mod common;

use std::{fs, path::Path};

use common::{run_in, succeed_in, write_packed};
use lvdm::{
    data::{ClipSpec, Fit, Numpy, VideoDataset},
    safetensors::read_safetensors,
};
use serde_json::Value;
use tch::Tensor;

const SPACES: [(&str, &str); 2] = [("latents", "runs/autoencoder"), ("pixels", "pixels")];

/// Next to no training, on latents and on pixels.
fn runs(at: &Path) {
    write_packed(&at.join("clips.safetensors"), 8, 16, 16);
    let data = "data: {dataset: {kind: packed, file: clips.safetensors}, frames: 16, resolution: 16}\n\
                optimizer: {kind: adam, learning_rate: 1.0e-3}\n\
                trainer: {steps: 3, batch: 2, device: cpu, log_every: 1, picture_every: 9}\n";
    let autoencoder = "autoencoder: {channels: 8, factors: [2, 4, 4], norm_groups: 8}\n\
                       loss: {perceptual_weight: 0.0, adversarial_weight: 0.0}\n";
    fs::write(at.join("autoencoder.yaml"), [data, autoencoder].concat()).unwrap();
    succeed_in(at, &["train", "autoencoder", "autoencoder.yaml"]);
    for (space, autoencoder) in SPACES {
        let diffusion = format!(
            "autoencoder: {autoencoder}\n\
             unet: {{channels: 32, multipliers: [1], blocks_per_level: 1, attention_factors: [1], heads: 2}}\n\
             sampler: {{kind: ddim, steps: 2, eta: 1.0}}\n"
        );
        fs::write(at.join(format!("{space}.yaml")), [data, &diffusion].concat()).unwrap();
        succeed_in(at, &["train", "diffusion", &format!("{space}.yaml")]);
    }
}

fn evaluate(at: &Path, run: &str, clips: &str, out: &str) {
    let run = format!("runs/{run}");
    let arguments = ["evaluate", "--real", "clips.safetensors", "--generated", &run, "--clips", clips, "--out", out];
    succeed_in(at, &arguments);
}

fn report(at: &Path) -> [Value; 2] {
    let said = succeed_in(at, &["report", "efficiency", "--json", "--videos", "2", "runs/latents", "runs/pixels"]);
    let rows: Vec<Value> = said.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    rows.try_into().unwrap()
}

#[test]
fn latents_and_pixels_side_by_side() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    runs(at);
    // pixels sample and evaluate like latents; a sample does not depend on its batch
    for (batch, out) in [("1", "one.safetensors"), ("3", "three.safetensors")] {
        let sample = ["sample", "runs/pixels", "--videos", "3", "--steps", "2", "--batch", batch, "--out", out];
        succeed_in(at, &sample);
    }
    let clips = |file: &str| read_safetensors(&at.join(file)).unwrap().0["clips"].shallow_clone();
    assert_eq!(clips("one.safetensors").size(), [3, 3, 16, 16, 16]);
    assert!(clips("one.safetensors").equal(&clips("three.safetensors")));
    // the same for other projects
    succeed_in(at, &["sample", "runs/pixels", "--videos", "3", "--steps", "2", "--out", "three.npz"]);
    let clip = ClipSpec { frames: 16, frame_stride: 1, resolution: 16, fit: Fit::default() };
    let videos = Numpy { file: at.join("three.npz") }.videos(&clip).unwrap().videos;
    assert_eq!(videos.len(), 3);
    for (i, video) in videos.iter().enumerate() {
        let frames = video.source.open().unwrap().read(0, 16, 1).unwrap();
        let frames: Vec<Tensor> = frames.iter().map(|frame| frame.to_tensor()).collect(); // [H, W, 3] each
        let found = Tensor::stack(&frames, 0).permute([3, 0, 1, 2]);
        assert!(found.equal(&clips("three.safetensors").get(i as i64)));
    }
    let said = run_in(at, &["export", "runs/pixels", "--out", "released.safetensors"]);
    assert!(said.error(2).contains("pixels"), "{}", said.err);

    evaluate(at, "latents", "4", "runs/latents/evaluation");
    // one that says it is of another run is nobody else's
    evaluate(at, "pixels", "4", "runs/latents/of-pixels");
    let [latents, pixels] = report(at);
    assert_eq!(latents["figures"].as_array().unwrap().len(), 1);
    assert_eq!(pixels["figures"].as_array().unwrap().len(), 0);
    for row in [&latents, &pixels] {
        for key in ["parameters", "steps", "seconds_per_step", "seconds_per_video", "step_memory", "video_memory"] {
            assert!(row[key].as_f64().unwrap() > 0.0, "{key} in {row}");
        }
    }
    assert_eq!((pixels["steps"].as_i64(), pixels["autoencoder_parameters"].as_i64()), (Some(3), Some(0)));
    assert!(latents["autoencoder_parameters"].as_i64().unwrap() > 0);
    // the page knows what was trained by the checkpoints, and counts the same parameters
    succeed_in(at, &["report", "runs"]);
    let page = fs::read_to_string(at.join("report.html")).unwrap();
    for heading in ["Autoencoder: autoencoder", "Diffusion: latents, pixels"] {
        assert!(page.contains(&format!("<h3>{heading}</h3>")), "`{heading}` is not in the page");
    }
    for (run, row) in [("latents", &latents), ("pixels", &pixels)] {
        let parameters = lvdm::report::with_commas(row["parameters"].as_i64().unwrap());
        let cells = format!("<th>{run}</th><td class=\"n\">{parameters}</td><td class=\"n\">3</td>");
        assert!(page.contains(&cells), "`{cells}` is not in the page");
    }
    let parameters = lvdm::report::with_commas(latents["autoencoder_parameters"].as_i64().unwrap());
    assert!(page.contains(&format!("<th>autoencoder</th><td class=\"n\">{parameters}</td>")), "{parameters}");
    // 128 times as many positions
    assert!(pixels["step_memory"].as_i64() > latents["step_memory"].as_i64());
    let hash = latents["figures"][0]["protocol_hash"].as_str().unwrap();
    let stored: Value =
        serde_json::from_slice(&fs::read(at.join("runs/latents/evaluation/figures.json")).unwrap()).unwrap();
    assert_eq!(stored["protocol_hash"], hash);
    assert_eq!(stored["figures"]["samples"], latents["figures"][0]["figure"]);

    let evaluation = latents["figures"][0]["evaluation"].as_str().unwrap();
    assert_eq!((evaluation, &latents["figures"][0]["generated"]), ("runs/latents/evaluation", &stored["generated"]));

    let table =
        |more: &[&str]| succeed_in(at, &[&["report", "efficiency", "runs/latents", "runs/pixels"], more].concat()).out;
    let said = table(&["--videos", "0"]);
    assert!(said.contains("runs/pixels: FVD and KVD not measured") && !said.contains("protocols"), "{said}");
    assert_eq!(said.lines().filter(|line| line.matches("not measured").count() == 3).count(), 2, "{said}");
    assert!(said.contains(hash), "{said}");
    // figures of two protocols stand together only with a warning
    evaluate(at, "pixels", "5", "runs/pixels/evaluation");
    let said = table(&["--videos", "1"]);
    println!("{said}");
    assert!(said.contains("come from 2 protocols: compare only those of one"), "{said}");
    assert!(!said.contains("not measured"), "{said}");
    // of one run sampled in two ways each row says which it is
    fs::write(
        at.join("again.yaml"),
        "evaluation: {clips: 4}\nreal: {dataset: {kind: packed, file: clips.safetensors}, frames: 16, resolution: 16}\n\
         generated: {kind: run, run: runs/latents, sampler: {kind: unipc, steps: 3}}\nout: runs/latents/unipc\n",
    )
    .unwrap();
    succeed_in(at, &["evaluate", "again.yaml"]);
    let said = table(&["--videos", "0"]);
    for (folder, how) in [("evaluation", "DDIM 2 steps, η = 1, f32"), ("unipc", "UniPC 3 steps, f32")] {
        let row = said.lines().find(|line| line.starts_with(&format!("runs/latents/{folder} "))).unwrap();
        assert!(row.contains(&format!("weights of runs/latents, step 3, {how}")), "{said}");
    }
    // trainings that differ in their seed alone have a line together, in the table and on the page
    assert!(!said.contains("in their seed alone"), "{said}");
    succeed_in(at, &["train", "diffusion", "latents.yaml", "seed=1", "--run", "runs/other"]);
    evaluate(at, "other", "4", "runs/other/evaluation");
    let said =
        succeed_in(at, &["report", "efficiency", "--videos", "0", "runs/latents", "runs/other", "runs/pixels"]).out;
    let line = said.lines().find(|line| line.contains("over 2 trainings")).unwrap();
    assert!(line.ends_with(": runs/latents/evaluation, runs/other/evaluation"), "{line}");
    succeed_in(at, &["report", "runs/latents", "runs/other"]);
    let page = fs::read_to_string(at.join("report.html")).unwrap();
    assert!(page.contains("<th>latents/evaluation, other/evaluation</th><td class=\"n\">2</td>"), "{line}");
    let said = run_in(at, &["report", "efficiency", "runs/nothing"]);
    assert!(said.error(2).contains("runs/nothing"), "{}", said.err);
}
