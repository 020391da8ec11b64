//! `lvdm plan`: what a training will need, before anything is loaded.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{
    codecs::CodecConfig,
    experiment::{AutoencoderExperiment, UserError, read},
    plan::{self, Activations, Card, Plan, PlanOptions, Variant},
    report::with_commas,
};

/// What a training will need: parameters, operations, memory, hours, and which cards it fits
///
/// Nothing is loaded: neither videos nor weights need be there. Activations are counted in forward passes over the smallest
/// clips on this machine's CPU, and scaled. Hours are operations over a card's peak times --utilisation, which is an
/// assumption of yours: nothing is measured.
#[derive(Debug, clap::Args)]
pub struct PlanTraining {
    /// Experiment files of `lvdm train` (YAML), then replaced settings, key.path=value
    #[arg(required = true)]
    files: Vec<String>,
    /// Memory of another card, in GB (2^30 bytes); may be given several times
    #[arg(long, value_name = "GB")]
    device_memory: Vec<f64>,
    /// GPUs that train together
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    ranks: i64,
    /// Share of a card's peak that the training is assumed to reach
    #[arg(long, default_value_t = 0.3)]
    utilisation: f64,
    /// Codec of a denoiser whose autoencoder run is neither there nor has an experiment: an experiment file of `lvdm train
    /// autoencoder`, or settings such as '{kind: image_autoencoder}'
    #[arg(long, value_name = "FILE|SETTINGS")]
    autoencoder: Option<String>,
    /// A row of a Markdown table for each file
    #[arg(long)]
    markdown: bool,
}

/// Cards of the Markdown table: the batch that fits is said for each.
const COLUMNS: [&str; 3] = ["RTX 4090", "A100 40 GB", "H100"];

impl PlanTraining {
    /// # Errors
    /// [`UserError`] for what the user wrote; sizes that do not fit together.
    pub fn run(self) -> Result<()> {
        if !(self.utilisation > 0.0 && self.utilisation <= 1.0) {
            let given = self.utilisation;
            return Err(
                UserError(format!("--utilisation is a share of the peak, above 0 and at most 1, not {given}")).into()
            );
        }
        if let Some(given) = self.device_memory.iter().find(|gib| !(**gib > 0.0 && **gib < 1e6)) {
            return Err(UserError(format!("--device-memory is a number of GB, not {given}")).into());
        }
        let is_override = |text: &&String| text.contains('=') && !Path::new(text).exists();
        let (overrides, files): (Vec<&String>, Vec<&String>) = self.files.iter().partition(is_override);
        let overrides: Vec<String> = overrides.into_iter().cloned().collect();
        if files.is_empty() {
            return Err(UserError("no experiment file is given".into()).into());
        }
        let codec = self.autoencoder.as_deref().map(codec).transpose()?;
        let options = PlanOptions { codec, ..PlanOptions::default() };
        if self.markdown {
            say!("{}", HEAD.join("\n"));
        }
        for file in files {
            let plan = plan::of(Path::new(file), &overrides, &options).with_context(|| file.clone())?;
            if self.markdown {
                say!("{}", self.row(file, &plan));
            } else {
                self.print(file, &plan);
            }
        }
        Ok(())
    }

    fn print(&self, file: &str, plan: &Plan) {
        let trainer = &plan.trainer;
        say!("{file}: {}", plan.title);
        for note in &plan.notes {
            say!("  {note}");
        }
        say!("");
        let (all, trained) = (with_commas(plan.parameters), with_commas(plan.trained));
        say!("parameters       {all}, of which training moves {trained}");
        if plan.frozen > 0 {
            say!("frozen networks  {}", with_commas(plan.frozen));
        }
        say!(
            "operations       {} forward, {} in a training step, for each clip",
            flops(plan.forward),
            flops(plan.step)
        );
        let clips = plan.clips(self.ranks);
        say!(
            "a step           {clips} clips (batch {} × {} passes × {} GPUs), {} on each GPU",
            trainer.batch,
            trainer.accumulate,
            self.ranks,
            flops(plan.step * plan.clips(1))
        );
        say!("");
        say!(
            "memory on each GPU, in GB (2^30 bytes); weights and moments in float32, products in {}",
            plan.precision()
        );
        for (what, bytes) in plan.state() {
            say!("  {what:24} {:>8}", gigabytes(bytes));
        }
        for variant in &plan.activations {
            let Variant { recompute, kept } = variant;
            let what = if recompute.is_empty() { "activations".into() } else { format!("  recompute: {recompute}") };
            if !recompute.is_empty() && std::ptr::eq(variant, &plan.activations[0]) {
                say!("  activations of {} clips", trainer.batch);
            }
            say!("  {what:24} {:>8}   {}", gigabytes(kept.bytes(trainer.batch)), formula(kept));
        }
        let own = &plan.activations[0].kept;
        say!("  {:24} {:>8}", "together", gigabytes(plan.state_bytes() + own.bytes(trainer.batch)));
        say!("");
        let others: Vec<&Variant> = plan.activations.iter().collect();
        let batch_of = |variant: &Variant| match variant.recompute.as_str() {
            "" => "batch".to_string(),
            recompute => format!("batch, recompute: {recompute}"),
        };
        let heads: Vec<String> = others.iter().map(|variant| format!("{:>24}", batch_of(variant))).collect();
        say!(
            "{:12} {:>6} {}   hours for {} steps at {} % of the peak",
            "card",
            "GB",
            heads.join(" "),
            with_commas(trainer.steps),
            100.0 * self.utilisation
        );
        for card in Card::known().into_iter().chain(self.device_memory.iter().map(|&gib| Card::of_memory(gib))) {
            let batches = others.iter().map(|variant| format!("{:>24}", fits(plan, &card, &variant.kept)));
            let hours = plan.hours(&card, self.utilisation).map_or("–".into(), hours_text);
            let memory = card.memory >> 30;
            say!("{:12} {memory:>6} {}   {hours}", card.name, batches.collect::<Vec<_>>().join(" "));
        }
        say!(
            "A batch is what fits {} % of the memory; what the codec needs while it encodes is not counted.",
            100.0 * Card::USABLE
        );
        say!("");
    }

    fn row(&self, file: &str, plan: &Plan) -> String {
        let name = file.trim_start_matches("experiments/").trim_end_matches(".yaml");
        let cards = Card::known();
        let named = |name: &str| cards.iter().find(|card| card.name == name).expect("a card of the list");
        let own = &plan.activations[0];
        let other = plan.activations.iter().find(|other| other.recompute != own.recompute);
        let clip = |variant: &Variant| gigabytes(variant.kept.clip);
        let activations = match (own.recompute.as_str(), other) {
            ("false", Some(other)) => format!("{} ({})", clip(own), clip(other)),
            (_, Some(other)) => format!("{} ({})", clip(other), clip(own)),
            (_, None) => clip(own),
        };
        let batches = COLUMNS.map(|name| fits(plan, named(name), &own.kept));
        let hours = plan.hours(named("H100"), self.utilisation).map_or("–".into(), hours_text);
        format!(
            "| {name} | {} | {} | {} | {} | {activations} | {} | {} | {} |",
            with_commas(plan.parameters),
            with_commas(plan.trained),
            flops(plan.step),
            gigabytes(plan.state_bytes() + own.kept.fixed),
            plan.clips(self.ranks),
            batches.join(" / "),
            hours,
        )
    }
}

const HEAD: [&str; 2] = [
    "| experiment | parameters | trained | operations a clip and step | GB without clips | GB a clip (recomputed) | clips a step \
     on one GPU | batch on 24 / 40 / 80 GB | hours on one H100 |",
    "|---|---|---|---|---|---|---|---|---|",
];

/// The codec that `--autoencoder` says.
fn codec(given: &str) -> Result<CodecConfig> {
    if Path::new(given).is_file() {
        return Ok(read::<AutoencoderExperiment>(&PathBuf::from(given), &[])?.autoencoder);
    }
    let wrong =
        |error| UserError(format!("--autoencoder {given}: neither a file nor the settings of a codec: {error}"));
    Ok(serde_yaml::from_str(given).map_err(wrong)?)
}

/// The batch that fits, for people.
fn fits(plan: &Plan, card: &Card, activations: &Activations) -> String {
    match plan.fits(card, activations) {
        0 => "none".into(),
        batch => batch.to_string(),
    }
}

/// Of few hours the tenths too.
fn hours_text(hours: f64) -> String {
    if hours < 10.0 { format!("{hours:.1}") } else { with_commas(hours.round() as i64) }
}

fn formula(kept: &Activations) -> String {
    match kept.fixed >> 20 {
        0 => format!("{} for each clip", gigabytes(kept.clip)),
        _ => format!("{} for each clip, and {} for weights in bfloat16", gigabytes(kept.clip), gigabytes(kept.fixed)),
    }
}

fn gigabytes(bytes: i64) -> String {
    format!("{:.2}", bytes as f64 / (1i64 << 30) as f64)
}

fn flops(flops: i64) -> String {
    let flops = flops as f64;
    match flops {
        1e12.. => format!("{:.2} TFLOP", flops / 1e12),
        _ => format!("{:.1} GFLOP", flops / 1e9),
    }
}
