//! Dropout whose choices are numbers of the samples, as all random numbers here are.

use tch::{Kind, Tensor};

/// Sets a share of activations to zero in training and scales the others up, so that their mean stays.
///
/// Which are dropped is a hash of the sample's key, of the layer and of the place in the activation. Therefore it is the
/// same on every device, for every size of a batch, on any number of ranks, after a resumed training, and in the second run
/// of a forward pass that is computed again.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    /// The share that is dropped, from 0 up to 1.
    pub share: f64,
    /// Of the layers of a network each has its own.
    pub layer: i64,
}

impl Dropout {
    /// x `[B, …]`, of which row i is dropped by the i-th of the keys `[B]` int64, numbers below 2³¹. Without keys nothing is
    /// dropped.
    pub fn forward(&self, x: &Tensor, keys: Option<&Tensor>) -> Tensor {
        let Some(keys) = keys.filter(|_| self.share > 0.0) else { return x.shallow_clone() };
        let size = x.size();
        let mut one_a_row = vec![1; size.len()];
        one_a_row[0] = size[0];
        let mut places = size.clone();
        places[0] = 1;
        let count = places.iter().product::<i64>();
        let keys = mixed(&(keys.to_kind(Kind::Int) + mixed_number(self.layer))).view(one_a_row.as_slice());
        let place = Tensor::arange(count, (Kind::Int, x.device())).view(places.as_slice());
        // 24 bits of the hash, which float32 holds exactly
        let chance = mixed(&(place + keys)).bitwise_and(0xFF_FFFF);
        let stays = chance.ge((self.share * f64::from(1 << 24)).round() as i64);
        x * stays.to_kind(x.kind()) / (1.0 - self.share)
    }
}

/// A permutation of 32-bit numbers without visible order (lowbias32 by C. Wellons).
fn mixed(x: &Tensor) -> Tensor {
    let folded = |x: &Tensor, bits: i64| {
        // a shift of a signed number repeats its sign, which is cut off
        let shifted = x.bitwise_right_shift_tensor_scalar(bits).bitwise_and((1i64 << (32 - bits)) - 1);
        x.bitwise_xor_tensor(&shifted)
    };
    let x = folded(x, 16) * i64::from(0x7FEB_352D_i32);
    let x = folded(&x, 15) * i64::from(0x846C_A68B_u32 as i32);
    folded(&x, 16)
}

/// The same of a number of the host, as a signed one.
fn mixed_number(x: i64) -> i64 {
    let x = x as u32;
    let x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
    let x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
    i64::from((x ^ (x >> 16)) as i32)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// The hash on tensors is that of numbers; the share is kept; rows of equal keys drop alike, others and other layers not;
    /// a row does not depend on the rest of its batch.
    #[test]
    fn a_sample_drops_by_its_key() {
        let numbers = [0, 1, -5, 123_456_789];
        let tensor = mixed(&Tensor::from_slice(&numbers.map(|x| x as i32)));
        assert_eq!(Vec::<i64>::try_from(tensor.to_kind(Kind::Int64)).unwrap(), numbers.map(mixed_number));

        let ones = Tensor::ones([3, 50, 10, 100], (Kind::Float, Device::Cpu));
        let keys = Tensor::from_slice(&[7i64, 2_000_000_000, 7]);
        let dropout = Dropout { share: 0.1, layer: 3 };
        let y = dropout.forward(&ones, Some(&keys));
        let zeros = y.eq(0.0).to_kind(Kind::Double).mean_dim([1, 2, 3].as_slice(), false, Kind::Double);
        for share in Vec::<f64>::try_from(zeros).unwrap() {
            assert!((share - 0.1).abs() < 0.005, "{share}"); // 50,000 draws have a deviation of 0.0013
        }
        assert!((y.max().double_value(&[]) - 1.0 / 0.9).abs() < 1e-6);
        let same = |a: &Tensor, b: &Tensor| a.eq_tensor(b).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert_eq!(same(&y.get(0), &y.get(2)), 1.0);
        assert!((same(&y.get(0), &y.get(1)) - 0.82).abs() < 0.01);
        let alone = dropout.forward(&ones.narrow(0, 1, 1), Some(&keys.narrow(0, 1, 1)));
        assert_eq!(same(&alone.get(0), &y.get(1)), 1.0);
        let other = Dropout { share: 0.1, layer: 4 }.forward(&ones, Some(&keys));
        assert!((same(&other, &y) - 0.82).abs() < 0.01);
        assert_eq!(same(&dropout.forward(&ones, None), &ones), 1.0);
    }
}
