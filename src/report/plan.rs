//! What a plan says, for people.

use super::with_commas;
use crate::plan::{Activations, Card, Plan, Variant, Work};

/// Shows plans.
#[derive(Debug)]
pub struct PlanTable {
    /// GPUs that train together.
    pub ranks: i64,
    /// The cards that are asked about.
    pub cards: Vec<Card>,
}

/// Cards of the Markdown table: the batch that fits is said for each, the hours for the last.
const COLUMNS: [&str; 3] = ["RTX 4090", "A100 40 GB", "H100"];

impl PlanTable {
    /// Of the table whose rows [`Self::row`] gives, in Markdown.
    pub const HEAD: &str = "\
        | experiment | parameters | trained | operations a clip and step | GB without clips | GB a clip (recomputed) | clips \
        a step on one GPU | batch on 24 / 40 / 80 GB | hours on one H100 |\n|---|---|---|---|---|---|---|---|---|";

    /// All of a plan, for the experiment of this file.
    pub fn text(&self, file: &str, plan: &Plan) -> String {
        let trainer = &plan.trainer;
        let mut lines = vec![format!("{file}: {}", plan.title)];
        lines.extend(plan.notes.iter().map(|note| format!("  {note}")));
        let (all, trained) = (with_commas(plan.parameters), with_commas(plan.trained));
        lines.push(format!("\nparameters       {all}, of which training moves {trained}"));
        if plan.frozen > 0 {
            lines.push(format!("frozen networks  {}", with_commas(plan.frozen)));
        }
        let (forward, step) = (flops(plan.forward), flops(plan.step));
        lines.push(format!("operations       {forward} forward, {step} in a training step, for each clip"));
        lines.push(format!(
            "a step           {} clips (batch {}, passes {}, GPUs {}), {} on each GPU\n",
            plan.clips(self.ranks),
            trainer.batch,
            trainer.accumulate,
            self.ranks,
            flops(plan.step * plan.clips(1))
        ));
        let precision = plan.precision();
        lines.push(format!(
            "memory on each GPU, in GB (2^30 bytes); weights and moments in float32, products in {precision}"
        ));
        let amount = |what: &str, bytes: i64| format!("  {what:24} {:>8}", gigabytes(bytes));
        lines.extend(
            plan.state(self.ranks).iter().filter(|(_, bytes)| *bytes > 0).map(|(what, bytes)| amount(what, *bytes)),
        );
        let own = &plan.activations[0];
        if !own.recompute.is_empty() {
            lines.push(format!("  activations of {} clips", trainer.batch));
        }
        for Variant { recompute, kept } in &plan.activations {
            let what = if recompute.is_empty() { "activations".into() } else { format!("  recompute: {recompute}") };
            lines.push(format!("{}   {}", amount(&what, kept.bytes(trainer.batch)), formula(kept)));
        }
        lines.push(amount("together", plan.state_bytes(self.ranks) + own.kept.bytes(trainer.batch)));

        lines.push(format!(
            "\nkernels of {} clips on one GPU     starts         GB",
            trainer.batch * trainer.accumulate
        ));
        let work = |what: &str, work: &Work| {
            let (starts, bytes) = (with_commas(work.kernels()), gigabytes(work.bytes()));
            format!("  {what:24} {starts:>14} {bytes:>10}   {}", flops(work.flops()))
        };
        lines.push(work("a training step", &plan.kernels));
        if let Some(sampling) = &plan.sampling {
            lines.push(work("a call in sampling", &sampling.call));
            let decoded = if sampling.decoding.kernels() > 0 { ", decoded" } else { "" };
            lines.push(work(&format!("sampling: {} calls{decoded}", sampling.calls), &sampling.whole()));
        }

        lines.extend(longest(plan));

        let columns = |cells: Vec<String>| cells.into_iter().map(|cell| format!("{cell:>24}")).collect::<String>();
        let head = |variant: &Variant| match variant.recompute.as_str() {
            "" => "batch that fits".to_string(),
            recompute => format!("batch, recompute: {recompute}"),
        };
        lines.push(format!(
            "\n{:12} {:>6}{}  ms a step  bound by products / memory / starts  hours{}",
            "card",
            "GB",
            columns(plan.activations.iter().map(head).collect()),
            if plan.sampling.is_some() { "  sampling, s" } else { "" },
        ));
        for card in &self.cards {
            let batches =
                columns(plan.activations.iter().map(|variant| self.fits(plan, card, &variant.kept)).collect());
            let (memory, time) = (card.memory >> 30, self.time(plan, card));
            lines.push(format!("{:12} {memory:>6}{batches}  {time}", card.name));
        }
        lines.push(format!(
            "A batch is what fits {} % of the memory; what the codec needs while it encodes is not counted. Times are a roofline: \
             a kernel lasts as long as its products take at {} % of the card's peak or its bytes at {} % of its bandwidth, and \
             {} µs at the least. Reading data and waiting for other GPUs are not in them.\n",
            100.0 * Card::USABLE,
            100.0 * Card::PEAK_REACHED,
            100.0 * Card::BANDWIDTH_REACHED,
            1e6 * Card::KERNEL,
        ));
        lines.join("\n")
    }

    /// The batch that fits, for people.
    fn fits(&self, plan: &Plan, card: &Card, activations: &Activations) -> String {
        match plan.fits(card, self.ranks, activations) {
            0 => "none".into(),
            batch => batch.to_string(),
        }
    }

    /// How long a card takes that the training fits as its file says.
    fn time(&self, plan: &Plan, card: &Card) -> String {
        let Some(step) = plan.step_on(card) else { return "–".into() };
        if !plan.fits_itself(card, self.ranks) {
            return "does not fit".into();
        }
        let share = |part: f64| format!("{:.0} %", 100.0 * part / step.seconds());
        let bounds = [step.products, step.memory, step.starts].map(share).join(" / ");
        let sampling = plan.sampling.as_ref().and_then(|sampling| sampling.whole().on(card, plan.trainer.tf32));
        let sampling = sampling.map_or(String::new(), |time| format!(" {:>12.2}", time.seconds()));
        format!("{:>9.1}  {bounds:>36} {:>6}{sampling}", 1e3 * step.seconds(), self.hours(plan, card))
    }

    fn hours(&self, plan: &Plan, card: &Card) -> String {
        if !plan.fits_itself(card, self.ranks) {
            return "does not fit".into();
        }
        match plan.hours(card) {
            None => "–".into(),
            // of few hours the tenths too
            Some(hours) if hours < 10.0 => format!("{hours:.1}"),
            Some(hours) => with_commas(hours.round() as i64),
        }
    }

    /// A row of the Markdown table.
    pub fn row(&self, file: &str, plan: &Plan) -> String {
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
        let batches = COLUMNS.map(|name| self.fits(plan, named(name), &own.kept));
        let hours = self.hours(plan, named(COLUMNS[2]));
        format!(
            "| {name} | {} | {} | {} | {} | {activations} | {} | {} | {} |",
            with_commas(plan.parameters),
            with_commas(plan.trained),
            flops(plan.step),
            gigabytes(plan.state_bytes(self.ranks) + own.kept.fixed),
            plan.clips(1),
            batches.join(" / "),
            hours,
        )
    }
}

/// The operations that take most of a training step on an H100.
fn longest(plan: &Plan) -> Option<String> {
    const SHOWN: usize = 6;
    let card = Card::known().into_iter().find(|card| card.name == COLUMNS[2])?;
    let whole = plan.step_on(&card)?.seconds();
    let of_each =
        |(name, work): (&str, Work)| Some((work.on(&card, plan.trainer.tf32)?.seconds() / whole, name.to_string()));
    let mut all: Vec<(f64, String)> = plan.kernels.operations().into_iter().filter_map(of_each).collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0));
    let shown = all.iter().take(SHOWN).map(|(share, name)| format!("{:.0} % {name}", 100.0 * share));
    Some(format!("  most of a step's time on an {}: {}", card.name, shown.collect::<Vec<_>>().join("; ")))
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
