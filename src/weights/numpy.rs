//! Numpy arrays in pickles, and the nested dictionaries of them that flax writes.

use std::collections::BTreeMap;

use anyhow::{Context, Result, anyhow, bail};
use tch::{Device, Kind, Tensor};

use super::pickle::{self, Value};
use crate::{file_format::FileFormat, torch::upload_all};

/// More arrays than any network here has; bounds the walk over hostile files, whose shared values
/// can be met along more paths than could ever be listed.
const MAX_ARRAYS: usize = 100_000;

/// All arrays of a pickle of nested dictionaries, named by their keys joined with `/`.
///
/// Keys may hold slashes themselves.
///
/// # Errors
/// Not a pickle, something that is neither a dictionary nor an array, two arrays of one name.
pub fn read_arrays(bytes: &[u8]) -> Result<Arrays> {
    match FileFormat::of(bytes) {
        FileFormat::Pickle | FileFormat::Unknown => {}
        format => bail!("it is {format}"),
    }
    let root = pickle::read(bytes)?;
    let mut walk = Walk { found: BTreeMap::new(), visited: 0 };
    walk.collect(&root, "")?;
    Ok(Arrays(walk.found))
}

/// Arrays by name, taken out one by one by the network that they belong to.
#[derive(Debug)]
pub struct Arrays(pub BTreeMap<String, Tensor>);

impl Arrays {
    /// On this device, in few transfers.
    pub fn to(self, device: Device) -> Arrays {
        let (names, arrays): (Vec<String>, Vec<Tensor>) = self.0.into_iter().unzip();
        Arrays(names.into_iter().zip(upload_all(&arrays, device)).collect())
    }

    /// # Errors
    /// There is no array of this name, or it was taken before.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        self.0.remove(name).ok_or_else(|| anyhow!("the array `{name}` is missing"))
    }

    /// # Errors
    /// Some arrays have no place in the network.
    pub fn all_taken(&self) -> Result<()> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(name) => bail!("{} arrays have no place in the network, such as `{name}`", self.0.len()),
        }
    }
}

struct Walk {
    found: BTreeMap<String, Tensor>,
    visited: usize,
}

impl Walk {
    fn collect(&mut self, value: &Value, path: &str) -> Result<()> {
        self.visited += 1;
        if self.visited > MAX_ARRAYS {
            bail!("more than {MAX_ARRAYS} entries: this is no network's file");
        }
        if let Some(entries) = value.entries() {
            for (key, value) in entries {
                let key = key.as_str().ok_or_else(|| anyhow!("`{path}` has a key that is {}", key.kind()))?;
                self.collect(value, &if path.is_empty() { key.to_string() } else { format!("{path}/{key}") })?;
            }
            return Ok(());
        }
        let tensor = array(value).with_context(|| format!("`{path}` cannot be read"))?;
        match self.found.insert(path.to_string(), tensor) {
            None => Ok(()),
            Some(_) => bail!("two arrays are named `{path}`"),
        }
    }
}

/// A numpy array as a tensor on the CPU.
///
/// # Errors
/// Other objects, element types that LibTorch lacks, data that does not fill the shape.
pub fn array(value: &Value) -> Result<Tensor> {
    let object = value.as_object().ok_or_else(|| anyhow!("{} where a numpy array is expected", value.kind()))?;
    let arguments = object.arguments.as_sequence().unwrap_or_default();
    let is = |name: &str, modules: &[&str]| modules.iter().any(|module| object.callable.is_global(module, name));
    if is("_reconstruct", &["numpy.core.multiarray", "numpy._core.multiarray"]) {
        // (version, shape, dtype, whether the order is Fortran's, data)
        return match object.state.as_sequence() {
            Some([_, shape, dtype, Value::Bool(fortran), data]) => {
                let data = data.as_bytes().ok_or_else(|| anyhow!("a numpy array whose data is {}", data.kind()))?;
                build(&sizes(shape)?, element(dtype)?, *fortran, &data)
            }
            _ => bail!("a numpy array without its content"),
        };
    }
    if is("_frombuffer", &["numpy.core.numeric", "numpy._core.numeric"]) {
        return match arguments {
            [data, dtype, shape, Value::String(order)] if matches!(&**order, "C" | "F") => {
                let data = data.as_bytes().ok_or_else(|| anyhow!("a numpy array whose data is {}", data.kind()))?;
                build(&sizes(shape)?, element(dtype)?, &**order == "F", &data)
            }
            _ => bail!("a numpy array without its content"),
        };
    }
    if is("scalar", &["numpy.core.multiarray", "numpy._core.multiarray"]) {
        return match arguments {
            [dtype, data] => {
                let data = data.as_bytes().ok_or_else(|| anyhow!("a numpy number whose data is {}", data.kind()))?;
                build(&[], element(dtype)?, false, &data)
            }
            _ => bail!("a numpy number without its content"),
        };
    }
    bail!("{value:?} where a numpy array is expected")
}

fn sizes(shape: &Value) -> Result<Vec<i64>> {
    let sizes = shape.as_sequence().ok_or_else(|| anyhow!("a shape that is {}", shape.kind()))?;
    if sizes.len() > 32 {
        bail!("an array of {} dimensions", sizes.len());
    }
    sizes
        .iter()
        .map(|size| size.as_int().filter(|n| *n >= 0).ok_or_else(|| anyhow!("a shape that holds {size:?}")))
        .collect()
}

fn element(dtype: &Value) -> Result<Kind> {
    let object = dtype.as_object().filter(|object| object.callable.is_global("numpy", "dtype"));
    let object = object.ok_or_else(|| anyhow!("an element type that is {}", dtype.kind()))?;
    let name = object.arguments.as_sequence().and_then(|a| a.first()).and_then(Value::as_str).unwrap_or_default();
    // the name may carry its byte order, else the state does: (version, byte order, …)
    let (order, name) = match name.strip_prefix(['<', '>', '|', '=']) {
        Some(rest) => (&name[..1], rest),
        None => {
            let order = object.state.as_sequence().and_then(|s| s.get(1)).and_then(Value::as_str);
            (order.unwrap_or("="), name)
        }
    };
    if order == ">" {
        bail!("an array of big-endian numbers (`>{name}`)");
    }
    Ok(match name {
        "f2" => Kind::Half,
        "f4" => Kind::Float,
        "f8" => Kind::Double,
        "i1" => Kind::Int8,
        "i2" => Kind::Int16,
        "i4" => Kind::Int,
        "i8" => Kind::Int64,
        "u1" => Kind::Uint8,
        "b1" => Kind::Bool,
        _ => bail!("an array of elements `{}`", name.chars().take(40).collect::<String>()),
    })
}

fn build(shape: &[i64], kind: Kind, fortran: bool, data: &[u8]) -> Result<Tensor> {
    let bytes = shape.iter().try_fold(kind.elt_size_in_bytes(), |n, size| n.checked_mul(usize::try_from(*size).ok()?));
    if bytes != Some(data.len()) {
        bail!("an array of shape {shape:?} and {kind:?} with {} bytes of data", data.len());
    }
    if kind == Kind::Bool && data.iter().any(|b| *b > 1) {
        bail!("truth values other than 0 and 1");
    }
    if !fortran {
        return Ok(Tensor::f_from_data_size(data, shape, kind)?);
    }
    let reversed: Vec<i64> = shape.iter().rev().copied().collect();
    let axes: Vec<i64> = (0..shape.len() as i64).rev().collect();
    Ok(Tensor::f_from_data_size(data, &reversed, kind)?.f_permute(&axes)?.contiguous())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(text: &str) -> Vec<u8> {
        let mut bytes = vec![b'X'];
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(text.as_bytes());
        bytes
    }

    /// An array as numpy writes it under protocol 2 or 3.
    fn array_bytes(module: &str, dtype: &str, order: &str, shape: &[u8], fortran: bool, data: &[u8]) -> Vec<u8> {
        let mut bytes = format!("c{module}\n_reconstruct\ncnumpy\nndarray\nK\0").into_bytes();
        bytes.extend(b"\x85C\x01b\x87R(K\x01(");
        shape.iter().for_each(|size| bytes.extend([b'K', *size]));
        bytes.extend(b"tcnumpy\ndtype\n");
        bytes.extend(string(dtype));
        bytes.extend(b"\x89\x88\x87R(K\x03");
        bytes.extend(string(order));
        bytes.extend(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb");
        bytes.push(if fortran { 0x88 } else { 0x89 });
        bytes.push(b'B');
        bytes.extend((data.len() as u32).to_le_bytes());
        bytes.extend(data);
        bytes.extend(b"tb");
        bytes
    }

    fn one(array: &[u8]) -> Result<Tensor> {
        let pickle = [array, b"."].concat();
        super::array(&pickle::read(&pickle)?)
    }

    fn f4(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    #[test]
    fn both_orders_and_every_element_type() {
        let data = f4(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let c = one(&array_bytes("numpy.core.multiarray", "f4", "<", &[2, 3], false, &data)).unwrap();
        assert_eq!(c, Tensor::from_slice2(&[[1f32, 2., 3.], [4., 5., 6.]]));
        let f = one(&array_bytes("numpy._core.multiarray", "f4", "<", &[2, 3], true, &data)).unwrap();
        assert_eq!(f, Tensor::from_slice2(&[[1f32, 3., 5.], [2., 4., 6.]]));
        for (dtype, kind) in [("f8", Kind::Double), ("i8", Kind::Int64)] {
            let array = one(&array_bytes("numpy.core.multiarray", dtype, "<", &[1], false, &[0; 8])).unwrap();
            assert_eq!((array.kind(), array.size()), (kind, vec![1]));
        }
        let bytes = one(&array_bytes("numpy.core.multiarray", "u1", "|", &[2], false, &[7, 255])).unwrap();
        assert_eq!(bytes, Tensor::from_slice(&[7u8, 255]));
        let empty = one(&array_bytes("numpy.core.multiarray", "f4", "<", &[0, 3], false, &[])).unwrap();
        assert_eq!(empty.size(), [0, 3]);
    }

    #[test]
    fn arrays_as_protocol_5_writes_them() {
        let mut bytes = b"cnumpy.core.numeric\n_frombuffer\n(\x96\x08\0\0\0\0\0\0\0".to_vec();
        bytes.extend(f4(&[1.5, -2.0]));
        bytes.extend(b"cnumpy\ndtype\nX\x02\0\0\0f4\x89\x88\x87R(K\x03X\x01\0\0\0<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tbK\x02\x85X\x01\0\0\0CtR");
        assert_eq!(one(&bytes).unwrap(), Tensor::from_slice(&[1.5f32, -2.0]));
    }

    #[test]
    fn wrong_arrays_are_errors() {
        let multiarray = "numpy.core.multiarray";
        for (bytes, word) in [
            (array_bytes(multiarray, "f4", "<", &[2, 3], false, &[0; 23]), "23 bytes"),
            (array_bytes(multiarray, "f4", ">", &[1], false, &[0; 4]), "big-endian"),
            (array_bytes(multiarray, "O8", "|", &[1], false, &[0; 8]), "elements `O8`"),
            (array_bytes(multiarray, "b1", "|", &[1], false, &[2]), "truth values"),
            (array_bytes(multiarray, "f8", "<", &[255; 20], false, &[0; 8]), "with 8 bytes"),
            (array_bytes(multiarray, "f8", "<", &[1; 40], false, &[0; 8]), "40 dimensions"),
            (array_bytes("os", "f8", "<", &[1], false, &[0; 8]), "os._reconstruct"),
        ] {
            let message = format!("{:#}", one(&bytes).unwrap_err());
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn nested_dictionaries_with_slashes_in_their_keys() {
        let entry = |key: &str, value: Vec<u8>| [string(key), value, b"s".to_vec()].concat();
        let weight = array_bytes("numpy.core.multiarray", "f4", "<", &[1], false, &f4(&[2.0]));
        let inner = [b"}".to_vec(), entry("Branch_0/Conv3d_0a_1x1", weight.clone()), entry("bias", weight)].concat();
        let whole = [b"}".to_vec(), entry("Mixed_3b", inner.clone()), b".".to_vec()].concat();
        let arrays = read_arrays(&whole).unwrap().0;
        assert_eq!(arrays.keys().collect::<Vec<_>>(), ["Mixed_3b/Branch_0/Conv3d_0a_1x1", "Mixed_3b/bias"]);

        let clash = [b"}".to_vec(), entry("a", inner.clone()), entry("a", inner), b".".to_vec()].concat();
        assert!(read_arrays(&clash).unwrap_err().to_string().contains("two arrays"));
        assert!(read_arrays(b"}K\x01K\x02s.").is_err());
        assert!(read_arrays(b"}X\x01\0\0\0aK\x02s.").is_err());
        // 2^300 paths
        let mut bomb = b"}q\0".to_vec();
        (0..300).for_each(|_| bomb.extend(b"}(X\x01\0\0\0ah\0X\x01\0\0\0bh\0uq\0"));
        let bomb = [b"N".to_vec(), bomb, b"q\x01\x86q\x02.".to_vec()].concat();
        assert!(read_arrays(&bomb).is_err());
    }

    #[test]
    fn damaged_arrays_never_panic() {
        let whole = array_bytes("numpy.core.multiarray", "f4", "<", &[2, 2], true, &f4(&[1.0; 4]));
        for bit in 0..whole.len() * 8 {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let _ = one(&damaged);
        }
        for length in 0..whole.len() {
            let _ = one(&whole[..length]);
        }
    }
}
