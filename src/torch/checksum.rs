//! Whether tensors are the same, without bringing them to the host.

use anyhow::{Result, bail};
use tch::{Device, Kind, Tensor, no_grad};

/// Values that are summed at once: what is needed beside a tensor is eight bytes for each.
const PIECE: i64 = 1 << 22;

/// A number of 64 bits for each tensor, of the bits of its values in their order: computed where the tensor lies, in whole
/// numbers, so that it is the same everywhere. One value that changes always changes it, and so do two that change places.
///
/// # Errors
/// Kinds that have no bits of one, two, four or eight bytes; the device's own.
pub fn checksums<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Vec<i64>> {
    let sums = tensors.map(checksum).collect::<Result<Vec<Tensor>>>()?;
    if sums.is_empty() {
        return Ok(Vec::new());
    }
    // those of one device come down together
    let device = sums[0].device();
    let sums: Vec<Tensor> = sums.iter().map(|sum| sum.to_device(device)).collect();
    Ok(Vec::try_from(Tensor::stack(&sums, 0).to_device(Device::Cpu))?)
}

/// Σ bᵢ·(2i + 1), modulo 2⁶⁴: odd factors have inverses there.
fn checksum(tensor: &Tensor) -> Result<Tensor> {
    let bits = match tensor.kind().elt_size_in_bytes() {
        1 => Kind::Uint8,
        2 => Kind::Int16,
        4 => Kind::Int,
        8 => Kind::Int64,
        bytes => bail!("a checksum of values of {bytes} bytes ({:?})", tensor.kind()),
    };
    no_grad(|| {
        let values = tensor.f_detach()?.f_contiguous()?.f_view_dtype(bits)?.f_flatten(0, -1)?;
        let whole = (Kind::Int64, values.device());
        let mut sum = Tensor::f_zeros([0i64; 0], whole)?;
        let length = values.size()[0];
        let odd = (Tensor::f_arange(length.min(PIECE), whole)? * 2) + 1;
        for first in (0..length).step_by(PIECE as usize) {
            let count = PIECE.min(length - first);
            let piece = values.f_narrow(0, first, count)?.f_to_kind(Kind::Int64)?;
            let places = odd.f_narrow(0, 0, count)?;
            sum = sum + (&piece * places).f_sum(Kind::Int64)? + piece.f_sum(Kind::Int64)? * (2 * first);
        }
        Ok(sum)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(tensor: &Tensor) -> i64 {
        checksums([tensor].into_iter()).unwrap()[0]
    }

    #[test]
    fn a_bit_or_an_exchange_changes_the_checksum_and_memory_order_does_not() {
        let length = PIECE + 7;
        let values = Tensor::arange(length, (Kind::Float, Device::Cpu)).sin();
        let sum = of(&values);
        assert_eq!(of(&values.copy()), sum);
        for at in [0, 5, PIECE - 1, PIECE, length - 1] {
            let other = values.copy();
            // the last bit of the mantissa
            let _ = other.view_dtype(Kind::Int).narrow(0, at, 1).bitwise_xor_(1);
            assert_ne!(of(&other), sum, "value {at}");
            let moved = values.copy();
            let (one, next) = (values.narrow(0, at, 1), values.narrow(0, (at + 1) % length, 1));
            moved.narrow(0, at, 1).copy_(&next);
            moved.narrow(0, (at + 1) % length, 1).copy_(&one);
            assert_ne!(of(&moved), sum, "values {at} and the next");
        }
        let square = values.narrow(0, 0, 35).reshape([5, 7]);
        assert_eq!(of(&square.transpose(0, 1).contiguous().transpose(0, 1)), of(&square));
        assert_ne!(of(&square.transpose(0, 1)), of(&square));
    }

    /// Not a number, both zeros, other kinds, and nothing.
    #[test]
    fn checksums_are_of_bits() {
        let of_zero = |value: f32| of(&Tensor::from_slice(&[value, 1.0]));
        assert_ne!(of_zero(0.0), of_zero(-0.0));
        assert_eq!(of_zero(f32::NAN), of_zero(f32::NAN));
        for kind in [Kind::BFloat16, Kind::Double, Kind::Uint8, Kind::Int64] {
            assert_ne!(of(&Tensor::from_slice(&[1, 2]).to_kind(kind)), of(&Tensor::from_slice(&[2, 1]).to_kind(kind)));
        }
        let nothing: [&Tensor; 0] = [];
        assert_eq!(checksums(nothing.into_iter()).unwrap(), Vec::<i64>::new());
        assert_eq!(of(&Tensor::zeros([0, 3], (Kind::Float, Device::Cpu))), 0);
    }
}
