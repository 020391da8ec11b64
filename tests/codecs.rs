//! A codec is one file: another one goes through everything that latent diffusion does, and is stored as what it is.

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Result, ensure};
use common::{largest_difference, moving_clips, write_packed};
use lvdm::{
    codecs::{CodecSettings, Encoded, EncodedKind, LatentSpace, LongDecoding, Normalization, VideoCodec},
    data::normalise,
    diffusion::{Ddim, SamplerConfig},
    distributed::Ranks,
    experiment::{AutoencoderExperiment, DiffusionExperiment, Numerics, parse},
    models::{Given, LatentDiffusion, SampleId, VideoModel},
    nn::{Parameters, Scope},
    random::{Purpose, normal_batch},
    safetensors::{read_safetensors, write_safetensors_atomically},
    train::{AutoencoderTask, DiffusionTask, LatentFile, Task, pack_latents},
};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

/// A causal codec: the first frame is a latent frame of its own, and each of the others stands for four. Latents are the
/// last frames of the groups, or their nearest grey levels.
#[derive(Debug, Clone, Copy)]
struct Causal {
    /// How many levels a codebook has; 0 where there is none.
    levels: i64,
}

impl CodecSettings for Causal {
    fn name(&self) -> &'static str {
        "causal codec"
    }

    fn latent_channels(&self) -> i64 {
        3
    }

    fn latent_shape(&self, frames: i64, height: i64, width: i64) -> Result<[i64; 4]> {
        ensure!(frames % 4 == 1, "a clip of 1 + 4k frames has a latent; one of {frames} has none");
        Ok([3, (frames - 1) / 4 + 1, height, width])
    }

    fn clip_shape(&self, [f, h, w]: [i64; 3]) -> [i64; 3] {
        [1 + 4 * (f - 1), h, w]
    }

    fn long_decoding(&self) -> LongDecoding {
        LongDecoding::Overlapping { reach: 4 }
    }

    fn encodes_to(&self) -> EncodedKind {
        EncodedKind::Exact
    }

    /// It computes nothing that is counted.
    fn flops(&self, _: i64, _: i64, _: i64) -> [i64; 2] {
        [0; 2]
    }

    fn build(&self, _: &Scope) -> Box<dyn VideoCodec> {
        Box::new(*self)
    }
}

impl VideoCodec for Causal {
    fn encode(&self, x: &Tensor) -> Encoded {
        let latent = x.slice(2, None, None, 4);
        if self.levels == 0 {
            return Encoded::Exact(latent);
        }
        let step = 2.0 / (self.levels - 1) as f64;
        let indices = ((&latent + 1.0) / step).round().to_kind(Kind::Int64);
        let z = indices.to_kind(Kind::Float) * step - 1.0;
        let commitment = (&latent - &z).square().flatten(1, -1).sum_dim_intlist([-1i64].as_slice(), false, None);
        Encoded::Codes { indices, z, commitment }
    }

    fn decode(&self, z: &Tensor) -> Tensor {
        let rest = z.narrow(2, 1, z.size()[2] - 1).repeat_interleave_self_int(4, 2, None);
        Tensor::cat(&[z.narrow(2, 0, 1), rest], 2)
    }

    fn settings(&self) -> &dyn CodecSettings {
        self
    }
}

fn space(levels: i64, clip: i64) -> LatentSpace {
    let normalization = Normalization { scale: 2.0, shift: 0.5 };
    LatentSpace::new(&Causal { levels }, BTreeMap::new(), normalization, clip, CPU).unwrap()
}

fn experiment(file: &Path) -> DiffusionExperiment {
    let text = format!(
        "
data: {{dataset: {{kind: packed, file: {}}}, frames: 9, resolution: 8}}
autoencoder: none
unet: {{channels: 8, multipliers: [1, 2], blocks_per_level: 1, attention_factors: [2], heads: 2, norm_groups: 4}}
optimizer: {{kind: adamw, learning_rate: 1.0e-4}}
trainer: {{steps: 1, batch: 2}}
",
        file.display()
    );
    parse("here", &text, &[]).unwrap()
}

/// 1 + 4k frames have 1 + k latent frames, and no other number has a latent. Clips whose groups are alike come back
/// whole, and so they do in chunks, which share a latent frame wherever they are cut.
#[test]
fn a_causal_codec_is_decoded_in_chunks_to_the_whole() {
    let settings = Causal { levels: 0 };
    assert_eq!([1, 5, 17, 16].map(|frames| settings.latent_frames(frames)), [Some(1), Some(2), Some(5), None]);
    for latent in 1..9 {
        let [f, h, w] = settings.clip_shape([latent, 8, 8]);
        assert_eq!(settings.latent_shape(f, h, w).unwrap(), [3, latent, 8, 8]);
    }
    let key = normalise(&moving_clips(1, 8, 8));
    for frames in 1..9 {
        let x = settings.decode(&key.narrow(2, 0, frames)); // [1, 3, 1 + 4·(frames − 1), 8, 8]
        for clip in 1..6 {
            let space = space(0, clip);
            let chunks = space.chunks();
            assert_eq!(chunks.frames_of(frames), x.size()[2]);
            for wanted in [x.size()[2], (x.size()[2] - 3).max(1)] {
                assert_eq!(chunks.latent_frames_for(wanted), frames, "{wanted} frames");
            }
            let z_0 = space.sample(&space.encode(&x), &x);
            assert!(largest_difference(&z_0, &((key.narrow(2, 0, frames) + 0.5) * 2.0)) < 1e-6);
            assert!(largest_difference(&space.decode(&z_0), &x) < 1e-6);
            let mut pieces = Vec::new();
            let mut keep = |piece: &Tensor| {
                pieces.push(piece.copy());
                Ok(())
            };
            space.decode_long(&z_0, &mut keep).unwrap();
            assert_eq!(pieces.len(), chunks.starts(frames).len());
            let whole = Tensor::cat(&pieces, 1).unsqueeze(0);
            assert!(largest_difference(&whole, &x) < 1e-6, "{frames} latent frames in chunks of {}", chunks.length);
        }
    }
}

/// Codes are latents to diffusion, and regularized in training by what they say themselves.
#[test]
fn codes_are_latents_with_a_commitment() {
    let x = normalise(&moving_clips(2, 9, 8));
    let space = space(5, 3);
    let encoded = space.encode(&x);
    let Encoded::Codes { indices, z, commitment } = &encoded else { panic!("{encoded:?}") };
    assert_eq!((indices.size(), indices.kind()), (vec![2, 3, 3, 8, 8], Kind::Int64));
    assert!(
        (0.0..=4.0).contains(&indices.max().double_value(&[])) && largest_difference(z, &x.slice(2, 0, 9, 4)) > 0.1
    );
    assert!(encoded.regularizer().equal(commitment) && commitment.min().double_value(&[]) > 0.0);
    let z_0 = space.sample(&encoded, z);
    let stacked = Encoded::of_stacked(EncodedKind::Exact, &encoded.stacked());
    assert!(z_0.equal(&space.normalization.normalise(z)) && space.sample(&stacked, z).equal(&z_0));
    assert!(space.decode(&z_0).allclose(&space.reconstruct(&x), 1e-5, 1e-6, false));
}

/// A denoiser trains and samples in the latent space of a codec that this crate does not know.
#[test]
fn a_denoiser_trains_and_samples_in_any_codecs_space() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("clips.safetensors");
    write_packed(&file, 2, 9, 8);
    let experiment = experiment(&file);
    let mut task = DiffusionTask::new(&experiment, space(0, 3), None, CPU, 0, true, &Ranks::alone()).unwrap();
    let batch = task.next_batch().unwrap();
    assert_eq!(batch.data.size(), [2, 3, 3, 8, 8]);
    let terms = task.gradients(0, &batch, 0, 1.0).unwrap();
    assert!(terms[0].1.double_value(&[]) > 0.0);

    let parameters = Parameters::new(CPU, 3);
    let mut generator = LatentDiffusion::new(&experiment, space(0, 3), None, &parameters).unwrap();
    parameters.freeze();
    let sampler: SamplerConfig = Ddim { steps: 2, eta: 0.0 }.into();
    generator.set_sampling(&sampler.into()).unwrap();
    let samples = [0, 1].map(|sample| SampleId { seed: 7, sample });
    let videos = generator.videos(&samples, &Given::default(), &mut |_, _| {}).unwrap();
    assert_eq!((videos.size(), generator.clip()), (vec![2, 3, 9, 8, 8], [3, 9, 8, 8]));
    let wrong = parse::<DiffusionExperiment>(
        "here",
        &serde_yaml::to_string(&experiment).unwrap(),
        &["data.frames=8".to_string()],
    );
    let error = LatentDiffusion::new(&wrong.unwrap(), space(0, 3), None, &Parameters::new(CPU, 3)).err().unwrap();
    assert!(error.to_string().contains("1 + 4k"), "{error:#}");
}

/// Latents without a variance are stored as they are, and drawn again as they were stored; a file that does not say what it
/// holds, as the first ones did, holds Gaussians.
#[test]
fn latents_are_stored_as_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_packed(&at("clips.safetensors"), 2, 9, 8);
    let experiment = experiment(&at("clips.safetensors"));
    let ranks = Ranks::alone();
    let space = space(0, 3);
    let pack = |space: &LatentSpace, out: &Path| {
        let numerics = Numerics::default();
        pack_latents(space, None, &experiment.data, 2, 5, numerics, out, &ranks, &mut |_| {}).unwrap();
    };
    pack(&space, &at("exact.safetensors"));
    let (tensors, told) = read_safetensors(&at("exact.safetensors")).unwrap();
    let mut told = told.unwrap();
    assert_eq!((tensors["latents"].size(), &told["encoded"]), (vec![2, 3, 3, 8, 8], &serde_json::json!("exact")));
    let open = |name: &str| LatentFile::open(&at(name), &space, None, 2, 1, 0, &ranks);
    let mut file = open("exact.safetensors").unwrap();
    assert_eq!((file.shape(), file.kind()), (vec![3, 3, 8, 8], EncodedKind::Exact));
    let drawn = file.next_batch().unwrap().data;
    assert!(drawn.equal(&tensors["latents"]) || drawn.flip([0]).equal(&tensors["latents"]));
    // what a step of training makes of them depends on no noise
    let noise = normal_batch(1, Purpose::Posterior, &[0, 1], 0, &[3, 3, 8, 8]);
    let z_0 = space.sample(&Encoded::of_stacked(file.kind(), &drawn), &noise);
    assert!(z_0.equal(&space.normalization.normalise(&drawn)));

    told.as_object_mut().unwrap().remove("encoded");
    let moments = Tensor::cat(&[&tensors["latents"], &tensors["latents"]], 1);
    write_safetensors_atomically(&at("former.safetensors"), &[("moments", moments)], &told).unwrap();
    let former = open("former.safetensors").unwrap();
    assert_eq!((former.shape(), former.kind()), (vec![3, 3, 8, 8], EncodedKind::Gaussian));
    fs::remove_file(at("exact.safetensors")).unwrap();
    write_safetensors_atomically(&at("exact.safetensors"), &[("latents", tensors["latents"].copy())], &told).unwrap();
    assert!(open("exact.safetensors").err().unwrap().to_string().contains("does not hold latents"));
}

/// The autoencoder that is trained is the one that `kind` says, and the video autoencoder where nothing does; what a run
/// stores says it.
#[test]
fn another_autoencoder_is_trained_by_its_kind() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("clips.safetensors");
    write_packed(&file, 2, 2, 32);
    let text = format!(
        "
data: {{dataset: {{kind: packed, file: {}}}, frames: 2, resolution: 32}}
autoencoder: {{kind: image_autoencoder, widths: [8, 16], blocks_per_level: 1, norm_groups: 4}}
loss: {{perceptual_weight: 0, kl_weight: 1.0e-6, adversarial_start: 0, discriminator: {{channels: 4, layers: 2}}}}
optimizer: {{kind: adam, learning_rate: 1.0e-4}}
trainer: {{steps: 1, batch: 2}}
",
        file.display()
    );
    let read = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        parse::<AutoencoderExperiment>("here", &text, &overrides)
    };
    let experiment = read(&[]).unwrap();
    assert_eq!(experiment.autoencoder.latent_shape(2, 32, 32).unwrap(), [4, 2, 16, 16]);
    let mut task = AutoencoderTask::new(&experiment, CPU, 0, &Ranks::alone()).unwrap();
    let batch = task.next_batch().unwrap();
    for phase in 0..2 {
        let terms = task.gradients(phase, &batch, 0, 1.0).unwrap();
        assert!(terms.iter().all(|(name, value)| value.double_value(&[]).is_finite() || panic!("{name}")));
    }
    let gradients = task.networks()[0].parameters.trainable();
    assert!(gradients.iter().all(|(name, tensor)| tensor.grad().defined() || panic!("{name} has no gradient")));

    let stored = serde_json::to_value(&experiment).unwrap();
    assert_eq!(stored["autoencoder"]["kind"], "image_autoencoder");
    let error = read(&["autoencoder.kind=vq"]).unwrap_err().to_string();
    assert!(error.contains("`vq`") && error.contains("`image_autoencoder`"), "{error}");
    let error = read(&["autoencoder.norm_group=4"]).unwrap_err().to_string();
    assert!(error.contains("autoencoder.norm_group`") && error.contains("did you mean `norm_groups`"), "{error}");
    // pixels have nothing to train
    let error = read(&["autoencoder={kind: pixels}"]).unwrap_err().to_string();
    assert!(error.contains("`pixels`") && error.contains("`video_autoencoder`"), "{error}");
}
