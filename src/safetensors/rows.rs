//! A tensor that stays in its file: of a large one as much is read as is asked for.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use super::{DIGEST_PLACE, Header, hex, kind};

/// A tensor `[N, …]` of a file, whose rows along the first axis are read as they are asked for.
pub struct TensorRows {
    path: PathBuf,
    file: File,
    start: u64,
    size: Vec<i64>,
    kind: Kind,
}

impl TensorRows {
    /// None where the file holds no tensor of this name with a first axis.
    ///
    /// # Errors
    /// A file that is missing, cut short, or of another kind.
    pub fn open(path: &Path, name: &str) -> Result<Option<Self>> {
        let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let header = Header::read(&mut file, path)?;
        let Some(info) = header.tensors.info(name).filter(|info| !info.shape.is_empty()) else { return Ok(None) };
        let kind = kind(info.dtype).with_context(|| format!("tensor `{name}` of {}", path.display()))?;
        let start = header.data_start + info.data_offsets.0 as u64;
        let size = info.shape.iter().map(|&n| n as i64).collect();
        Ok(Some(TensorRows { path: path.to_path_buf(), file, start, size, kind }))
    }

    /// `[N, …]`
    pub fn size(&self) -> &[i64] {
        &self.size
    }

    /// These rows in this order, `[n, …]` on the host.
    ///
    /// # Errors
    /// A row that is not there; a file that is no longer whole.
    pub fn read(&self, rows: &[i64]) -> Result<Tensor> {
        let row = self.size[1..].iter().product::<i64>() as usize * self.kind.elt_size_in_bytes();
        let mut bytes = vec![0; rows.len() * row];
        for (i, &number) in rows.iter().enumerate() {
            ensure!((0..self.size[0]).contains(&number), "row {number} of {} in {}", self.size[0], self.path.display());
            self.file
                .read_exact_at(&mut bytes[i * row..(i + 1) * row], self.start + number as u64 * row as u64)
                .with_context(|| format!("cannot read row {number} of {}", self.path.display()))?;
        }
        let size = [&[rows.len() as i64], &self.size[1..]].concat();
        Ok(Tensor::f_from_data_size(&bytes, &size, self.kind)?)
    }
}

/// Reads a file once, piece by piece, and compares it with the digest that it carries; one without is not judged.
///
/// # Errors
/// A file that is missing, cut short, damaged, or of another kind.
pub fn check_digest(path: &Path) -> Result<()> {
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut header = Header::read(&mut file, path)?;
    let Some(promised) = header.digest() else { return Ok(()) };
    header.bytes[DIGEST_PLACE].fill(b'0');
    let mut digest = Sha256::new_with_prefix(&header.bytes);
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece).with_context(|| format!("cannot read {}", path.display()))? {
            0 => break,
            count => digest.update(&piece[..count]),
        }
    }
    let found = hex(digest);
    ensure!(promised == found, "{} is damaged: its SHA-256 is {found}, it was written with {promised}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::Value;

    use super::*;
    use crate::safetensors::write_safetensors_atomically;

    /// Rows come as they are in the whole tensor, in any order and several times, and only they are read: a file whose
    /// other rows are gone still gives those that are there.
    #[test]
    fn rows_are_read_as_they_are_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let all = Tensor::arange(5 * 6, (Kind::Float, tch::Device::Cpu)).reshape([5, 2, 3]);
        let tensors =
            [("a", Tensor::from_slice(&[1u8, 2])), ("rows", all.shallow_clone()), ("scalar", Tensor::from(1.0))];
        write_safetensors_atomically(&path, &tensors, &Value::Null).unwrap();
        let rows = TensorRows::open(&path, "rows").unwrap().unwrap();
        assert_eq!(rows.size(), [5, 2, 3]);
        for wanted in [&[3i64, 0, 3][..], &[4], &[0, 1, 2, 3, 4]] {
            assert!(rows.read(wanted).unwrap().equal(&all.index_select(0, &Tensor::from_slice(wanted))), "{wanted:?}");
        }
        assert!(TensorRows::open(&path, "none").unwrap().is_none());
        assert!(TensorRows::open(&path, "scalar").unwrap().is_none());
        assert!(rows.read(&[5]).unwrap_err().to_string().contains("row 5 of 5"));
        check_digest(&path).unwrap();

        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(check_digest(&path).unwrap_err().to_string().contains("is damaged"));
        let open = fs::OpenOptions::new().write(true).open(&path).unwrap();
        open.set_len(rows.start + 2 * 6 * 4).unwrap();
        assert!(rows.read(&[1, 0]).unwrap().equal(&all.narrow(0, 0, 2).flip([0])));
        assert!(rows.read(&[2]).is_err());
        assert!(check_digest(&path).unwrap_err().to_string().contains("truncated"));
    }
}
