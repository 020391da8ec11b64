//! What an evaluation found, for people.

use crate::{
    commands::say,
    evaluation::{Card, Evaluation, SETS, Sensitivity},
    metrics::{Distances, Extrapolation},
    report::FigureTable,
};

fn rows_of(evaluation: &Evaluation, table: &mut FigureTable) {
    for (set, meaning) in SETS {
        if let Some(figure) = evaluation.figures.get(set) {
            table.row(set, figure, &evaluation.protocol, meaning);
        }
    }
}

/// The table, with what it depends on.
pub fn print_evaluation(evaluation: &Evaluation) {
    let mut table = FigureTable::new();
    rows_of(evaluation, &mut table);
    say::text(&table);
    say!("samples: {}", evaluation.generated_text);
    print_details(evaluation);
    let Evaluation { protocol_hash, protocol_text, device, .. } = evaluation;
    say!("protocol {protocol_hash}: {protocol_text}; on {device}");
}

/// Every protocol's figures in one table, which says that they are of several.
pub fn print_card(card: &Card) {
    let mut table = FigureTable::new();
    card.evaluations.iter().for_each(|evaluation| rows_of(evaluation, &mut table));
    say::text(&table);
    for Evaluation { protocol_hash, protocol_text, real_vs_real, .. } in &card.evaluations {
        say!("protocol {protocol_hash}: {protocol_text}");
        if let Some(real_vs_real) = real_vs_real {
            say!("protocol {protocol_hash}: {}", real_vs_real.line());
        }
    }
    if let (Some(sensitivity), Some(own)) = (&card.sensitivity, card.evaluations.first()) {
        let mut table = FigureTable::new();
        for (set, meaning) in Sensitivity::rows() {
            if let Some(figure) = sensitivity.figures.get(set) {
                table.row(set, figure, &own.protocol, meaning);
            }
        }
        say!();
        say!(
            "sensitivity under protocol {}: real clips with a fault against other real clips",
            sensitivity.protocol_hash
        );
        say::text(&table);
    }
    for (name, why) in &card.not_measured {
        say!("{name} is not measured: {why}");
    }
}

/// Runs, extrapolations, the real-vs-real baseline, PSNR: below the table.
fn print_details(evaluation: &Evaluation) {
    if let Some(figure) = evaluation.figures.get("samples") {
        let settings = &evaluation.protocol.settings;
        let ([real, _], asked) = (figure.clips, settings.clips);
        if real < asked {
            let draw = settings.draw.words();
            say!("{real} real clips where {asked} are asked for: drawn {draw}, there are no more");
        }
        let several = if figure.runs.len() > 1 { ", mean of all runs" } else { "" };
        if figure.runs.len() > 1 {
            for metric in figure.estimates.keys() {
                let value = |run: &Distances| run.get(*metric).map(|value| format!("{value:.*}", metric.digits()));
                let values: Vec<String> = figure.runs.iter().filter_map(value).collect();
                say!("{} of each run: {}", metric.title(), values.join(" "));
            }
        }
        for (metric, estimate) in &figure.estimates {
            let Some(extrapolation) = &estimate.extrapolation else { continue };
            let Extrapolation { value, least_clips } = extrapolation;
            let bound = match figure.reaches(extrapolation) {
                true => String::new(),
                false => format!(" at most (a set has fewer than {least_clips} clips)"),
            };
            let value = format!("{} {value:.*}", metric.title(), metric.digits());
            say!("samples, extrapolated to infinitely many clips: {value}{bound}{several}");
        }
    }
    if let Some(real_vs_real) = &evaluation.real_vs_real {
        say!("{}", real_vs_real.line());
    }
    if let Some(psnr) = evaluation.psnr_db {
        say!("reconstruction of {}: {psnr:.2} dB PSNR", evaluation.psnr_of.as_deref().unwrap_or("real clips"));
    }
}
