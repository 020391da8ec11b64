//! A codec is one file: another one goes through everything that latent diffusion does, and is stored as what it is.

mod common;

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Result, ensure};
use common::{largest_difference, moving_clips, relative_error, write_packed};
use lvdm::{
    autoencoder_loss::{CodecLossSettings, TatsDiscriminator, TatsLossConfig},
    codecs::{
        Codebook, CodebookConfig, CodecSettings, Encoded, EncodedKind, LatentSpace, LongDecoding, Normalization,
        VideoCodec, VqganConfig, VqganNorm,
    },
    data::normalise,
    diffusion::{Ddim, SamplerConfig},
    distributed::Ranks,
    experiment::{AutoencoderExperiment, DiffusionExperiment, Numerics, parse},
    models::{Given, LatentDiffusion, SampleId, VideoModel},
    nn::{Parameters, Scope},
    random::{Purpose, normal_batch},
    safetensors::{read_safetensors, write_safetensors_atomically},
    train::{AutoencoderTask, DiffusionTask, LatentFile, Task, pack_latents},
    weights::synthesize,
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
    let drawn = task.draw(0, &batch).unwrap();
    let terms = task.gradients(0, (&batch, &drawn), 0, 1.0).unwrap();
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
    assert_eq!((file.shape(), file.kind()), (&[3, 3, 8, 8][..], EncodedKind::Exact));
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
    assert_eq!((former.shape(), former.kind()), (&[3, 3, 8, 8][..], EncodedKind::Gaussian));
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
        let drawn = task.draw(phase, &batch).unwrap();
        let terms = task.gradients(phase, (&batch, &drawn), 0, 1.0).unwrap();
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

fn small_vqgan(norm: VqganNorm, codes: i64) -> VqganConfig {
    let codebook = CodebookConfig { codes, ..CodebookConfig::default() };
    let channels = if norm == VqganNorm::Group { 16 } else { 4 };
    VqganConfig { channels, factors: [2, 4, 4], latent_channels: 8, norm, codebook }
}

/// The released networks have as many parameters.
#[test]
fn tats_networks_have_the_published_sizes() {
    let count = |declare: &dyn Fn(&Parameters)| {
        let parameters = Parameters::unfilled(CPU);
        declare(&parameters);
        parameters.count()
    };
    assert_eq!(count(&|parameters| drop(VqganConfig::default().build(&parameters.root()))), 23_652_227);
    let of_frames = |p: &Parameters| drop(TatsDiscriminator::of_frames(&p.root(), 3, 64, 3));
    let of_clips = |p: &Parameters| drop(TatsDiscriminator::of_clips(&p.root(), 3, 64, 3));
    assert_eq!([count(&of_frames), count(&of_clips)], [2_766_529, 11_057_857]);
    assert_eq!(count(&|p| drop(TatsLossConfig::default().discriminators(&p.root()))), 2_766_529 + 11_057_857);
}

/// Codes are all that decoding needs; what a clip is encoded to does not depend on the others of a batch, and with running
/// statistics a long latent is decoded in chunks to the whole.
#[test]
fn a_clip_is_its_codes() {
    for norm in [VqganNorm::Batch, VqganNorm::Group] {
        let settings = small_vqgan(norm, 24);
        let parameters = Parameters::new(CPU, 1);
        drop(settings.build(&parameters.root()));
        let weights = synthesize(&parameters.named(), "");
        let mut space = LatentSpace::new(&settings, weights, Normalization { scale: 2.0, shift: 0.5 }, 4, CPU).unwrap();
        let x = normalise(&moving_clips(2, 24, 16));
        let Encoded::Codes { indices, z, commitment } = space.encode(&x) else { panic!("codes are wanted") };
        assert_eq!((indices.size(), commitment.size()), (vec![2, 12, 4, 4], vec![2]));
        assert_eq!(settings.latent_shape(24, 16, 16).unwrap(), z.size()[1..]);
        let z_0 = space.of_codes(&indices).unwrap();
        assert!(space.normalization.normalise(&z).equal(&z_0));
        assert!(relative_error(&space.decode(&z_0), &space.reconstruct(&x)) < 1e-5);
        let Encoded::Codes { indices: alone, .. } = space.encode(&x.narrow(0, 1, 1)) else { panic!() };
        assert!(alone.equal(&indices.narrow(0, 1, 1)), "{norm:?}");
        // chunks that share more frames than feel their edges
        space.clip = 36;
        let long = space.of_codes(&indices.narrow(0, 0, 1).repeat([1, 4, 1, 1])).unwrap(); // [1, C, 48, 4, 4]
        let mut pieces = Vec::new();
        let mut keep = |piece: &Tensor| {
            pieces.push(piece.copy());
            Ok(())
        };
        space.decode_long(&long, &mut keep).unwrap();
        let difference = relative_error(&Tensor::cat(&pieces, 1).unsqueeze(0), &space.decode(&long));
        assert!(pieces.len() > 1 && (difference < 1e-5) == (norm == VqganNorm::Batch), "{norm:?}: {difference}");
    }
    let pixels = LatentSpace::pixels(CPU);
    let error = pixels.of_codes(&Tensor::zeros([1, 1, 1, 1], (Kind::Int64, CPU))).unwrap_err().to_string();
    assert!(error.contains("pixels has no codebook"), "{error}");
}

/// A codebook's tensors by name.
fn codebook_of(parameters: &Parameters) -> BTreeMap<String, Tensor> {
    parameters.named().into_iter().map(|(name, tensor)| (name, tensor.copy())).collect()
}

/// The first batch that is learnt from takes the codebook's place; the encoder gets the gradient by the vectors, and the
/// codebook none. A pass that does not learn moves nothing.
#[test]
fn a_codebook_begins_with_its_first_batch() {
    for (codes, frames) in [(8, 3), (100, 2)] {
        let parameters = Parameters::new(CPU, 1);
        let config = CodebookConfig { codes, ..CodebookConfig::default() };
        let mut codebook = Codebook::new(&parameters.root(), 4, &config);
        codebook.begin_training(&Ranks::alone(), 3);
        let z = normal_batch(1, Purpose::Evaluation, &[0, 1], 0, &[4, frames, 3, 2]).set_requires_grad(true);
        let rows = z.detach().permute([0, 2, 3, 4, 1]).reshape([-1, 4]);
        let at_first = codebook_of(&parameters);
        codebook.quantize(&z, false);
        assert!(codebook_of(&parameters)["embeddings"].equal(&at_first["embeddings"]));

        let Encoded::Codes { z: vectors, commitment, indices } = codebook.quantize(&z, true) else { panic!() };
        let begun = codebook_of(&parameters);
        assert!(
            begun["N"].equal(&Tensor::ones([codes], (Kind::Float, CPU))) && begun["z_avg"].equal(&begun["embeddings"])
        );
        // each entry is a vector of the batch, where there are too few but for a little noise, and no two are the same
        let distance = |a: &Tensor, b: &Tensor| {
            (a.unsqueeze(1) - b.unsqueeze(0)).square().sum_dim_intlist([2i64].as_slice(), false, None).sqrt()
        };
        let nearest = distance(&begun["embeddings"], &rows).min_dim(1, false).0;
        let noise = nearest.max().double_value(&[]);
        let few = rows.size()[0] < codes;
        assert!(if few { (1e-4..0.05).contains(&noise) } else { noise < 1e-6 }, "{codes} codes: {noise}");
        let each_other = distance(&begun["embeddings"], &begun["embeddings"]) + Tensor::eye(codes, (Kind::Float, CPU));
        assert!(each_other.min().double_value(&[]) > 1e-5);

        let weight = normal_batch(1, Purpose::Evaluation, &[2, 3], 0, &[4, frames, 3, 2]);
        (&vectors * &weight).sum(None).backward();
        assert!(z.grad().equal(&weight) && !parameters.named()[0].1.requires_grad());
        let chosen = codebook.vectors(&indices);
        assert!(largest_difference(&vectors, &chosen) < 1e-6);
        let wanted = (&z - &chosen).square().flatten(1, -1).mean_dim([1i64].as_slice(), false, None) * 0.25;
        assert!(largest_difference(&commitment, &wanted) < 1e-7);

        // twice the same batch is one update of twice as many vectors: n = 2 · counts
        codebook.quantize(&z, true);
        codebook.update(0);
        let moved = codebook_of(&parameters);
        let n = moved["N"].sum(None).double_value(&[]);
        assert!((n - (0.99 * codes as f64 + 0.01 * 2.0 * rows.size()[0] as f64)).abs() < 1e-4, "{n}");
        codebook.update(1);
        assert!(codebook_of(&parameters)["N"].equal(&moved["N"]), "nothing was gathered");

        // a first step that is left out: the trainer takes the codebook back, and the next batch is its first
        for (name, mut tensor) in parameters.named() {
            tensor.copy_(&at_first[&name]);
        }
        codebook.quantize(&(&z.detach() + 5.0), true);
        let again = codebook_of(&parameters);
        assert!(again["N"].equal(&Tensor::ones([codes], (Kind::Float, CPU))));
        assert!(largest_difference(&again["embeddings"], &(&begun["embeddings"] + 5.0)) < 1e-5);
    }
}

/// An entry that fewer than one vector a step chooses becomes one of the batch's, where that is asked for; its averages stay.
#[test]
fn unused_entries_restart() {
    let after = |restart: bool| {
        let parameters = Parameters::new(CPU, 1);
        let config = CodebookConfig { codes: 4, restart, ..CodebookConfig::default() };
        let codebook = Codebook::new(&parameters.root(), 2, &config);
        let entries = Tensor::from_slice(&[0f32, 0.0, 1.0, 1.0, 50.0, 50.0, 60.0, 60.0]).reshape([4, 2]);
        let counts = Tensor::from_slice(&[5f32, 5.0, 0.5, 5.0]);
        let sums = &entries * counts.unsqueeze(1);
        let values = [("embeddings", entries), ("N", counts), ("z_avg", sums)];
        parameters.load(&values.map(|(name, t)| (name.to_string(), t)).into()).unwrap();
        let z = Tensor::from_slice(&[0.1f32, 0.9, 0.0, 1.1, 0.2, 1.0, 0.1, 0.9]).reshape([1, 2, 1, 2, 2]);
        codebook.quantize(&z, true);
        codebook.update(0);
        assert_eq!(codebook.dead().double_value(&[]), 1.0);
        (codebook_of(&parameters), z.permute([0, 2, 3, 4, 1]).reshape([-1, 2]))
    };
    let ((kept, _), (restarted, rows)) = (after(false), after(true));
    let row = |found: &BTreeMap<String, Tensor>, i: i64| found["embeddings"].get(i);
    assert!((row(&kept, 2) - 50.0).abs().max().double_value(&[]) < 1e-2);
    assert!((0..4).any(|i| row(&restarted, 2).equal(&rows.get(i))), "{:?}", row(&restarted, 2));
    assert!([0, 1, 3].iter().all(|&i| row(&kept, i).equal(&row(&restarted, i))));
    assert!(kept["N"].equal(&restarted["N"]) && kept["z_avg"].equal(&restarted["z_avg"]));
}

/// Without a weight nothing would hold an encoder to its codebook, which is said before training.
#[test]
fn a_codebook_needs_its_commitment() {
    let text = "
data: {dataset: {kind: packed, file: clips.safetensors}, frames: 4, resolution: 32}
autoencoder: {kind: vqgan, channels: 4, factors: [2, 4, 4]}
optimizer: {kind: adam, learning_rate: 1.0e-4}
trainer: {steps: 1, batch: 2}
";
    let check = |overrides: &[&str]| {
        let overrides: Vec<String> = overrides.iter().map(|text| text.to_string()).collect();
        parse::<AutoencoderExperiment>("here", text, &overrides).unwrap().check_settings()
    };
    let error = check(&[]).unwrap_err().to_string();
    assert!(error.contains("loss: {kind: tats}"), "{error}");
    check(&["loss.kl_weight=1.0"]).unwrap();
    check(&["loss.kind=tats"]).unwrap();
    for (wrong, words) in [
        ("loss={kind: tats, video_weight: -1}", "video_weight is a weight of 0 or more"),
        ("loss={kind: tats, video_weight: 0, image_weight: 0}", "matching_weight needs discriminators"),
        ("autoencoder.codebook.codes=1", "codes must be at least 2"),
        ("trainer.ema_decay=0.99", "trainer.ema_decay: the codebook"),
        ("autoencoder.codebook.decay=1", "decay lies in [0, 1)"),
        ("autoencoder.norm=group", "32 groups"),
    ] {
        let error = format!("{:#}", check(&["loss.kind=tats", wrong]).unwrap_err());
        assert!(error.contains(words), "{wrong}: {error}");
    }
}
