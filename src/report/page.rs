//! One HTML page of finished runs, which carries all that it shows and fetches nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use anyhow::{Context, Result};
use base64::{Engine, engine::general_purpose::STANDARD};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use sha2::{Digest, Sha256};

use self::{
    figure_table::{figure_table, repeats_table, sensitivity_table},
    picture_size::{is_small, mp4_size, png_size},
    training::{averages, differences, metric_names, names},
};
use super::{
    Plot, Scale, Series,
    efficiency::{SAMPLES, is_run},
    number::{fixed, number, or_dash, seconds, with_commas},
    repeats::{Measured, repeats},
};
use crate::metrics::Metric;

mod figure_table;
mod model;
mod picture_size;
mod training;

pub use model::{
    Evaluation, Gallery, LongCurve, LongEvaluation, Page, ProtocolText, Reconstruction, SensitivityTable, Sheet,
    Trained, Training, Video, Window,
};

const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/videos.js");

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
                div.sheets { @for Sheet { files, caption, bytes } in &self.sheets {
                    figure {
                        h3 { (files[0]) }
                        (picture(bytes, "image/png", &files[0]))
                        figcaption {
                            (caption)
                            @if files.len() > 1 { " The same picture is in " (files[1..].join(", ")) "." }
                        }
                    }
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
        let repeats = repeats(&self.measured());
        html! {
            @if protocols.len() > 1 {
                p { "These figures come from " (protocols.len()) " protocols, each with a table of its own: compare only within a table." }
            }
            @for protocol in protocols {
                h3 { (protocol.title()) }
                (protocol.details())
                (figure_table(self.evaluations.iter().filter(|evaluation| evaluation.protocol.hash == protocol.hash).collect()))
                (repeats_table(&repeats.iter().filter(|repeats| repeats.protocol_hash == protocol.hash).collect::<Vec<_>>()))
            }
            @for Evaluation { name, not_measured, .. } in &self.evaluations {
                @for (protocol, why) in not_measured { p.note { (name) ": " (protocol) " is not measured: " (why) } }
            }
            @for table in &self.sensitivities { (sensitivity_table(table)) }
        }
    }

    /// The samples of the page's trainings that were measured.
    fn measured(&self) -> Vec<Measured<'_>> {
        self.evaluations.iter().filter_map(|evaluation| self.measured_of(evaluation)).collect()
    }

    fn measured_of<'a>(&'a self, evaluation: &'a Evaluation) -> Option<Measured<'a>> {
        let Evaluation { name, sampled, protocol, figures, .. } = evaluation;
        let run = Path::new(sampled["run"].as_str()?);
        let trained = self.trainings.iter().find(|training| is_run(&training.folder, run))?.trained.as_ref()?;
        let (_, _, figure) = figures.iter().find(|(set, ..)| set == SAMPLES)?;
        let (generated, protocol_hash) = (sampled.clone(), protocol.hash.clone());
        Some(Measured { name: name.clone(), training: &trained.training, generated, figure, protocol_hash })
    }

    fn long(&self) -> Result<Markup> {
        let mut parts = Vec::new();
        for LongEvaluation { name, protocol, curves, real_vs_real, device } in &self.long {
            let measured = |metric: &Metric| {
                curves.iter().flat_map(|curve| &curve.windows).any(|window| window.distances.get(*metric).is_some())
            };
            let metrics: Vec<Metric> = Metric::all().filter(measured).collect();
            let plot = |metric: Metric| {
                let value = |window: &Window| Some((window.first_frame as f64, window.distances.get(metric)?));
                let points = |curve: &LongCurve| curve.windows.iter().filter_map(value).collect();
                Plot {
                    title: String::new(),
                    subtitle: String::new(),
                    x_label: "first frame of the window".into(),
                    y_label: String::new(),
                    series: curves.iter().map(|c| Series { name: c.name.clone(), points: points(c) }).collect(),
                    level: real_vs_real
                        .as_ref()
                        .and_then(|found| Some(("real clips against real ones".into(), found.get(metric)?))),
                }
            };
            let title = |metric: Metric| format!("{}, lower is better", metric.title());
            let plots: Vec<Markup> = metrics
                .iter()
                .map(|metric| figure(&title(*metric), &plot(*metric), Scale::Linear))
                .collect::<Result<_>>()?;
            let frames: Vec<i64> =
                curves.iter().flat_map(|c| c.windows.iter().map(|window| window.first_frame)).collect();
            let frames = BTreeSet::from_iter(frames);
            let at = |curve: &LongCurve, frame: i64, metric: Metric| {
                let window = curve.windows.iter().find(|window| window.first_frame == frame);
                let value = window.and_then(|window| window.distances.get(metric));
                let interval = window.and_then(|window| window.intervals.get(&metric));
                html! {
                    (or_dash(value))
                    @if let Some([low, high]) = interval { br; small { "[" (number(*low)) ", " (number(*high)) "]" } }
                }
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
                    summary { "Every window, with its 95 % interval" }
                    div.wide { table {
                        thead {
                            tr { th { "first frame" } @for curve in curves { @for (i, metric) in metrics.iter().enumerate() {
                                th.n { @if i == 0 { (curve.name) " " } (metric.title()) }
                            } } }
                        }
                        tbody {
                            @for frame in frames {
                                tr { th { (frame) } @for curve in curves {
                                    @for metric in &metrics { td.n { (at(curve, frame, *metric)) } }
                                } }
                            }
                            @if let Some(found) = real_vs_real {
                                tr { th { "real" } @for _ in curves { @for metric in &metrics { td.n { (or_dash(found.get(*metric))) } } } }
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
                .filter(|key| ["objective.", "loss.", "schedule."].iter().any(|part| key.starts_with(part)))
                .collect();
            parts.push(html! {
                h3 { (kind) ": " (names(&runs)) }
                p.note { (averages(&runs)) }
                @if !objectives.is_empty() {
                    p {
                        "Each curve shows how a run learns, and its level says nothing about another run: their losses are not the
                         same quantity, since the runs differ in " code { (objectives.join(", ")) } "."
                    }
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
                        th { "run" } th.n { "parameters" } th.n { "steps" } th.n { "minutes of training" } th.n { "clips a second" }
                        th.n { "seconds a step" } th.n { "of them waiting for data" } th.n { "peak memory, GB" }
                    } }
                    tbody { @for run in &runs { tr {
                        th { (run.name) }
                        td.n { (run.trained.as_ref().map_or("–".into(), |trained| with_commas(trained.parameters))) }
                        td.n { (run.steps().unwrap_or(0)) }
                        td.n { (run.trained.as_ref().map_or("–".into(), |trained| fixed(trained.seconds / 60.0, 1))) }
                        td.n { (or_dash(run.median("clips_per_second"))) }
                        td.n { (seconds(run.median("seconds_per_step"))) }
                        td.n { (seconds(run.median("seconds_waiting_for_data"))) }
                        td.n { (or_dash(run.most("peak_memory_gb"))) }
                    } } }
                } }
                p.note {
                    "Parameters are those of the network that is trained. Speeds are medians over the lines of each log. Memory is
                     rank 0's: on a GPU what tensors held, on a CPU the whole process."
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

    /// The runs by what they train, autoencoders before what is trained in their latent spaces, and those without a
    /// checkpoint that would say it last; runs of a kind in the order in which they were found.
    fn kinds(&self) -> Vec<(String, Vec<&Training>)> {
        let mut kinds: BTreeMap<(bool, Option<&str>), Vec<&Training>> = BTreeMap::new();
        for run in &self.trainings {
            kinds.entry((run.task().is_none(), run.task())).or_default().push(run);
        }
        let title = |task: Option<&str>| match task {
            Some(task) => {
                let mut letters = task.chars();
                letters.next().map(char::to_uppercase).into_iter().flatten().chain(letters).collect()
            }
            None => "Trainings without a checkpoint".into(),
        };
        kinds.into_iter().map(|((_, task), runs)| (title(task), runs)).collect()
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

fn data_uri(kind: &str, bytes: &[u8]) -> String {
    format!("data:{kind};base64,{}", STANDARD.encode(bytes))
}

/// As a content security policy names an inline script or style.
fn source_hash(text: &str) -> String {
    format!("sha256-{}", STANDARD.encode(Sha256::digest(text.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        metrics::{Estimate, Extrapolation, Figure},
        report::repeats::Seeded,
    };

    fn figure_of(fvd: f64, clips: [i64; 2]) -> Figure {
        let extrapolation = Some(Extrapolation { value: fvd - 300.0, least_clips: 400 });
        let fvd = Estimate { value: fvd, extrapolation, ..Estimate::default() };
        let kvd = Estimate { value: -0.5, ..Estimate::default() };
        Figure { estimates: [(Metric::FVD, fvd), (Metric::KVD, kvd)].into(), runs: Vec::new(), clips }
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
            sampled: serde_json::Value::Null,
            real_vs_real: None,
            psnr_db: None,
            psnr_of: None,
            device: "cpu".into(),
            not_measured,
        }
    }

    #[test]
    fn runs_stand_together_by_what_they_train() {
        // keys say nothing: those of an autoencoder's run hold `autoencoder`, and so do those of what is trained on its latents
        let of = |name: &str, task: Option<&str>| {
            let trained = task.map(|task| Trained {
                task: task.into(),
                parameters: 1,
                seconds: 0.0,
                training: Seeded::of(Path::new(name), serde_json::Value::Null).unwrap(),
            });
            Training { trained, ..Training::of(name, "{autoencoder: runs/a, network: {}}") }
        };
        let tasks = [("new", None), ("d", Some("diffusion")), ("a", Some("autoencoder")), ("e", Some("diffusion"))];
        let page = Page { trainings: tasks.map(|(name, task)| of(name, task)).into(), ..Page::default() };
        let kinds: Vec<_> = page.kinds().into_iter().map(|(kind, runs)| (kind, names(&runs))).collect();
        let wanted = [("Autoencoder", "a"), ("Diffusion", "d, e"), ("Trainings without a checkpoint", "new")];
        assert_eq!(kinds, wanted.map(|(kind, runs)| (kind.to_string(), runs.to_string())));
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

    /// Baselines that two evaluations have in common stand there once; samples always, and a baseline that differs.
    #[test]
    fn what_evaluations_have_in_common_is_shown_once() {
        let with = |name: &str, fvd: f64, baseline: f64| {
            let mut evaluation = evaluation(name, "aa", fvd);
            evaluation.figures.push(("gaussian".into(), String::new(), figure_of(baseline, [16, 16])));
            evaluation
        };
        let evaluations = vec![with("x", 1.0, 77.5), with("y", 1.0, 77.5), with("z", 3.0, 88.5)];
        let html = Page { evaluations, ..Page::default() }.html().unwrap();
        assert_eq!((html.matches("<th>samples").count(), html.matches("<th>gaussian").count()), (3, 2), "{html}");
        assert!(html.matches("77.50").count() == 1 && html.contains("only the first has a row"), "{html}");
        assert_eq!(html.matches(", on cpu").count(), 1, "{html}");
    }

    #[test]
    fn what_files_say_is_text() {
        let hostile = "<script>alert(1)</script>\"'";
        let mut run = Training::of(hostile, &format!("unet: {}", serde_json::json!(hostile)));
        let points = vec![(1.0, 1.0), (2.0, 0.5)];
        run.metrics = vec![Series { name: hostile.into(), points }];
        let html = Page { title: hostile.into(), trainings: vec![run], ..Page::default() }.html().unwrap();
        assert!(html.contains("&lt;script&gt;alert(1)") && !html.contains("<script>alert"), "{html}");
        assert_eq!(html.matches("<script").count(), 1);
        assert!(html.contains(&source_hash(SCRIPT)) && html.contains(&source_hash(STYLE)));
    }
}
