//! One HTML page of finished runs, which carries all that it shows and fetches nothing.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use serde_yaml::Value;
use sha2::{Digest, Sha256};

use super::{Plot, Scale, Series};
use crate::metrics::{Distances, Estimate, Extrapolation, Figure, Metric, RealVsReal};

const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/videos.js");

/// What a page shows. A part that is empty has no section.
#[derive(Default)]
pub struct Page {
    /// Where it was found.
    pub title: String,
    /// Training runs.
    pub trainings: Vec<Training>,
    /// One a protocol and set of samples.
    pub evaluations: Vec<Evaluation>,
    /// Of autoencoders.
    pub reconstructions: Vec<Reconstruction>,
    /// Curves along long videos.
    pub long: Vec<LongEvaluation>,
    /// Folders of videos.
    pub galleries: Vec<Gallery>,
    /// Pictures of several frames.
    pub sheets: Vec<Sheet>,
    /// Of a whole job: its name, and the seconds of each stage.
    pub stages: Vec<(String, BTreeMap<String, f64>)>,
}

/// A training run.
pub struct Training {
    /// The run's folder, below the title.
    pub name: String,
    /// The text of `experiment.yaml` and what it says.
    pub experiment: Option<(String, Value)>,
    /// A series a metric, in the order of the log: steps and what was logged at them, NaN where it was not finite.
    pub metrics: Vec<Series>,
}

/// What was measured under one protocol.
pub struct Evaluation {
    /// The evaluation's folder, below the title.
    pub name: String,
    /// What the figures depend on.
    pub protocol: ProtocolText,
    /// The sets with what they are, in the order of the table.
    pub figures: Vec<(String, String, Figure)>,
    /// What was sampled and how.
    pub generated: String,
    /// What two sets of real clips are apart.
    pub floor: Option<RealVsReal>,
    /// Of reconstructed real clips.
    pub psnr_db: Option<f64>,
    /// Which clips were reconstructed; none in files of early versions.
    pub psnr_of: Option<String>,
    /// Where it was measured.
    pub device: String,
    /// Protocols that it could not be measured under, and why.
    pub not_measured: BTreeMap<String, String>,
}

/// A protocol as a file of figures has it.
#[derive(Debug, Clone, PartialEq)]
pub struct ProtocolText {
    /// What people call it.
    pub name: String,
    /// Equal protocols have equal hashes.
    pub hash: String,
    /// One line; none of long evaluations.
    pub text: Option<String>,
    /// All of it, as JSON.
    pub whole: String,
}

/// What `lvdm evaluate reconstruction` found.
pub struct Reconstruction {
    /// The folder, below the title.
    pub name: String,
    /// Name, mean, standard deviation over clips, what it means.
    pub measures: Vec<(&'static str, f64, f64, &'static str)>,
    /// What they depend on.
    pub text: String,
}

/// Windows along long videos.
pub struct LongEvaluation {
    /// The evaluation's folder, below the title.
    pub name: String,
    /// What the figures depend on.
    pub protocol: ProtocolText,
    /// One a method.
    pub curves: Vec<LongCurve>,
    /// What two sets of real clips are apart.
    pub floor: Option<Distances>,
    /// Where it was measured.
    pub device: String,
}

/// One method's windows.
pub struct LongCurve {
    /// Of the method.
    pub name: String,
    /// The first frame of each window.
    pub windows: Vec<(i64, Distances)>,
    /// Mean absolute difference of neighbouring frames, in grey levels.
    pub motion: Option<f64>,
    /// The same where decoded chunks meet, over its median elsewhere.
    pub seam: Option<f64>,
    /// All that the videos depend on, as JSON.
    pub settings: String,
}

/// Videos of a folder.
pub struct Gallery {
    /// The folder, below the title.
    pub name: String,
    /// Those that are shown.
    pub videos: Vec<Video>,
    /// How many the folder has, and why not all are shown.
    pub count: usize,
    /// Why not all are.
    pub cut: Option<String>,
}

/// A video with its bytes.
pub struct Video {
    /// Of the file.
    pub name: String,
    /// What it was asked for with.
    pub prompt: Option<String>,
    /// mp4, or an animated GIF where a binary could not write mp4.
    pub bytes: Vec<u8>,
}

/// A sheet of frames.
pub struct Sheet {
    /// Of the file.
    pub title: String,
    /// What is to be seen.
    pub caption: &'static str,
    /// PNG.
    pub bytes: Vec<u8>,
}

impl Page {
    /// The page. Its policy lets it load nothing but the pictures and videos inside it, and run and apply nothing but
    /// its own script and style.
    ///
    /// # Errors
    /// A font that cannot be read.
    pub fn html(&self) -> Result<String> {
        let policy = format!(
            "default-src 'none'; img-src data:; media-src data:; style-src '{}'; script-src '{}'; base-uri 'none'; \
             form-action 'none'",
            source_hash(STYLE),
            source_hash(SCRIPT)
        );
        let sections: Vec<(&str, &str, Markup)> = [
            ("videos", "Sample videos", self.videos()),
            ("reconstructions", "Reconstructions and other sheets", self.sheets()),
            ("figures", "FVD and KVD", self.figures()),
            ("long", "FVD and KVD along long videos", self.long()?),
            ("training", "Training", self.training()?),
            ("speed", "Speed and memory", self.speed()),
            ("configurations", "Configurations", self.configurations()),
        ]
        .into_iter()
        .filter(|(_, _, body)| !body.0.is_empty())
        .collect();
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta http-equiv="Content-Security-Policy" content=(policy);
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    title { "lvdm: " (self.title) }
                    style { (PreEscaped(STYLE)) }
                }
                body {
                    header {
                        h1 { (self.title) }
                        p.note { (self.counts()) }
                        nav { @for (id, title, _) in &sections { a href={ "#" (id) } { (title) } " " } }
                        @if self.galleries.iter().any(|gallery| gallery.videos.iter().any(Video::is_mp4)) {
                            button id="playing" type="button" hidden { "Pause all videos" }
                        }
                    }
                    main {
                        @for (id, title, body) in &sections { section id=(id) { h2 { (title) } (body) } }
                    }
                    footer { "Written by lvdm " (env!("CARGO_PKG_VERSION")) ". Everything is in this one file; it loads nothing." }
                    script { (PreEscaped(SCRIPT)) }
                }
            }
        };
        Ok(page.into_string())
    }

    /// What was found, in a line.
    fn counts(&self) -> String {
        let videos = self.galleries.iter().map(|gallery| gallery.count).sum();
        let counts = [
            (self.trainings.len(), "training"),
            (self.evaluations.len(), "evaluation"),
            (self.long.len(), "long evaluation"),
            (self.reconstructions.len(), "measured reconstruction"),
            (videos, "video"),
        ];
        let some = counts.into_iter().filter(|(count, _)| *count > 0);
        some.map(|(count, what)| format!("{count} {what}{}", if count == 1 { "" } else { "s" }))
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn videos(&self) -> Markup {
        html! {
            @for Gallery { name, videos, count, cut } in &self.galleries {
                h3 { (name) }
                p.note {
                    @match cut {
                        Some(why) => { "The first " (videos.len()) " of " (count) " videos: " (why) "." }
                        None => { (count) @if *count == 1 { " video." } @else { " videos." } }
                    }
                }
                div.videos { @for video in videos { (video.figure()) } }
            }
        }
    }

    fn sheets(&self) -> Markup {
        html! {
            @if !self.sheets.is_empty() {
                div.sheets { @for Sheet { title, caption, bytes } in &self.sheets {
                    figure { h3 { (title) } (picture(bytes, "image/png", title)) figcaption { (caption) } }
                } }
            }
            @for Reconstruction { name, measures, text } in &self.reconstructions {
                h3 { (name) }
                div.wide { table {
                    thead { tr { th { "measure" } th.n { "mean" } th.n { "± over clips" } th { "" } } }
                    tbody { @for (measure, mean, std, meaning) in measures {
                        tr { th { (measure) } td.n { (number(*mean)) } td.n { (number(*std)) } td { (meaning) } }
                    } }
                } }
                p.note { (text) }
            }
        }
    }

    /// A table a protocol: figures of different ones never stand in one.
    fn figures(&self) -> Markup {
        let mut protocols: Vec<&ProtocolText> = Vec::new();
        for Evaluation { protocol, .. } in &self.evaluations {
            if !protocols.iter().any(|known| known.hash == protocol.hash) {
                protocols.push(protocol);
            }
        }
        html! {
            @if protocols.len() > 1 {
                p { "These figures come from " (protocols.len()) " protocols, each with a table of its own: compare only within a table." }
            }
            @for protocol in protocols {
                h3 { (protocol.title()) }
                (protocol.details())
                (figure_table(self.evaluations.iter().filter(|evaluation| evaluation.protocol.hash == protocol.hash).collect()))
            }
            @for Evaluation { name, not_measured, .. } in &self.evaluations {
                @for (protocol, why) in not_measured { p.note { (name) ": " (protocol) " is not measured: " (why) } }
            }
        }
    }

    fn long(&self) -> Result<Markup> {
        let mut parts = Vec::new();
        for LongEvaluation { name, protocol, curves, floor, device } in &self.long {
            let measured = |metric: &Metric| {
                curves.iter().flat_map(|curve| &curve.windows).any(|(_, window)| window.get(*metric).is_some())
            };
            let metrics: Vec<Metric> = Metric::all().filter(measured).collect();
            let plot = |metric: Metric| {
                let value = |(x, window): &(i64, Distances)| Some((*x as f64, window.get(metric)?));
                let points = |curve: &LongCurve| curve.windows.iter().filter_map(value).collect();
                Plot {
                    title: String::new(),
                    subtitle: String::new(),
                    x_label: "first frame of the window".into(),
                    y_label: String::new(),
                    series: curves.iter().map(|c| Series { name: c.name.clone(), points: points(c) }).collect(),
                    level: floor
                        .as_ref()
                        .and_then(|floor| Some(("real clips against real ones".into(), floor.get(metric)?))),
                }
            };
            let title = |metric: Metric| format!("{}, lower is better", metric.title());
            let plots: Vec<Markup> = metrics
                .iter()
                .map(|metric| figure(&title(*metric), &plot(*metric), Scale::Linear))
                .collect::<Result<_>>()?;
            let frames: Vec<i64> = curves.iter().flat_map(|c| c.windows.iter().map(|(frame, _)| *frame)).collect();
            let frames = BTreeSet::from_iter(frames);
            let at = |curve: &LongCurve, frame: i64, metric: Metric| {
                curve.windows.iter().find(|(f, _)| *f == frame).and_then(|(_, window)| window.get(metric))
            };
            parts.push(html! {
                h3 { (name) }
                p.note { (protocol.title()) ", on " (device) }
                (protocol.details())
                div.plots { @for plot in plots { (plot) } }
                div.wide { table {
                    thead { tr { th { "videos" } th.n { "motion" } th.n { "seams" } } }
                    tbody { @for curve in curves {
                        tr { th { (curve.name) } td.n { (or_dash(curve.motion)) } td.n { (or_dash(curve.seam)) } }
                    } }
                } }
                p.note { "Motion: mean absolute difference of neighbouring frames, in grey levels. Seams: the same where decoded chunks meet, over its median elsewhere." }
                details {
                    summary { "Every window" }
                    div.wide { table {
                        thead {
                            tr { th { "first frame" } @for curve in curves { @for (i, metric) in metrics.iter().enumerate() {
                                th.n { @if i == 0 { (curve.name) " " } (metric.title()) }
                            } } }
                        }
                        tbody {
                            @for frame in frames {
                                tr { th { (frame) } @for curve in curves {
                                    @for metric in &metrics { td.n { (or_dash(at(curve, frame, *metric))) } }
                                } }
                            }
                            @if let Some(floor) = floor {
                                tr { th { "real" } @for _ in curves { @for metric in &metrics { td.n { (or_dash(floor.get(*metric))) } } } }
                            }
                        }
                    } }
                }
                @for curve in curves { details { summary { "What " (curve.name) " was made with" } pre { (curve.settings) } } }
            });
        }
        Ok(html! { @for part in parts { (part) } })
    }

    /// Runs of one kind share their plots.
    fn training(&self) -> Result<Markup> {
        let mut parts = Vec::new();
        for (kind, runs) in self.kinds() {
            let runs: Vec<&Training> = runs.into_iter().filter(|run| !run.metrics.is_empty()).collect();
            if runs.is_empty() {
                continue;
            }
            let (mut figures, mut flat) = (Vec::new(), Vec::new());
            for metric in metric_names(&runs) {
                let of_run = |run: &&Training| {
                    let found = run.metrics.iter().find(|series| series.name == metric)?;
                    Some(Series { name: run.name.clone(), points: found.points.clone() })
                };
                let series: Vec<Series> = runs.iter().filter_map(of_run).collect();
                let values = || series.iter().flat_map(|s| &s.points).map(|(_, y)| *y).filter(|y| y.is_finite());
                let Some(first) = values().next() else {
                    flat.push(format!("{metric} never finite"));
                    continue;
                };
                if values().all(|value| value == first) {
                    flat.push(format!("{metric} {}", number(first)));
                    continue;
                }
                let scale = Scale::of(&series);
                let plot = Plot {
                    title: String::new(),
                    subtitle: String::new(),
                    x_label: "step".into(),
                    y_label: String::new(),
                    series,
                    level: None,
                };
                figures.push(figure(&metric, &plot, scale)?);
            }
            let objectives: Vec<String> = differences(&runs)
                .into_iter()
                .map(|(key, _)| key)
                .filter(|key| key.starts_with("objective.") || key.starts_with("loss."))
                .collect();
            parts.push(html! {
                h3 { (kind) ": " (names(&runs)) }
                p.note { (averages(&runs)) }
                @if !objectives.is_empty() {
                    p { "Their losses cannot be compared: the runs differ in " code { (objectives.join(", ")) } "." }
                }
                div.plots { @for figure in figures { (figure) } }
                @if !flat.is_empty() { p.note { "The same all the time, so without a plot: " (flat.join(", ")) "." } }
            });
        }
        Ok(html! { @for part in parts { (part) } })
    }

    fn speed(&self) -> Markup {
        let runs: Vec<&Training> = self.trainings.iter().filter(|run| run.steps().is_some()).collect();
        html! {
            @if !runs.is_empty() {
                div.wide { table {
                    thead { tr {
                        th { "run" } th.n { "steps" } th.n { "clips a second" } th.n { "seconds a step" } th.n { "of them waiting for data" }
                        th.n { "peak memory, GB" }
                    } }
                    tbody { @for run in &runs { tr {
                        th { (run.name) }
                        td.n { (run.steps().unwrap_or(0)) }
                        td.n { (or_dash(run.median("clips_per_second"))) }
                        td.n { (seconds(run.median("seconds_per_step"))) }
                        td.n { (seconds(run.median("seconds_waiting_for_data"))) }
                        td.n { (or_dash(run.most("peak_memory_gb"))) }
                    } } }
                } }
                p.note {
                    "Medians over the lines of each log. Memory is rank 0's: on a GPU what tensors held, on a CPU the whole process."
                }
            }
            @for (name, stages) in &self.stages {
                h3 { (name) ", by stage" }
                div.wide { table {
                    thead { tr { th { "stage" } th.n { "seconds" } } }
                    tbody { @for (stage, seconds) in stages { tr { th { (stage) } td.n { (format!("{seconds:.1}")) } } } }
                } }
            }
        }
    }

    fn configurations(&self) -> Markup {
        html! {
            @for (kind, runs) in self.kinds() {
                @let runs: Vec<&Training> = runs.into_iter().filter(|run| run.experiment.is_some()).collect();
                @let differences = differences(&runs);
                @if !runs.is_empty() { h3 { (kind) ": " (names(&runs)) } }
                @if runs.len() > 1 && differences.is_empty() { p { "All say the same." } }
                @if !differences.is_empty() {
                    p.note { "The keys in which they differ; – where a file does not have the key." }
                    div.wide { table {
                        thead { tr { th { "key" } @for run in &runs { th { (run.name) } } } }
                        tbody { @for (key, values) in differences {
                            tr { th { code { (key) } } @for value in values { td.value { (value.unwrap_or("–".into())) } } }
                        } }
                    } }
                }
                @for run in &runs {
                    @if let Some((text, _)) = &run.experiment {
                        details { summary { "All of " (run.name) } pre { (text) } }
                    }
                }
            }
        }
    }

    /// The runs by what they train, in the order in which they were found.
    fn kinds(&self) -> Vec<(&'static str, Vec<&Training>)> {
        let of = |kind| self.trainings.iter().filter(|run| run.kind() == kind).collect::<Vec<_>>();
        let kinds = ["Autoencoder", "Diffusion", "Other training"].map(|kind| (kind, of(kind)));
        kinds.into_iter().filter(|(_, runs)| !runs.is_empty()).collect()
    }
}

impl Training {
    fn kind(&self) -> &'static str {
        let has = |key: &str| self.experiment.as_ref().is_some_and(|(_, value)| value.get(key).is_some());
        match (has("network") || has("unet"), has("autoencoder")) {
            (true, _) => "Diffusion",
            (false, true) => "Autoencoder",
            (false, false) => "Other training",
        }
    }

    /// The last step of the log.
    fn steps(&self) -> Option<i64> {
        let last = |series: &Series| series.points.last().map(|(step, _)| *step as i64);
        self.metrics.iter().filter_map(last).max()
    }

    fn values(&self, metric: &str) -> Vec<f64> {
        let found = self.metrics.iter().filter(|series| series.name == metric).flat_map(|series| &series.points);
        let mut values: Vec<f64> = found.map(|(_, value)| *value).filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        values
    }

    fn median(&self, metric: &str) -> Option<f64> {
        let values = self.values(metric);
        values.get(values.len() / 2).copied()
    }

    fn most(&self, metric: &str) -> Option<f64> {
        self.values(metric).last().copied()
    }

    fn setting(&self, key: &str) -> Option<f64> {
        self.experiment.as_ref()?.1.get("trainer")?.get(key)?.as_f64()
    }
}

impl ProtocolText {
    fn title(&self) -> Markup {
        html! { "Protocol " (self.name) " " code { (self.hash) } }
    }

    fn details(&self) -> Markup {
        html! {
            @if let Some(text) = &self.text { p.note { (text) } }
            details { summary { "The whole protocol" } pre { (self.whole) } }
        }
    }
}

impl Video {
    fn is_mp4(&self) -> bool {
        !self.bytes.starts_with(b"GIF8")
    }

    fn figure(&self) -> Markup {
        html! {
            figure {
                @if self.is_mp4() {
                    @let size = mp4_size(&self.bytes);
                    video.pixels[is_small(size)] src=(data_uri("video/mp4", &self.bytes)) width=[size.map(|s| s.0)]
                        height=[size.map(|s| s.1)] title=(self.name) autoplay muted loop playsinline {}
                } @else {
                    (picture(&self.bytes, "image/gif", &self.name))
                }
                figcaption { (self.name) @if let Some(prompt) = &self.prompt { ": " (prompt) } }
            }
        }
    }
}

/// One protocol's figures, evaluation by evaluation.
fn figure_table(evaluations: Vec<&Evaluation>) -> Markup {
    let several = evaluations.len() > 1;
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
                @for evaluation in &evaluations {
                    @for (set, meaning, figure) in &evaluation.figures {
                        tr {
                            @if several { td { (evaluation.name) } }
                            th { (set) }
                            @for metric in &metrics { td.n { (value(figure, *metric)) } }
                            @if with_runs { td { @for run in &figure.runs { (each_metric(run)) br; } } }
                            @for metric in &extrapolated_ones { td.n { (extrapolated(figure, *metric)) } }
                            td.n { (figure.clips[0]) " / " (figure.clips[1]) }
                            td.long { (meaning) @if set == "samples" && !evaluation.generated.is_empty() { ": " (evaluation.generated) } }
                        }
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
            @for evaluation in &evaluations {
                li {
                    (evaluation.name) ", on " (evaluation.device)
                    @if let Some(floor) = &evaluation.floor { "; " (floor.line()) }
                    @if let Some(psnr) = evaluation.psnr_db { "; reconstruction of " (evaluation.psnr_of.as_deref().unwrap_or("real clips")) ": " (format!("{psnr:.2}")) " dB PSNR" }
                    "."
                }
            }
        }
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

fn figure(title: &str, plot: &Plot, scale: Scale) -> Result<Markup> {
    let averaged = plot.averaged();
    // all values may be unusable on the scale, but those of `Scale::of` are not
    let svg = match plot.series.iter().flat_map(|s| &s.points).any(|(_, y)| y.is_finite()) {
        true => plot.small_svg(scale).with_context(|| format!("the plot of {title}"))?,
        false => String::new(),
    };
    Ok(html! {
        figure {
            figcaption {
                b { (title) }
                @if scale == Scale::Logarithmic { ", logarithmic" }
                @if averaged > 1 { ", means of " @if plot.series.len() > 1 { "up to " } (averaged) " values" }
                @if svg.is_empty() { ": no finite value" }
            }
            (PreEscaped(svg))
        }
    })
}

fn picture(bytes: &[u8], kind: &str, description: &str) -> Markup {
    let size = png_size(bytes);
    html! {
        img.pixels[is_small(size)] src=(data_uri(kind, bytes)) alt=(description) width=[size.map(|s| s.0)]
            height=[size.map(|s| s.1)];
    }
}

/// Every metric of the runs, in the order of the first run that has it.
fn metric_names(runs: &[&Training]) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for series in runs.iter().flat_map(|run| &run.metrics) {
        if !names.contains(&series.name) {
            names.push(series.name.clone());
        }
    }
    names
}

fn names(runs: &[&Training]) -> String {
    runs.iter().map(|run| run.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// What a logged value is the mean of.
fn averages(runs: &[&Training]) -> String {
    let every: Vec<(&str, f64)> =
        runs.iter().filter_map(|run| Some((run.name.as_str(), run.setting("log_every")?))).collect();
    let steps = match every.first() {
        None => String::new(),
        Some((_, first)) if every.iter().all(|(_, steps)| steps == first) => format!(" ({first} steps)"),
        Some(_) => {
            format!(
                " ({})",
                every.iter().map(|(run, steps)| format!("{steps} in {run}")).collect::<Vec<_>>().join(", ")
            )
        }
    };
    format!(
        "A logged value is the mean over the steps since the one before it{steps}; the learning rate is that of the last \
         step. Where a plot says that it shows means of several such values, a pale band goes from the least to the \
         greatest of them."
    )
}

/// The key paths whose values are not the same in all experiments, with the value of each.
fn differences(runs: &[&Training]) -> Vec<(String, Vec<Option<String>>)> {
    let flat: Vec<Vec<(String, String)>> =
        runs.iter().filter_map(|run| run.experiment.as_ref()).map(|(_, value)| flattened(value)).collect();
    let mut keys: Vec<&String> = Vec::new();
    for (key, _) in flat.iter().flatten() {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let of = |key: &String| flat.iter().map(|all| all.iter().find(|(k, _)| k == key).map(|(_, v)| v.clone())).collect();
    let all = keys.into_iter().map(|key| (key.clone(), of(key)));
    all.filter(|(_, values): &(_, Vec<Option<String>>)| values.iter().any(|value| *value != values[0])).collect()
}

/// Key paths with their values, lists in one line.
fn flattened(value: &Value) -> Vec<(String, String)> {
    fn visit(path: &str, value: &Value, found: &mut Vec<(String, String)>) {
        match value {
            Value::Mapping(map) if !map.is_empty() => {
                for (key, value) in map {
                    let key = line(key);
                    visit(&if path.is_empty() { key } else { format!("{path}.{key}") }, value, found);
                }
            }
            value => found.push((path.to_string(), line(value))),
        }
    }
    fn line(value: &Value) -> String {
        match value {
            Value::String(text) => text.clone(),
            value => serde_json::to_string(value)
                .unwrap_or_else(|_| serde_yaml::to_string(value).unwrap_or_default().trim().to_string()),
        }
    }
    let mut found = Vec::new();
    visit("", value, &mut found);
    found
}

/// So many digits behind the point.
fn fixed(value: f64, digits: usize) -> String {
    format!("{value:.digits$}").replace('-', "−")
}

/// Four digits that matter.
fn number(value: f64) -> String {
    let size = value.abs();
    let text = match size {
        _ if !value.is_finite() || size == 0.0 => value.to_string(),
        1000.0.. => format!("{value:.0}"),
        1e-4.. => format!("{value:.*}", (3 - size.log10().floor() as i32).max(0) as usize),
        _ => format!("{value:.2e}"),
    };
    text.replace('-', "−")
}

fn or_dash(value: Option<f64>) -> String {
    value.map_or("–".into(), number)
}

fn seconds(value: Option<f64>) -> String {
    value.map_or("–".into(), |seconds| format!("{seconds:.4}"))
}

fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", STANDARD.encode(bytes))
}

/// As a content security policy names an inline script or style.
fn source_hash(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text.as_bytes())))
}

/// Pictures of so few pixels are enlarged as squares.
fn is_small(size: Option<(u32, u32)>) -> bool {
    size.is_some_and(|(width, height)| width.min(height) <= 300)
}

/// Width and height in the header of a PNG.
fn png_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let side = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    bytes.starts_with(b"\x89PNG").then(|| Some((side(16)?, side(20)?)))?
}

/// Width and height at the end of the first track header of an mp4, version 0, where they are 16.16 numbers.
fn mp4_size(bytes: &[u8]) -> Option<(u32, u32)> {
    let header = bytes.windows(5).position(|window| window == b"tkhd\0")?;
    let side = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?) >> 16);
    Some((side(header + 80)?, side(header + 84)?)).filter(|(width, height)| *width > 0 && *height > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training(name: &str, text: &str) -> Training {
        let value = serde_yaml::from_str(text).unwrap();
        Training { name: name.into(), experiment: Some((text.into(), value)), metrics: Vec::new() }
    }

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

    fn evaluation(name: &str, hash: &str, fvd: f64) -> Evaluation {
        let figure = figure_of(fvd, [16, 16]);
        let protocol = ProtocolText { name: "plain".into(), hash: hash.into(), text: None, whole: "{}".into() };
        let figures = vec![("samples".into(), String::new(), figure)];
        let not_measured = BTreeMap::new();
        Evaluation {
            name: name.into(),
            protocol,
            figures,
            generated: "weights of runs/x, UniPC 20 steps, bf16".into(),
            floor: None,
            psnr_db: None,
            psnr_of: None,
            device: "cpu".into(),
            not_measured,
        }
    }

    #[test]
    fn only_keys_that_differ_are_compared() {
        let a = training("a", "{unet: {channels: 8, depths: [1, 2]}, seed: 0, start_from: null}");
        let b = training("b", "{unet: {channels: 8, depths: [1, 3]}, seed: 0, prompt: 'x'}");
        let text = |value: &str| Some(value.to_string());
        let found = differences(&[&a, &b]);
        let wanted = [
            ("unet.depths", vec![text("[1,2]"), text("[1,3]")]),
            ("start_from", vec![text("null"), None]),
            ("prompt", vec![None, text("x")]),
        ];
        assert_eq!(found, wanted.map(|(key, values)| (key.to_string(), values)));
        assert!(differences(&[&a, &a]).is_empty() && differences(&[&a]).is_empty() && differences(&[]).is_empty());
    }

    #[test]
    fn runs_stand_together_by_what_they_train() {
        let page = Page {
            trainings: vec![
                training("d", "{unet: {}, autoencoder: runs/a}"),
                training("a", "{autoencoder: {channels: 8}}"),
                training("e", "{unet: {}, autoencoder: runs/a}"),
            ],
            ..Page::default()
        };
        let kinds: Vec<_> = page.kinds().into_iter().map(|(kind, runs)| (kind, names(&runs))).collect();
        assert_eq!(kinds, [("Autoencoder", "a".to_string()), ("Diffusion", "d, e".to_string())]);
    }

    /// Two evaluations of one protocol share a table, a third has another.
    #[test]
    fn a_table_has_one_protocol() {
        let evaluations = vec![evaluation("x", "aa", 1.0), evaluation("y", "bb", 2.0), evaluation("z", "aa", 3.0)];
        let html = Page { evaluations, ..Page::default() }.html().unwrap();
        let tables: Vec<&str> = html.split("<table").skip(1).map(|t| t.split("</table>").next().unwrap()).collect();
        assert_eq!(tables.len(), 2);
        assert!(tables[0].contains("1.00") && tables[0].contains("3.00") && !tables[0].contains("2.00"));
        assert!(tables[1].contains("2.00") && tables[1].contains("−0.500"));
        assert!(tables[1].contains("weights of runs/x, UniPC 20 steps, bf16"));
        assert!(html.contains("come from 2 protocols"));
    }

    #[test]
    fn what_files_say_is_text() {
        let hostile = "<script>alert(1)</script>\"'";
        let mut run = training(hostile, &format!("unet: {}", serde_json::json!(hostile)));
        let points = vec![(1.0, 1.0), (2.0, 0.5)];
        run.metrics = vec![Series { name: hostile.into(), points }];
        let html = Page { title: hostile.into(), trainings: vec![run], ..Page::default() }.html().unwrap();
        assert!(html.contains("&lt;script&gt;alert(1)") && !html.contains("<script>alert"), "{html}");
        assert_eq!(html.matches("<script").count(), 1);
        assert!(html.contains(&source_hash(SCRIPT)) && html.contains(&source_hash(STYLE)));
    }

    #[test]
    fn numbers_have_four_digits() {
        let written = [0.0, 836.2182, 0.000123456, 0.0000123, -2.5956, 12345.6, 64.0, f64::NAN].map(number);
        assert_eq!(written, ["0", "836.2", "0.0001235", "1.23e−5", "−2.596", "12346", "64.00", "NaN"]);
        assert_eq!(fixed(-0.5, 2), "−0.50");
    }

    #[test]
    fn a_log_says_the_median_and_the_most() {
        let mut run = training("a", "{trainer: {log_every: 5}}");
        let points = [1.0, 100.0, 12.0].map(|value| (1.0, value)).to_vec();
        run.metrics = vec![Series { name: "peak_memory_gb".into(), points }];
        assert_eq!((run.median("peak_memory_gb"), run.most("peak_memory_gb")), (Some(12.0), Some(100.0)));
        assert!(averages(&[&run]).contains("(5 steps)"));
    }

    #[test]
    fn sizes_are_read_from_headers() {
        let png = crate::data::pictures::png(&tch::Tensor::zeros([3, 5, 3], (tch::Kind::Uint8, tch::Device::Cpu)));
        assert_eq!(png_size(&png.unwrap()), Some((5, 3)));
        let mut track = b"....tkhd\0".to_vec();
        track.resize(4 + 80, 0);
        track.extend([0, 40, 0, 0, 0, 30, 0, 0]);
        assert_eq!(mp4_size(&track), Some((40, 30)));
        for cut in [&track[..20], &track[..86], b"", b"GIF89a"] {
            assert_eq!((mp4_size(cut), png_size(cut)), (None, None));
        }
    }
}
