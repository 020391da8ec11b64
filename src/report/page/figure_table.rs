//! The table of figures of one protocol.

use std::collections::BTreeSet;

use maud::{Markup, html};

use super::model::{Evaluation, SensitivityTable};
use crate::{
    metrics::{Distances, Estimate, Extrapolation, Figure, Metric},
    report::{efficiency::SAMPLES, number::fixed, repeats::Repeats},
};

/// One protocol's figures, evaluation by evaluation. Evaluations of several runs measure the same baselines, so a set with
/// the very figures of a row above is not shown again.
pub(super) fn figure_table(evaluations: Vec<&Evaluation>) -> Markup {
    let several = evaluations.len() > 1;
    let mut rows: Vec<(&Evaluation, &(String, String, Figure))> = Vec::new();
    for evaluation in &evaluations {
        for row in &evaluation.figures {
            if row.0 == SAMPLES || !rows.iter().any(|(_, known)| *known == row) {
                rows.push((evaluation, row));
            }
        }
    }
    let repeated = evaluations.iter().map(|evaluation| evaluation.figures.len()).sum::<usize>() - rows.len();
    let figures = || evaluations.iter().flat_map(|evaluation| &evaluation.figures).map(|(_, _, figure)| figure);
    let with_runs = figures().any(|figure| figure.runs.len() > 1);
    let metrics: BTreeSet<Metric> = figures().flat_map(|figure| figure.estimates.keys().copied()).collect();
    let extrapolations = |metric: Metric| {
        figures().filter_map(move |figure| Some((figure, figure.estimates.get(&metric)?.extrapolation.as_ref()?)))
    };
    let extrapolated_ones: Vec<Metric> =
        metrics.iter().copied().filter(|metric| extrapolations(*metric).next().is_some()).collect();
    // the metrics of which some set has too few clips, and how many there should be
    let few = extrapolated_ones.iter().filter_map(|metric| {
        let short = extrapolations(*metric).filter(|(figure, extrapolation)| !figure.reaches(extrapolation));
        short.map(|(_, extrapolation)| extrapolation.least_clips).max()
    });
    let few: BTreeSet<i64> = few.collect();
    let mut conditions: Vec<(Vec<&str>, String)> = Vec::new();
    for evaluation in &evaluations {
        let text = conditions_of(evaluation);
        match conditions.iter_mut().find(|(_, known)| *known == text) {
            Some((names, _)) => names.push(&evaluation.name),
            None => conditions.push((vec![&evaluation.name], text)),
        }
    }
    html! {
        div.wide { table {
            thead { tr {
                @if several { th { "evaluation" } }
                th { "set" } @for metric in &metrics { th.n { (metric.title()) } }
                @if with_runs { th { "each run" } }
                @for metric in &extrapolated_ones { th.n { (metric.title()) ", extrapolated" } }
                th.n { "clips" }
                th { "what the set is" }
            } }
            tbody {
                @for (evaluation, (set, meaning, figure)) in &rows {
                    tr {
                        @if several { td { (evaluation.name) } }
                        th { (set) }
                        @for metric in &metrics { td.n { (value(figure, *metric)) } }
                        @if with_runs { td { @for run in &figure.runs { (each_metric(run)) br; } } }
                        @for metric in &extrapolated_ones { td.n { (extrapolated(figure, *metric)) } }
                        td.n { (figure.clips[0]) " / " (figure.clips[1]) }
                        td.long { (meaning) @if set == SAMPLES && !evaluation.generated.is_empty() { ": " (evaluation.generated) } }
                    }
                }
            }
        } }
        ul.note {
            @if figures().any(|figure| figure.estimates.values().any(|estimate| estimate.interval.is_some())) { li { "[…]: 95 % intervals by the jackknife" @if with_runs { ", about the mean of all runs" } "." } }
            @else { li { "The file has no intervals." } }
            @if with_runs { li { "± is the standard deviation over runs; each run is " (metrics.iter().map(|metric| metric.title()).collect::<Vec<_>>().join(" / ")) "." } }
            li {
                "Extrapolated: to infinitely many clips" @if with_runs { ", the mean of all runs" } "."
                @for clips in &few { " Of fewer than " (clips) " clips the line is bent and its end lies above the limit: at most, or nothing where it falls below 0." }
            }
            li { "Clips: of the real / of the generated side." }
            @if repeated > 0 { li { "Where several evaluations have the same figures for a set, only the first has a row for it." } }
            @for (names, conditions) in &conditions {
                li { @if several && names.len() == evaluations.len() { "All" } @else { (names.join(", ")) } ", " (conditions) "." }
            }
        }
    }
}

/// What trainings that differ in their seed alone have in common.
pub(super) fn repeats_table(repeats: &[&Repeats]) -> Markup {
    let metrics: BTreeSet<Metric> = repeats.iter().flat_map(|repeats| repeats.values.keys().copied()).collect();
    html! {
        @if !repeats.is_empty() {
            p.note { "Trainings that differ in their seed alone: mean ± standard deviation over them." }
            div.wide { table {
                thead { tr { th { "evaluations" } th.n { "trainings" } @for metric in &metrics { th.n { (metric.title()) } } } }
                tbody { @for Repeats { names, values, .. } in repeats { tr {
                    th { (names.join(", ")) }
                    td.n { (names.len()) }
                    @for metric in &metrics { td.n { @if let Some((mean, std)) = values.get(metric) {
                        (fixed(*mean, metric.digits())) " ± " (fixed(*std, metric.digits()))
                    } } }
                } } }
            } }
        }
    }
}

/// Where an evaluation was made, and what it found besides its table.
fn conditions_of(Evaluation { device, real_vs_real, psnr_db, psnr_of, .. }: &Evaluation) -> String {
    let mut text = format!("on {device}");
    if let Some(real_vs_real) = real_vs_real {
        text += &format!("; {}", real_vs_real.line());
    }
    if let Some(psnr) = psnr_db {
        text += &format!("; reconstruction of {}: {psnr:.2} dB PSNR", psnr_of.as_deref().unwrap_or("real clips"));
    }
    text
}

/// A card's sensitivity table.
pub(super) fn sensitivity_table(SensitivityTable { name, protocol_hash, rows }: &SensitivityTable) -> Markup {
    let metrics: BTreeSet<Metric> = rows.iter().flat_map(|(_, _, figure)| figure.estimates.keys().copied()).collect();
    html! {
        h3 { "How the metrics answer to faults: " (name) }
        p.note {
            "Real clips with a fault against other real clips, under protocol " code { (protocol_hash) } ". The first row has no
             fault: a metric that is no higher in another row does not notice the fault of that row."
        }
        div.wide { table {
            thead { tr {
                th { "fault" } @for metric in &metrics { th.n { (metric.title()) } }
                th.n { "clips" } th { "what was done to the clips" }
            } }
            tbody { @for (fault, meaning, figure) in rows { tr {
                th { (fault) }
                @for metric in &metrics { td.n { (value(figure, *metric)) } }
                td.n { (figure.clips[0]) " / " (figure.clips[1]) }
                td.long { (meaning) }
            } } }
        } }
    }
}

/// A metric at infinitely many clips, as far as the clips tell it.
fn extrapolated(figure: &Figure, metric: Metric) -> String {
    let extrapolation = figure.estimates.get(&metric).and_then(|estimate| estimate.extrapolation);
    let Some(extrapolation @ Extrapolation { value, .. }) = extrapolation else { return String::new() };
    match (figure.reaches(&extrapolation), fixed(value, metric.digits())) {
        (true, text) => text,
        (false, text) if value > 0.0 => format!("at most {text}"),
        (false, _) => "–".into(),
    }
}

/// One run: `119.96 / −1.750`.
fn each_metric(run: &Distances) -> String {
    run.iter().map(|(metric, value)| fixed(value, metric.digits())).collect::<Vec<_>>().join(" / ")
}

/// `678.62 ± 3.00` with the interval under it.
fn value(figure: &Figure, metric: Metric) -> Markup {
    let Some(Estimate { value, std, interval, .. }) = figure.estimates.get(&metric) else { return html! {} };
    let digits = metric.digits();
    html! {
        (fixed(*value, digits))
        @if let Some(std) = std { " ± " (fixed(*std, digits)) }
        @if let Some([low, high]) = interval { br; small { "[" (fixed(*low, digits)) ", " (fixed(*high, digits)) "]" } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure_of(fvd: f64, clips: [i64; 2]) -> Figure {
        let extrapolation = Some(Extrapolation { value: fvd - 300.0, least_clips: 400 });
        let fvd = Estimate { value: fvd, extrapolation, ..Estimate::default() };
        let kvd = Estimate { value: -0.5, ..Estimate::default() };
        Figure { estimates: [(Metric::FVD, fvd), (Metric::KVD, kvd)].into(), runs: Vec::new(), clips }
    }

    #[test]
    fn an_extrapolation_claims_no_more_than_the_clips_tell() {
        let told = |fvd, clips| extrapolated(&figure_of(fvd, [clips, clips]), Metric::FVD);
        assert_eq!([told(350.0, 400), told(290.0, 400)], ["50.00", "−10.00"]);
        assert_eq!([told(350.0, 96), told(290.0, 96)], ["at most 50.00", "–"]);
    }
}
