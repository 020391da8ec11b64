//! Families of models: one that this crate does not know goes through the sampling job and an evaluation, and a run is opened
//! by its task.

mod common;

use std::path::Path;

use anyhow::{Result, ensure};
use common::{FirstClips as _, moving_clips, source, write_generated, write_packed};
use lvdm::{
    data::DataConfig,
    diffusion::{Ddim, LongVideoPlan, SamplerChoice, SamplerConfig},
    distributed::Ranks,
    evaluation::{Evaluation, evaluate, evaluate_model},
    experiment::{ClassList, EvaluationExperiment, Generated, LongVideoConfig, Numerics, parse},
    metrics::Metric,
    models::{
        self, Accepts, Asked, Assignment, ClipId, FittedClips, Given, KnownClasses, LongVideo, LongVideoModel,
        SampleId, SamplingJob, Seeds, VideoModel,
    },
    random::{Purpose, normal},
};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;
const FRAMES: i64 = 10;
const SIDE: i64 = 16;

/// A linear map from a code of eight numbers to a video, with random weights; a class adds a code of its own.
struct Linear {
    /// `[8, 3·F·H·W]`.
    map: Tensor,
    /// `[classes, 8]`.
    classes: Tensor,
    /// How wide codes are spread.
    spread: f64,
    numerics: Numerics,
}

impl Linear {
    fn new() -> Self {
        Linear {
            map: normal(1, Purpose::SampleStart, 0, 0, &[8, 3 * FRAMES * SIDE * SIDE]),
            classes: normal(2, Purpose::SampleStart, 0, 0, &[2, 8]),
            spread: 1.0,
            numerics: Numerics::default(),
        }
    }
}

impl VideoModel for Linear {
    fn clip(&self) -> [i64; 4] {
        [3, FRAMES, SIDE, SIDE]
    }

    fn accepts(&self) -> Accepts {
        Accepts { text: None, classes: Some(KnownClasses { list: ClassList::Count(2), guidance: 1.0 }) }
    }

    fn check(&self, given: &Given) -> Result<()> {
        ensure!(given.text.is_none() && given.first_frames.is_none(), "a linear model is given nothing but classes");
        Ok(())
    }

    fn videos(&self, samples: &[SampleId], given: &Given, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        given.check_count(samples.len())?;
        let code = |id: &SampleId| normal(id.seed, Purpose::SampleStart, id.sample, 1, &[8]) * self.spread;
        let mut codes = Tensor::stack(&samples.iter().map(code).collect::<Vec<_>>(), 0);
        if let Some(classes) = &given.classes {
            codes += self.classes.index_select(0, &Tensor::from_slice(classes.numbers));
        }
        // row by row, so that a batch rounds as a single video does
        let rows = codes.split(1, 0);
        let videos = Tensor::cat(&rows.iter().map(|row| row.matmul(&self.map)).collect::<Vec<_>>(), 0);
        on_step(1, 1);
        Ok((videos.sigmoid() * 255.0).to_kind(Kind::Uint8).reshape([-1, 3, FRAMES, SIDE, SIDE]))
    }

    fn describe(&self) -> String {
        format!("a linear map of codes of deviation {}, {}", self.spread, self.numerics.words())
    }

    fn sampling(&self) -> Value {
        json!({"spread": self.spread})
    }

    fn step(&self) -> i64 {
        0
    }

    fn device(&self) -> Device {
        CPU
    }

    fn data(&self) -> Option<&DataConfig> {
        None
    }

    fn set_numerics(&mut self, numerics: Numerics) {
        self.numerics = numerics;
    }

    fn set_sampling(&mut self, choice: &SamplerChoice) -> Result<()> {
        let SamplerChoice::Settings(settings) = choice else { anyhow::bail!("a linear model has no samplers") };
        for (name, value) in settings {
            ensure!(name == "spread", "`{name}` is no setting of a linear model, which has `spread`");
            self.spread = serde_json::from_value(value.clone())?;
        }
        Ok(())
    }
}

/// The videos that a job makes in batches of this size.
fn made(model: &Linear, assignment: &Assignment, batch: u64) -> Tensor {
    let job = SamplingJob { model, assignment, seeds: Seeds::One(5), videos: 5, batch };
    let (mut numbers, mut clips, mut steps) = (Vec::new(), Vec::new(), 0);
    job.run(&Ranks::alone(), &mut |_, _, _| steps += 1, &mut |samples, made| {
        assert_eq!(made.size()[0], samples.len() as i64);
        numbers.extend(samples.to_vec());
        clips.push(made.shallow_clone());
        Ok(())
    })
    .unwrap();
    assert_eq!((numbers, steps), (vec![0, 1, 2, 3, 4], clips.len()));
    Tensor::cat(&clips, 0)
}

/// What is asked is dealt by the numbers of videos, and batches change nothing; what the model cannot be given is refused
/// before anything is made.
#[test]
fn a_foreign_family_goes_through_the_sampling_job() {
    let model = Linear::new();
    let in_turn = Assignment::new(&model, Asked::default()).unwrap();
    let all = made(&model, &in_turn, 5);
    assert_eq!(all, made(&model, &in_turn, 2));
    let second = Assignment::new(&model, Asked { classes: vec![1], ..Asked::default() }).unwrap();
    let of_second = made(&model, &second, 3);
    for i in 0..5 {
        assert_eq!(all.get(i) == of_second.get(i), i % 2 == 1, "video {i}");
    }
    let prompts = Asked { prompts: vec!["a".into()], ..Asked::default() };
    let error = Assignment::new(&model, prompts).err().unwrap().to_string();
    assert!(error.contains("nothing but classes"), "{error}");
}

fn experiment(at: &Path, generated: &str) -> EvaluationExperiment {
    let text = format!(
        "seed: 5\nevaluation: {{clips: 4, metrics: [fvd]}}\nreal: {{dataset: {{kind: packed, file: {0}/real.safetensors}}, frames: {FRAMES}, \
         resolution: {SIDE}}}\ngenerated: {generated}\nout: {0}/out\n",
        at.display()
    );
    parse("here", &text, &[]).unwrap()
}

/// Its figures are those of its videos out of a file, and say how it sampled.
#[test]
fn a_foreign_family_is_evaluated() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    write_packed(&at.join("real.safetensors"), 4, FRAMES, SIDE);
    let mut model = Linear::new();
    let of_run = |setting: &str, value: f64| {
        let mut experiment = experiment(at, "{kind: run, run: linear, batch: 3}");
        let settings = [(setting.to_string(), json!(value))].into_iter().collect();
        if let Generated::Run { sampler, .. } = &mut experiment.generated {
            *sampler = Some(SamplerChoice::Settings(settings));
        }
        experiment
    };
    let ranks = Ranks::alone();
    let measured = evaluate_model(&of_run("spread", 0.5), &mut model, CPU, &ranks).unwrap();
    let says = "weights of linear, step 0, a linear map of codes of deviation 0.5, f32, each class in turn, guidance 1";
    assert_eq!(measured.generated_text, says);
    assert!(!measured.figures.contains_key("gaussian") && measured.psnr_db.is_none());

    let in_turn = Assignment::new(&model, Asked::default()).unwrap();
    let videos = in_turn.videos(&model, &[0, 1, 2, 3], &Seeds::One(5), &mut |_, _| {}).unwrap();
    write_generated(&at.join("made.safetensors"), &videos);
    let data = format!("{{kind: packed, file: {}/made.safetensors}}", at.display());
    let of_file = format!("{{kind: clips, data: {{dataset: {data}, frames: {FRAMES}, resolution: {SIDE}}}}}");
    let from_file = evaluate(&experiment(at, &of_file), CPU, &ranks).unwrap();
    let fvd = |evaluation: &Evaluation| evaluation.figures["samples"].value(Metric::FVD).unwrap();
    let (run, file) = (fvd(&measured), fvd(&from_file));
    assert!((run / file - 1.0).abs() < 1e-4, "{run} and {file}");

    let error = evaluate_model(&of_run("steps", 3.0), &mut model, CPU, &ranks);
    assert!(format!("{:#}", error.unwrap_err()).contains("`steps` is no setting of a linear model"));
    let error = evaluate_model(&experiment(at, &of_file), &mut model, CPU, &ranks).unwrap_err().to_string();
    assert!(error.contains("generated.kind is run"), "{error}");
    assert_eq!(videos.size(), moving_clips(4, FRAMES, SIDE).size());
}

/// A model whose frames are whole numbers, each one more than the frame before it, or evenly between the two that are given.
struct Counting {
    model: Linear,
    /// From one frame of its clips to the next.
    step: i64,
}

impl LongVideoModel for Counting {
    fn model(&self) -> &dyn VideoModel {
        &self.model
    }

    fn frame(&self) -> ([i64; 3], Kind) {
        ([1, 2, 2], Kind::Int64)
    }

    fn fitted(&self, asked: &FittedClips, on_step: &mut dyn FnMut(usize, usize)) -> Result<Tensor> {
        assert_eq!(asked.given.size(), [asked.clips.len() as i64, 1, asked.places.len() as i64, 2, 2]);
        let clip = |(i, id): (usize, &ClipId)| {
            // the first given frame stands at its place; a clip that is given none begins with its video's number
            let (place, from) = match asked.places.first() {
                Some(place) => (*place, asked.given.get(i as i64).get(0).int64_value(&[0, 0, 0])),
                None => (0, 1000 * id.sample as i64),
            };
            let frames = (Tensor::arange(asked.length, (Kind::Int64, CPU)) - place) * self.step + from;
            frames.view([1, -1, 1, 1]).expand([1, -1, 2, 2], false)
        };
        on_step(1, 1);
        Ok(Tensor::stack(&asked.clips.iter().enumerate().map(clip).collect::<Vec<_>>(), 0))
    }

    fn decode_long(&self, z: &Tensor, hand_on: &mut dyn FnMut(&Tensor) -> Result<()>) -> Result<()> {
        let frames = z.get(0).expand([3, -1, 2, 2], false).to_kind(Kind::Uint8);
        frames.split(4, 1).iter().try_for_each(hand_on)
    }

    fn seams(&self, _: i64) -> Vec<(i64, i64)> {
        Vec::new()
    }
}

/// Long videos of a family that this crate does not know, of codes: autoregressive, and hierarchical with a second model.
#[test]
fn a_foreign_family_makes_long_videos() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let counting = |step| Box::new(Counting { model: Linear::new(), step }) as Box<dyn LongVideoModel>;
    for gap in [1, 3] {
        let text = format!("{{prediction: {0}, interpolation: {0}, batch: 5}}", at.display());
        let config: LongVideoConfig = serde_yaml::from_str(&text).unwrap();
        let plan = LongVideoPlan::for_frames(18, 4, 2, gap).unwrap();
        let between = (gap > 1).then(|| counting(1));
        let long = LongVideo::new(counting(gap), between, plan, 17, &config).unwrap();
        let state = at.join(format!("state-{gap}"));
        let made = long.latents(&[0, 3], 7, &state, &mut |_| {}).unwrap();
        let count = Tensor::arange(18, (Kind::Int64, CPU));
        let expected =
            Tensor::stack(&[&count, &(&count + 3000)], 0).view([2, 1, 18, 1, 1]).expand([2, 1, 18, 2, 2], false);
        assert_eq!(made, expected, "gap {gap}");
        let mut pieces = Vec::new();
        long.decode(&made.narrow(0, 0, 1), &mut |piece| {
            pieces.push(piece.copy());
            Ok(())
        })
        .unwrap();
        assert_eq!(Tensor::cat(&pieces, 1).size(), [3, 17, 2, 2]);
        // what was kept is read back as it was
        assert_eq!(long.latents(&[0, 3], 7, &state, &mut |_| panic!("made again")).unwrap(), expected);
        models::forget(&state).unwrap();
    }
}

/// A run is opened by its task, with its own sampler; another task is named with those that make videos.
#[test]
fn a_run_is_opened_by_its_task() {
    let run = |name: &str| source("tests/released_runs/runs").join(name);
    let error = models::open(&run("autoencoder"), CPU).err().unwrap().to_string();
    assert!(error.contains("the task autoencoder") && error.contains("diffusion"), "{error}");

    let mut model = models::open(&run("unconditional"), CPU).unwrap();
    let stored = lvdm::checkpoint::open_head(&run("unconditional")).unwrap().1.experiment;
    assert_eq!(model.sampling(), stored["sampler"]);
    assert_eq!(model.data().unwrap().frames, stored["data"]["frames"].as_i64().unwrap());
    let fewer = SamplerChoice::Settings([("steps".to_string(), json!(2))].into_iter().collect());
    model.set_sampling(&fewer).unwrap();
    assert_eq!(model.sampling()["steps"], 2);
    assert_eq!(model.sampling()["kind"], stored["sampler"]["kind"]);

    // what it samples is what its latents decode to, and what it cannot be given is said before
    let samples = [3, 4].map(|sample| SampleId { seed: 9, sample });
    let videos = model.videos(&samples, &Given::default(), &mut |_, _| {}).unwrap();
    let (plain, _) = models::LatentDiffusion::open(&run("unconditional"), CPU).unwrap();
    let sampler: SamplerConfig = serde_json::from_value(model.sampling()).unwrap();
    assert_eq!(sampler, Ddim { steps: 2, eta: 1.0 }.into());
    let z_0 = plain.latents(&[3, 4], &Default::default(), sampler, 9, &mut |_, _| {}).unwrap();
    assert_eq!(plain.decode(&z_0).unwrap(), videos);
    let asked = Asked { guidance: Some(2.0), ..Asked::default() };
    assert!(Assignment::new(&*model, asked).err().unwrap().to_string().contains("nothing to follow"));
    let asked = Asked { classes: vec![0], ..Asked::default() };
    assert!(Assignment::new(&*model, asked).err().unwrap().to_string().contains("knows no classes"));
}

/// Both stages of a cascade call a class by one number, so their lists are the same.
#[test]
fn a_base_of_other_classes_is_refused() {
    let settings = serde_json::from_value(json!({"base": "runs/base", "resolution": SIDE})).unwrap();
    let check = |classes: Option<ClassList>| models::check_base(&Linear::new(), &settings, classes.as_ref());
    let named = |names: &[&str]| Some(ClassList::Names(names.iter().map(ToString::to_string).collect()));
    for fits in [None, Some(ClassList::Count(2)), named(&["Run", "Swim"])] {
        check(fits).unwrap();
    }
    for other in [Some(ClassList::Count(3)), named(&["Run", "Swim", "Walk"])] {
        let error = check(other).unwrap_err().to_string();
        assert!(error.contains("runs/base tells apart the 2 classes 0 to 1, and this network"), "{error}");
    }
}
