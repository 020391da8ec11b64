//! Where sampled videos go: what the ending of a name stands for, and what a folder's videos were made with.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::Value;
use tch::Tensor;

use crate::{
    atomic_file::write_atomically,
    data::{PackedWriter, numpy::NumpyWriter, write_video},
    experiment::UserError,
    file_format::read_json,
    run_files::SAMPLING_FILE,
};

/// What videos are written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One mp4 each.
    Folder,
    /// The mp4 of a single video.
    Video,
    /// A packed data set.
    Packed,
    /// An array.
    Numpy,
}

impl Form {
    /// By the ending of the name, in either case, of so many videos. What is a folder already, or ends in a slash, or
    /// has no ending of letters, is a folder.
    ///
    /// # Errors
    /// An ending of something that is not written.
    pub fn of(out: &Path, videos: u64) -> Result<Self, UserError> {
        let ending = out.extension().map(|ending| ending.to_string_lossy().to_lowercase()).unwrap_or_default();
        let is_folder = out.is_dir() || out.as_os_str().as_encoded_bytes().ends_with(b"/");
        let letters = ending.chars().filter(char::is_ascii_alphabetic).count();
        match ending.as_str() {
            _ if is_folder => Ok(Form::Folder),
            "safetensors" => Ok(Form::Packed),
            "npz" | "npy" => Ok(Form::Numpy),
            "mp4" if videos == 1 => Ok(Form::Video),
            // `samples.v2` and `eta0.5` are names of folders
            "" => Ok(Form::Folder),
            ending if letters < 2 && ending != "h5" => Ok(Form::Folder),
            ending => Err(UserError(format!(
                "--out {}: {videos} videos cannot be written as .{ending}; give a folder (with / at its end, where its \
                 name ends so), NAME.npz, NAME.npy or NAME.safetensors, or NAME.mp4 for a single video",
                out.display()
            ))),
        }
    }

    /// Whether it writes mp4.
    pub fn is_video(self) -> bool {
        matches!(self, Form::Folder | Form::Video)
    }
}

/// Checks that a name is that of a folder, by [`Form::of`].
///
/// # Errors
/// It has the ending of a file.
pub fn check_folder(out: &Path) -> Result<(), UserError> {
    match Form::of(out, 2) {
        Ok(Form::Folder) => Ok(()),
        _ => Err(UserError(format!(
            "--out {}: mp4 files are written into a folder; give its name (with / at its end, where it ends like a file's)",
            out.display()
        ))),
    }
}

/// Checks that a file is called as what is written into it.
///
/// # Errors
/// Another ending.
pub fn check_ending(out: &Path, wanted: &str) -> Result<(), UserError> {
    match out.extension() {
        Some(ending) if ending.eq_ignore_ascii_case(wanted) && !out.is_dir() => Ok(()),
        _ => Err(UserError(format!("--out {}: give the name of a file that ends in .{wanted}", out.display()))),
    }
}

/// Checks that mp4 files can have this size and rate.
///
/// # Errors
/// Why not.
pub fn check_mp4(height: i64, width: i64, fps: f64) -> Result<(), UserError> {
    if !cfg!(feature = "video") {
        return Err(UserError(
            "this binary was built without the feature `video` and cannot write mp4: give --out NAME.safetensors or \
             NAME.npz"
                .into(),
        ));
    }
    if height % 2 != 0 || width % 2 != 0 {
        return Err(UserError(format!(
            "{width}x{height}: mp4 needs even sides; choose an even resolution, or give --out NAME.npz"
        )));
    }
    if !(0.01..=1000.0).contains(&fps) {
        return Err(UserError(format!("--fps {fps}: from 0.01 to 1000 frames a second can be written")));
    }
    Ok(())
}

/// Where videos go as they come.
pub enum Out {
    Mp4 { place: PathBuf, is_folder: bool, fps: f64 },
    Packed(PackedWriter),
    Numpy(NumpyWriter),
}

impl Out {
    /// For so many clips of the shape `[3, F, H, W]`, sampled with a seed.
    pub fn create(form: Form, path: &Path, count: i64, clip: [i64; 4], fps: f64, seed: u64) -> Result<Self> {
        Ok(match form {
            Form::Folder | Form::Video => Out::Mp4 { place: path.to_path_buf(), is_folder: form == Form::Folder, fps },
            Form::Packed => Out::Packed(PackedWriter::create(path, count, clip[1], clip[2], seed)?),
            Form::Numpy => Out::Numpy(NumpyWriter::create(path, count, clip)?),
        })
    }

    /// Clips u8 `[n, 3, F, H, W]` with their numbers, and what they show where they were given a text.
    pub fn write(&mut self, clips: &Tensor, samples: &[u64], shown: &[&str]) -> Result<()> {
        let (place, is_folder, fps) = match self {
            Out::Packed(writer) => return writer.push(clips),
            Out::Numpy(writer) => return writer.push(clips),
            Out::Mp4 { place, is_folder, fps } => (place, *is_folder, *fps),
        };
        for (i, &sample) in samples.iter().enumerate() {
            let path = if is_folder { place.join(format!("{sample:05}.mp4")) } else { place.clone() };
            write_video(&path, &clips.get(i as i64), fps)?;
            if let Some(prompt) = shown.get(i) {
                fs::write(path.with_extension("txt"), format!("{prompt}\n"))
                    .with_context(|| format!("cannot write beside {}", path.display()))?;
            }
        }
        Ok(())
    }

    pub fn finish(self) -> Result<()> {
        match self {
            Out::Mp4 { .. } => Ok(()),
            Out::Packed(writer) => writer.finish(),
            Out::Numpy(writer) => writer.finish(),
        }
    }
}

/// Writes down what the numbered videos of a folder are made with, or checks that it is the same as before: videos of
/// two settings in one folder would be measured as one set.
///
/// # Errors
/// A folder that holds videos of other settings, or of which nothing says what made them; one that cannot be written.
pub fn remember(folder: &Path, settings: &Value) -> Result<()> {
    let file = folder.join(SAMPLING_FILE);
    if file.exists() {
        let before = read_json(&file)?;
        if before == *settings {
            return Ok(());
        }
        let differs = |name: &&String| before.get(name) != settings.get(name);
        let named: Vec<&str> = settings
            .as_object()
            .map_or(Vec::new(), |all| all.keys().filter(differs).map(|name| name.as_str()).collect());
        return Err(UserError(format!(
            "{} holds videos of other settings ({}: see {SAMPLING_FILE} in it); give another --out, or delete it",
            folder.display(),
            named.join(", ")
        ))
        .into());
    }
    if let Some(video) = numbered_video(folder) {
        return Err(UserError(format!(
            "{} holds videos already ({video}), and no {SAMPLING_FILE} says what made them; give another --out, or delete \
             them",
            folder.display()
        ))
        .into());
    }
    let text = serde_json::to_string_pretty(settings)?;
    write_atomically(&file, |out| Ok(out.write_all(text.as_bytes())?))
}

/// One of the videos of a folder that are named as samples are: `00000.mp4`.
fn numbered_video(folder: &Path) -> Option<String> {
    let entries = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let is_numbered = |name: &String| {
        name.strip_suffix(".mp4").is_some_and(|stem| stem.len() >= 5 && stem.bytes().all(|byte| byte.is_ascii_digit()))
    };
    entries.filter(is_numbered).min()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_ending_says_what_is_written_or_is_refused() {
        for (name, form) in [
            ("x.npz", Form::Numpy),
            ("x.NPZ", Form::Numpy),
            ("a/x.Npy", Form::Numpy),
            ("x.SafeTensors", Form::Packed),
            ("x", Form::Folder),
            ("runs/a.b/x", Form::Folder),
            ("eta0.5", Form::Folder),
            ("samples.v2", Form::Folder),
            ("..", Form::Folder),
            ("x.gif/", Form::Folder),
        ] {
            assert_eq!(Form::of(Path::new(name), 3).unwrap(), form, "{name}");
        }
        for name in
            ["x.mp4", "x.gif", "x.GIF", "x.pt", "x.pth", "x.webm", "x.h5", "x.zip", "x.safetensor", "x.mkv", "x.json"]
        {
            let error = Form::of(Path::new(name), 3).unwrap_err().0;
            assert!(error.contains(name) && error.contains("NAME.npz") && error.contains("folder"), "{error}");
        }
        assert_eq!(Form::of(Path::new("x.MP4"), 1).unwrap(), Form::Video);
        let folder = tempfile::Builder::new().suffix(".mp4").tempdir().unwrap();
        assert_eq!(Form::of(folder.path(), 3).unwrap(), Form::Folder);
    }

    #[test]
    fn a_folder_holds_videos_of_one_setting() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("samples");
        let (one, other) = (json!({"seed": 0, "steps": 2}), json!({"seed": 1, "steps": 2}));
        remember(&at, &one).unwrap();
        remember(&at, &one).unwrap();
        let error = remember(&at, &other).unwrap_err();
        assert!(error.is::<UserError>() && error.to_string().contains("other settings (seed:"), "{error}");
        // of unknown ones too
        let at = folder.path().join("old");
        fs::create_dir(&at).unwrap();
        fs::write(at.join("holiday.mp4"), []).unwrap();
        fs::write(at.join("00003.mp4"), []).unwrap();
        let error = remember(&at, &one).unwrap_err().to_string();
        assert!(error.contains("(00003.mp4)"), "{error}");
        fs::remove_file(at.join("00003.mp4")).unwrap();
        remember(&at, &one).unwrap();
    }
}
