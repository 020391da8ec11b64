//! What lies in the folders of runs, read into what a page shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _},
};
use serde_json::{Map, Value};

use super::{
    Series,
    page::{
        Evaluation, Gallery, LongCurve, LongEvaluation, Page, ProtocolText, Reconstruction, SensitivityTable, Sheet,
        Trained, Training, Video, Window,
    },
    repeats::Seeded,
};
use crate::{
    atomic_file::write_atomically,
    checkpoint::{self, Checkpoint},
    evaluation::{Reconstruction as ReconstructionFigures, SETS, Sensitivity},
    experiment::UserError,
    metrics::{Distances, Figure, Interval, Metric, RealVsReal},
    run_files::{
        CARD_FILE, CHECKPOINTS_FOLDER, CURVES_FILE, EXPERIMENT_FILE, FIGURES_FILE, METRICS_FILE, RECONSTRUCTION_FILE,
        SUMMARY_FILE, TENSORBOARD_FOLDER,
    },
    text_file::{read_text, trim},
};

/// Levels below a given folder that are searched.
const LEVELS: usize = 2;
/// Videos of one folder that are shown.
const VIDEOS: usize = 12;
/// Bytes of videos on a page, which all folders of videos share evenly: in writing they grow by a third.
const VIDEO_BYTES: usize = 24_000_000;

/// Sheets of frames that evaluations write, with what they show.
const SHEETS: [(&str, &str); 2] = [
    (
        "reconstructions.png",
        "Rows in pairs: a real clip, and below it the same clip encoded and decoded. Time goes right.",
    ),
    ("gaussian.png", "Decoded Gaussian latents: what comes out where no diffusion was learned. A row a clip."),
];

/// Everything in the folders and two levels below that `lvdm` wrote, named by its path below the folder, or below
/// what several folders have in common.
///
/// # Errors
/// [`UserError`] for a folder that is not there or holds nothing; files that are not what they should be, by name and line.
pub fn collect(runs: &[PathBuf]) -> Result<Page> {
    let mut roots = Vec::new();
    for run in runs {
        if !run.is_dir() {
            return Err(UserError(format!("there is no folder {}", run.display())).into());
        }
        roots.push(run.canonicalize().with_context(|| format!("cannot read {}", run.display()))?);
    }
    let base = common(&roots);
    let mut page = Page { title: title(runs), ..Page::default() };
    let mut seen = BTreeSet::new();
    let mut galleries = Vec::new();
    for (run, root) in runs.iter().zip(&roots) {
        let before = seen.len();
        let mut holds = false;
        for folder in folders(root, LEVELS)? {
            if !seen.insert(folder.clone()) {
                holds = true; // shown already, by way of another folder
                continue;
            }
            let own = folder.file_name().map_or("/".into(), |name| name.to_string_lossy().into_owned());
            let below = folder.strip_prefix(&base).map(|path| path.display().to_string()).unwrap_or_default();
            holds |= take(&mut page, &folder, if below.is_empty() { own } else { below }, &mut galleries)?;
        }
        if !holds {
            return Err(UserError(nothing(run, root, seen.len() - before)?).into());
        }
    }
    let share = VIDEO_BYTES / galleries.len().max(1);
    for (name, files) in galleries {
        page.galleries.push(gallery(name, &files, share)?);
    }
    Ok(page)
}

/// Writes the page of what lies in `runs`, and returns its bytes.
///
/// # Errors
/// Those of [`collect`]; a full disk.
pub fn write_page(runs: &[PathBuf], out: &Path) -> Result<usize> {
    let page = collect(runs)?.html()?;
    write_atomically(out, |file| Ok(file.write_all(page.as_bytes())?))?;
    Ok(page.len())
}

/// The folder and those below it, each before what it holds, by name. What holds weights and logs only is left out.
fn folders(root: &Path, levels: usize) -> Result<Vec<PathBuf>> {
    let mut found = vec![root.to_path_buf()];
    if levels > 0 {
        for path in entries(root)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !name.starts_with('.') && name != CHECKPOINTS_FOLDER && name != TENSORBOARD_FOLDER {
                found.extend(folders(&path, levels - 1)?);
            }
        }
    }
    Ok(found)
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    let mut found = read().with_context(|| format!("cannot read {}", folder.display()))?;
    found.sort();
    Ok(found)
}

/// The path that all begin with.
fn common(paths: &[PathBuf]) -> PathBuf {
    let mut base = paths.first().cloned().unwrap_or_default();
    while !paths.iter().all(|path| path.starts_with(&base)) && base.pop() {}
    base
}

/// The folders as they were given; of several below one folder that one, and then what is below it.
fn title(runs: &[PathBuf]) -> String {
    let list = |of: &dyn Fn(&PathBuf) -> String| runs.iter().map(of).collect::<Vec<_>>().join(", ");
    let base = common(runs);
    match runs.len() > 1 && base.components().any(|part| matches!(part, Component::Normal(_))) && !runs.contains(&base)
    {
        true => {
            format!("{}: {}", base.display(), list(&|run| run.strip_prefix(&base).unwrap_or(run).display().to_string()))
        }
        false => list(&|run| run.display().to_string()),
    }
}

/// Why a folder makes no report: what was found in it, and what would.
fn nothing(run: &Path, root: &Path, searched: usize) -> Result<String> {
    let found: Vec<String> = entries(root)?
        .iter()
        .map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() { name + "/" } else { name }
        })
        .collect();
    let listed = match found.len() {
        0 => "it is empty".to_string(),
        1..=6 => format!("it holds {}", found.join(", ")),
        count => format!("it holds {} and {} more", found[..5].join(", "), count - 5),
    };
    Ok(format!(
        "{} holds nothing that lvdm wrote ({listed}; {searched} folders searched). A report is made of {EXPERIMENT_FILE} \
         and {METRICS_FILE} (a training), {FIGURES_FILE} or {CARD_FILE} (an evaluation), \
         {RECONSTRUCTION_FILE}, or .mp4 files, in the folder or up to two levels below",
        run.display()
    ))
}

/// Puts what one folder holds on the page; videos are only listed. Says whether there was anything.
fn take(page: &mut Page, folder: &Path, name: String, galleries: &mut Vec<(String, Vec<PathBuf>)>) -> Result<bool> {
    let file = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
    // each curve's windows are logged as a training's figures are
    let of_curve = folder.parent().is_some_and(|parent| parent.join(CURVES_FILE).is_file());
    let (experiment, metrics) = (file(EXPERIMENT_FILE), file(METRICS_FILE).filter(|_| !of_curve));
    let [figures, card, reconstruction, summary] =
        [FIGURES_FILE, CARD_FILE, RECONSTRUCTION_FILE, SUMMARY_FILE].map(file);
    let mut videos: Vec<PathBuf> = entries(folder)?.into_iter().filter(|path| is_mp4(path) && path.is_file()).collect();
    if videos.is_empty() && !folder.join("samples").is_dir() {
        videos.extend(file("samples.gif"));
    }
    let files = [&experiment, &metrics, &figures, &card, &reconstruction, &summary];
    let holds = files.into_iter().any(Option::is_some) || !videos.is_empty();

    if figures.is_some() || reconstruction.is_some() {
        for (sheet, caption) in SHEETS {
            if let Some(path) = file(sheet) {
                let (file, bytes) = (format!("{name}/{sheet}"), read(&path)?);
                match page.sheets.iter_mut().find(|known| known.bytes == bytes && known.caption == caption) {
                    Some(known) => known.files.push(file),
                    None => page.sheets.push(Sheet { files: vec![file], caption, bytes }),
                }
            }
        }
    }
    if experiment.is_some() || metrics.is_some() {
        page.trainings.push(Training {
            name: name.clone(),
            folder: folder.to_path_buf(),
            trained: trained(folder)?,
            experiment: experiment.map(|path| read_experiment(&path)).transpose()?,
            metrics: metrics.map_or(Ok(Vec::new()), |path| read_metrics(&path))?,
        });
    }
    if let Some(path) = figures {
        match file(CURVES_FILE) {
            Some(_) => page.long.push(read_json::<LongFile>(&path, "lvdm evaluate-long")?.into_page(name.clone())),
            None => page.evaluations.push(read_json::<FiguresFile>(&path, "lvdm evaluate")?.into_page(name.clone())),
        }
    }
    if let Some(path) = card {
        let CardFile { reports, sensitivity, mut not_measured } = read_json(&path, "lvdm evaluate --card")?;
        for report in reports {
            let not_measured = std::mem::take(&mut not_measured);
            page.evaluations.push(Evaluation { not_measured, ..report.into_page(format!("{name}/{CARD_FILE}")) });
        }
        page.sensitivities.extend(sensitivity.map(|found| sensitivity_table(format!("{name}/{CARD_FILE}"), found)));
    }
    if let Some(path) = reconstruction {
        let figures: ReconstructionFigures = read_json(&path, "lvdm evaluate reconstruction")?;
        let measures = figures.measures().map(|(name, spread, meaning)| (name, spread.mean, spread.std, meaning));
        let text = figures.conditions();
        page.reconstructions.push(Reconstruction { name: name.clone(), measures: measures.into(), text });
    }
    if let Some(path) = summary {
        page.stages.push((name.clone(), read_json::<SummaryFile>(&path, "lvdm demo")?.seconds));
    }
    if !videos.is_empty() {
        galleries.push((name, videos));
    }
    Ok(holds)
}

fn is_mp4(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    path.extension().is_some_and(|ending| ending == "mp4") && !hidden
}

/// The first videos, of at most so many bytes together.
fn gallery(name: String, files: &[PathBuf], most: usize) -> Result<Gallery> {
    let mut videos = Vec::new();
    let mut bytes = 0;
    let mut cut = (files.len() > VIDEOS).then(|| format!("a folder shows {VIDEOS}"));
    for path in files.iter().take(VIDEOS) {
        let video = read(path)?;
        bytes += video.len();
        if bytes > most {
            cut = Some(format!(
                "a page holds {} MB of videos, this folder's part is {} MB",
                VIDEO_BYTES / 1_000_000,
                most / 1_000_000
            ));
            break;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let prompt = read_text(&path.with_extension("txt")).ok().map(|text| trim(&text).to_string());
        videos.push(Video { name, prompt, bytes: video });
    }
    Ok(Gallery { name, videos, count: files.len(), cut })
}

/// What the latest checkpoint of a run says; none where there is none that can be read, of which it warns.
fn trained(run: &Path) -> Result<Option<Trained>> {
    if checkpoint::list(run)?.is_empty() {
        return Ok(None);
    }
    let read = || {
        let (path, Checkpoint { task, progress, experiment, .. }) = checkpoint::open_head(run)?;
        let (parameters, training) = (checkpoint::parameters(&path)?, Seeded::of(run, experiment)?);
        Ok(Trained { task, parameters, seconds: progress.seconds, training })
    };
    // a training that runs may delete one meanwhile, and a page of many runs does not fail by one
    let trained: Result<Trained> = read();
    Ok(trained.inspect_err(|error| tracing::warn!("{}: {error:#}", run.display())).ok())
}

fn sensitivity_table(name: String, Sensitivity { protocol_hash, mut figures, .. }: Sensitivity) -> SensitivityTable {
    let row = |(fault, meaning): (&str, &str)| Some((fault.to_string(), meaning.to_string(), figures.remove(fault)?));
    SensitivityTable { name, protocol_hash, rows: Sensitivity::rows().filter_map(row).collect() }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn text_of(path: &Path) -> Result<String> {
    read_text(path).with_context(|| format!("cannot read {}", path.display()))
}

fn read_json<T: DeserializeOwned>(path: &Path, writer: &str) -> Result<T> {
    let text = text_of(path)?;
    serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(&text)).map_err(|error| {
        let at = error.path().to_string();
        anyhow!("{} is not what `{writer}` writes, at `{at}`: {}", path.display(), error.into_inner())
    })
}

fn read_experiment(path: &Path) -> Result<(String, serde_yaml::Value)> {
    let text = text_of(path)?;
    let value = serde_yaml::from_str(&text).with_context(|| format!("{} is not YAML", path.display()))?;
    Ok((text, value))
}

/// A series a metric, in the order of the log. A last line that was cut off is one that is being written.
fn read_metrics(path: &Path) -> Result<Vec<Series>> {
    let text = text_of(path)?;
    let mut found: Vec<Series> = Vec::new();
    for (i, line) in text.split_inclusive('\n').filter(|line| line.ends_with('\n')).enumerate() {
        let wrong = |what: &str| anyhow!("{}, line {}: {what}", path.display(), i + 1);
        let values: Option<Map<String, Value>> = serde_json::from_str(line).ok();
        let values = values.ok_or_else(|| wrong("not a JSON object"))?;
        let step = values.get("step").and_then(Value::as_f64).ok_or_else(|| wrong("no `step`"))?;
        let mut values: Vec<(String, Value)> = values.into_iter().filter(|(name, _)| name != "step").collect();
        values.sort_by_key(|(name, _)| line.find(&Value::from(name.as_str()).to_string()));
        for (name, value) in values {
            let value = match value {
                Value::Null => f64::NAN,
                value => value.as_f64().ok_or_else(|| wrong(&format!("`{name}` is neither a number nor null")))?,
            };
            match found.iter_mut().find(|series| series.name == name) {
                Some(series) => series.points.push((step, value)),
                None => found.push(Series { name, points: vec![(step, value)] }),
            }
        }
    }
    Ok(found)
}

/// What is read of an evaluation's `figures.json`.
#[derive(Deserialize)]
struct FiguresFile {
    figures: BTreeMap<String, Figure>,
    #[serde(default)]
    generated: Value,
    #[serde(default)]
    generated_text: String,
    #[serde(rename = "floor")]
    real_vs_real: Option<RealVsReal>,
    psnr_db: Option<f64>,
    psnr_of: Option<String>,
    protocol: Value,
    protocol_hash: String,
    protocol_text: String,
    device: String,
}

#[derive(Deserialize)]
struct CardFile {
    reports: Vec<FiguresFile>,
    #[serde(default)]
    sensitivity: Option<Sensitivity>,
    not_measured: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct LongFile {
    curves: Vec<CurveFigures>,
    experiment: LongExperiment,
    #[serde(rename = "floor")]
    real_vs_real: Option<Distances>,
    protocol: Value,
    protocol_hash: String,
    device: String,
}

#[derive(Deserialize)]
struct CurveFigures {
    name: String,
    windows: Vec<WindowFigures>,
    motion: Option<f64>,
    seam: Option<f64>,
    settings: Value,
}

/// A window's values, and its intervals, which early files do not have.
struct WindowFigures {
    distances: Distances,
    intervals: BTreeMap<Metric, Interval>,
}

impl<'de> Deserialize<'de> for WindowFigures {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut keys = Map::deserialize(deserializer)?;
        let mut intervals = BTreeMap::new();
        for metric in Metric::all() {
            let found = keys.remove(&format!("{}_interval", metric.name())).unwrap_or_default();
            let interval: Option<Interval> = serde_json::from_value(found).map_err(D::Error::custom)?;
            intervals.extend(interval.map(|interval| (metric, interval)));
        }
        let distances = Distances::deserialize(Value::Object(keys)).map_err(D::Error::custom)?;
        Ok(WindowFigures { distances, intervals })
    }
}

/// What is read of the experiment of a long evaluation: the length of a window.
#[derive(Deserialize)]
struct LongExperiment {
    real: RealWindows,
}

#[derive(Deserialize)]
struct RealWindows {
    frames: i64,
}

#[derive(Deserialize)]
struct SummaryFile {
    seconds: BTreeMap<String, f64>,
}

impl FiguresFile {
    fn into_page(mut self, name: String) -> Evaluation {
        let mut figures = Vec::new();
        for (set, meaning) in SETS {
            figures.extend(self.figures.remove(set).map(|figure| (set.to_string(), meaning.to_string(), figure)));
        }
        figures.extend(self.figures.into_iter().map(|(set, figure)| (set, String::new(), figure)));
        Evaluation {
            name,
            generated: self.generated_text,
            sampled: self.generated,
            protocol: protocol(&self.protocol, self.protocol_hash, Some(self.protocol_text)),
            figures,
            real_vs_real: self.real_vs_real,
            psnr_db: self.psnr_db,
            psnr_of: self.psnr_of,
            device: self.device,
            not_measured: BTreeMap::new(),
        }
    }
}

impl LongFile {
    fn into_page(self, name: String) -> LongEvaluation {
        let window = self.experiment.real.frames;
        let curve = |curve: CurveFigures| LongCurve {
            name: curve.name,
            windows: (0..)
                .step_by(window.max(1) as usize)
                .zip(curve.windows)
                .map(|(first_frame, WindowFigures { distances, intervals })| Window {
                    first_frame,
                    distances,
                    intervals,
                })
                .collect(),
            motion: curve.motion,
            seam: curve.seam,
            settings: pretty(&curve.settings),
        };
        LongEvaluation {
            name,
            protocol: protocol(&self.protocol, self.protocol_hash, None),
            curves: self.curves.into_iter().map(curve).collect(),
            real_vs_real: self.real_vs_real,
            device: self.device,
        }
    }
}

fn protocol(whole: &Value, hash: String, text: Option<String>) -> ProtocolText {
    let name = whole["settings"]["name"].as_str().unwrap_or_default().to_string();
    ProtocolText { name, hash, text, whole: pretty(whole) }
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At most twelve, at most so many bytes, and the page says which it was.
    #[test]
    fn a_gallery_has_an_end() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<PathBuf> = (0..14).map(|i| folder.path().join(format!("{i:05}.mp4"))).collect();
        files.iter().for_each(|path| fs::write(path, [0; 100]).unwrap());
        fs::write(files[1].with_extension("txt"), "a dog\n").unwrap();
        let of = |files: &[PathBuf], most| gallery("samples".into(), files, most).unwrap();
        let cut = of(&files, 100_000);
        assert_eq!((cut.videos.len(), cut.count), (12, 14));
        assert!(cut.cut.unwrap().contains("a folder shows 12"));
        assert_eq!((cut.videos[0].prompt.as_deref(), cut.videos[1].prompt.as_deref()), (None, Some("a dog")));
        let cut = of(&files[..5], 350);
        assert_eq!((cut.videos.len(), cut.count), (3, 5));
        assert!(cut.cut.unwrap().contains("24 MB"));
        assert!(of(&files[..3], 300).cut.is_none());
    }

    #[test]
    fn metrics_keep_the_order_of_the_log() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(METRICS_FILE);
        let text = "{\"step\":1,\"loss\":2.0,\"kl\":null,\"a\":1}\n{\"step\":3,\"loss\":1.5,\"kl\":4.0,\"b\":1}\n{\"st";
        fs::write(&path, text).unwrap();
        let found = read_metrics(&path).unwrap();
        assert_eq!(found.iter().map(|series| series.name.as_str()).collect::<Vec<_>>(), ["loss", "kl", "a", "b"]);
        assert_eq!(found[0].points, [(1.0, 2.0), (3.0, 1.5)]);
        assert!(found[1].points[0].1.is_nan() && found[1].points[1] == (3.0, 4.0) && found[3].points == [(3.0, 1.0)]);
    }

    #[test]
    fn a_title_names_a_folder_once() {
        let of = |runs: &[&str]| title(&runs.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(of(&["runs/a", "runs/b"]), "runs: a, b");
        assert_eq!(of(&["runs/x/0/a", "runs/x/1/a"]), "runs/x: 0/a, 1/a");
        assert_eq!(of(&["runs", "runs/a"]), "runs, runs/a");
        assert_eq!(of(&["runs/a"]), "runs/a");
        assert_eq!(of(&["runs/a", "more/b"]), "runs/a, more/b");
        assert_eq!(of(&["a", "b"]), "a, b");
    }

    #[test]
    fn folders_are_named_below_what_they_share() {
        let of = |paths: &[&str]| common(&paths.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(of(&["/r/a"]), PathBuf::from("/r/a"));
        assert_eq!(of(&["/r/a/x", "/r/a/y"]), PathBuf::from("/r/a"));
        assert_eq!(of(&["/r/a", "/r/a/y", "/s"]), PathBuf::from("/"));
    }
}
