//! What a file is by its first bytes, whatever its name ends in.

use std::{
    fmt,
    fs::{self, File},
    io::Read,
    path::Path,
};

use anyhow::{Context, Result};
use serde_json::Value;

/// Bytes from which a format is told: a tar names itself at byte 257.
const START: usize = 512;

/// Kinds of files in which weights are found, and what is found in their place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFormat {
    /// No byte in it.
    Empty,
    /// A JSON header behind the eight bytes of its length.
    Safetensors,
    /// PyTorch's since 1.6, numpy's npz.
    Zip,
    /// PyTorch's before 1.6: pickles and storages one after the other, behind a magic number.
    LegacyTorch,
    /// Python's pickle of protocol 2 or later.
    Pickle,
    /// What git has in place of a large file that was not downloaded.
    LfsPointer,
    /// A page instead of the file: a log in, an error.
    WebPage,
    /// A text of JSON.
    Json,
    /// Compressed by gzip.
    Gzip,
    /// Another compressed archive.
    Archive,
    /// An archive of files, and PyTorch's format before 0.1.10.
    Tar,
    /// The format of Keras.
    Hdf5,
    /// The format of llama.cpp and its kin.
    Gguf,
    /// One array of numpy.
    Npy,
    /// Nothing of these.
    Unknown,
}

use FileFormat::{
    Archive, Empty, Gguf, Gzip, Hdf5, Json, LegacyTorch, LfsPointer, Npy, Pickle, Safetensors, Tar, Unknown, WebPage,
    Zip,
};

impl FileFormat {
    /// Of a file that begins with these bytes (512 tell all).
    pub fn of(start: &[u8]) -> Self {
        const SIGNATURES: [(&[u8], FileFormat); 15] = [
            (b"PK\x03\x04", Zip),
            (b"PK\x05\x06", Zip),
            // pickle.dumps(0x1950a86a20f9469cfc6c, protocol=2)
            (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", LegacyTorch),
            (b"version https://git-lfs.github.com", LfsPointer),
            (b"version https://hawser.github.com", LfsPointer),
            (b"\x1f\x8b", Gzip),
            (b"BZh", Archive),
            (b"\xfd7zXZ\0", Archive),
            (b"\x28\xb5\x2f\xfd", Archive),
            (b"7z\xbc\xaf\x27\x1c", Archive),
            (b"Rar!\x1a\x07", Archive),
            (b"\x89HDF\r\n\x1a\n", Hdf5),
            (b"GGUF", Gguf),
            (b"GGML", Gguf),
            (b"\x93NUMPY", Npy),
        ];
        if start.is_empty() {
            return Empty;
        }
        // no header is as long as 2^40 bytes: its length ends in zeros
        if start.len() > 8 && start[8] == b'{' && start[5..8] == [0; 3] {
            return Safetensors;
        }
        if let Some((_, format)) = SIGNATURES.iter().find(|(signature, _)| start.starts_with(signature)) {
            return *format;
        }
        if let [0x80, 2..=5, ..] = start {
            return Pickle;
        }
        if start.get(257..262) == Some(b"ustar") {
            return Tar;
        }
        let text = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
        let word = text[..text.len().min(14)].to_ascii_lowercase();
        if ["<!doctype html", "<html", "<head", "<body", "<?xml", "<!--"]
            .iter()
            .any(|tag| word.starts_with(tag.as_bytes()))
        {
            return WebPage;
        }
        if matches!(text.first(), Some(b'{' | b'[')) {
            return Json;
        }
        Unknown
    }

    /// Of this file.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let cannot = || format!("cannot open {}", path.display());
        let file = File::open(path).with_context(cannot)?;
        let mut start = Vec::new();
        file.take(START as u64).read_to_end(&mut start).with_context(cannot)?;
        Ok(Self::of(&start))
    }
}

/// Reads a text of JSON; a byte order mark is no part of it.
///
/// # Errors
/// A file that cannot be read, or is something else.
pub fn read_json(path: &Path) -> Result<Value> {
    let name = path.display();
    let bytes = fs::read(path).with_context(|| format!("cannot read {name}"))?;
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    serde_json::from_slice(text).with_context(|| match FileFormat::of(&bytes) {
        Json | Unknown => format!("{name} is not JSON, or it is damaged"),
        format => format!("{name} is not JSON but {format}"),
    })
}

/// What it is, and what can be done where it is not what was wanted.
impl fmt::Display for FileFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Empty => "an empty file: its download or its writing failed",
            Safetensors => "a safetensors file",
            Zip => "a zip file, as checkpoints of PyTorch are",
            LegacyTorch => "a checkpoint of PyTorch before 1.6",
            Pickle => "a pickle of Python, not a file of torch.save",
            LfsPointer => {
                "a pointer of git-lfs: the file itself was not downloaded (`git lfs install` and `git lfs pull` in its \
                 folder get it)"
            }
            WebPage => "a web page, not the file: the download gave a log-in or an error page; download it again",
            Json => "a text of JSON, not weights",
            Gzip => "compressed by gzip: unpack it first (gunzip, or tar xzf)",
            Archive => "a compressed archive: unpack it first",
            Tar => "a tar archive: unpack it first (tar xf)",
            Hdf5 => "an HDF5 file (of Keras), which is not read; weights are wanted as safetensors or of PyTorch",
            Gguf => {
                "a GGUF file (quantised weights), which is not read; weights are wanted as safetensors or of PyTorch"
            }
            Npy => "a single array of numpy, not weights with names",
            Unknown => "neither a safetensors file nor a checkpoint of PyTorch, or its beginning is damaged",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first bytes of files as they are found, whatever they are called.
    #[test]
    fn the_first_bytes_tell_what_a_file_is() {
        let tar = [&[b'a'; 257][..], b"ustar\0"].concat();
        for (start, format) in [
            (&b""[..], Empty),
            (b"\x50\x4b\0\0\0\0\0\0{\"a\":", Safetensors),
            (b"PK\x03\x04\0\0\x08\x08\0\0", Zip),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", LegacyTorch),
            (b"\x80\x04\x95\x10", Pickle),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", LfsPointer),
            (b"<!DOCTYPE html><html>", WebPage),
            (b"\xef\xbb\xbf\n <!doctype HTML>", WebPage),
            (b"<html lang=en>", WebPage),
            (b"{\"error\": \"Unauthorized\"}", Json),
            (b"\x1f\x8b\x08\0", Gzip),
            (&tar, Tar),
            (b"\x89HDF\r\n\x1a\n\0", Hdf5),
            (b"GGUF\x03\0\0\0", Gguf),
            (b"\x93NUMPY\x01\0", Npy),
            (b"hello", Unknown),
            (b"PK", Unknown),
        ] {
            assert_eq!(FileFormat::of(start), format, "{}", start.escape_ascii());
        }
    }
}
