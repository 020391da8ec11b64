//! What operations would do on a GPU, without doing it: they run for the shapes of their results alone.

use std::ffi::{CStr, c_char, c_int, c_void};

use tch::{Kind, Tensor};

use super::{check, through_cpp};

unsafe extern "C" {
    fn lvdm_by_shapes(
        call_data: *mut c_void,
        call: unsafe extern "C" fn(*mut c_void),
        data: *mut c_void,
        take: unsafe extern "C" fn(*mut c_void, *const c_char, i64, i64, bool),
        peak: *mut i64,
    ) -> *mut c_char;
    fn lvdm_held_by_shapes() -> i64;
    fn lvdm_without_memory(sizes: *const i64, dimensions: i64, kind: c_int, x: *mut *mut c_void) -> *mut c_char;
}

/// A kernel that a GPU would start.
#[derive(Debug, Clone, PartialEq)]
pub struct Kernel {
    /// What it computes: LibTorch's operation, or one of ours (`lvdm::…`).
    pub operation: String,
    /// Of the tensors that it reads and writes, each once.
    pub bytes: i64,
    /// Operations of its products and convolutions, two a multiply-add; 0 of all else.
    pub flops: i64,
    /// Whether it computes in bfloat16.
    pub half: bool,
}

/// What ran for its shapes alone.
#[derive(Debug, Clone, Default)]
pub struct ByShapes {
    /// In their order.
    pub kernels: Vec<Kernel>,
    /// The most bytes of tensors without memory that were there at a time, beyond those before.
    pub peak: i64,
}

/// Runs `body`, whose operations compute nothing of tensors [`without_memory`], and says which kernels they would start: within
/// [`as_on_gpu`](super::as_on_gpu) those of a GPU.
///
/// # Panics
/// Where `body` does, as where it reads a value that is not there.
pub fn by_shapes<T>(body: impl FnOnce() -> T) -> (T, ByShapes) {
    unsafe extern "C" fn take(data: *mut c_void, name: *const c_char, bytes: i64, flops: i64, half: bool) {
        // SAFETY: `data` is the list below, which nobody else uses meanwhile; `name` is text of C++'s.
        let (kernels, name) = unsafe { (&mut *data.cast::<Vec<Kernel>>(), CStr::from_ptr(name)) };
        kernels.push(Kernel { operation: name.to_string_lossy().into_owned(), bytes, flops, half });
    }
    let mut found = ByShapes::default();
    let (kernels, peak) = (&raw mut found.kernels, &raw mut found.peak);
    let value = through_cpp(body, |data, call| {
        // SAFETY: `call` matches the type behind `data`, and `take` the list's; both live as long as the call.
        check(unsafe { lvdm_by_shapes(data, call, kernels.cast(), take, peak) })
    })
    .expect("of the body's own errors there is none");
    (value, found)
}

/// The bytes of tensors without memory that the body of the [`by_shapes`] which runs now holds; 0 outside of one.
pub fn held_by_shapes() -> i64 {
    // SAFETY: a number out.
    unsafe { lvdm_held_by_shapes() }
}

/// A tensor that has a shape and no memory, for [`by_shapes`]: elsewhere nothing may compute with it.
pub fn without_memory(shape: &[i64], kind: Kind) -> Tensor {
    // LibTorch's numbers of its types
    let kind = match kind {
        Kind::Int64 => 4,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::Bool => 11,
        Kind::BFloat16 => 15,
        other => panic!("tensors without memory are not made of {other:?}"),
    };
    let mut x = std::ptr::null_mut();
    // SAFETY: so many sizes; `x` receives an owned tensor where there is no error.
    unsafe {
        check(lvdm_without_memory(shape.as_ptr(), shape.len() as i64, kind, &mut x)).unwrap_or_else(|e| panic!("{e}"));
        Tensor::from_ptr(x.cast())
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::torch::{Autocast, as_on_gpu, backward, caught, clear_gradients, peak_host_memory};

    /// One product, what adds its bias, and nothing is computed.
    #[test]
    fn a_product_by_hand() {
        let [x, weight, bias] = [vec![6, 8], vec![5, 8], vec![5]].map(|shape| without_memory(&shape, Kind::Float));
        let (y, found) = by_shapes(|| x.linear(&weight, Some(&bias)).relu());
        assert_eq!(y.size(), [6, 5]);
        let named: Vec<&str> = found.kernels.iter().map(|kernel| kernel.operation.as_str()).collect();
        assert_eq!(named, ["aten::addmm", "aten::relu"]);
        let [product, rectifier] = [&found.kernels[0], &found.kernels[1]];
        assert_eq!((product.flops, product.bytes), (2 * 6 * 5 * 8, 4 * (6 * 8 + 5 * 8 + 5 + 6 * 5)));
        assert_eq!((rectifier.flops, rectifier.bytes, rectifier.half), (0, 4 * 2 * 30, false));
        assert_eq!(found.peak, 4 * 2 * 30);
    }

    /// What one network of many operations gives, keeps and holds is the same with memory and without.
    #[test]
    fn shapes_are_those_of_the_operations_themselves() {
        let network = |x: &Tensor, kernel: &Tensor, weight: &Tensor, table: &Tensor| {
            let h = x.conv2d(kernel, None::<Tensor>, [2, 2], [1, 1], [1, 1], 1);
            let h = h.group_norm(2, None::<Tensor>, None::<Tensor>, 1e-5, false).silu();
            let h = h.upsample_nearest2d([8, 8], None, None).leaky_relu();
            let tokens = h.flatten(2, 3).transpose(1, 2).linear(weight, None::<Tensor>);
            let heads = tokens.reshape([2, 64, 2, 4]).transpose(1, 2);
            let seen =
                Tensor::scaled_dot_product_attention(&heads, &heads, &heads, None::<Tensor>, 0.0, false, None, false);
            let rows = table.index_select(0, &Tensor::from_slice(&[0i64, 2, 1, 2]));
            let y = Tensor::einsum("nhtd,sd->nhts", &[seen.to_kind(Kind::Float), rows], None::<i64>);
            y.softmax(-1, Kind::Float).where_self(&y.gt(0.0), &(&y * 2.0)).flip([1]).to_kind(Kind::Float)
        };
        let shapes = [vec![2, 3, 8, 8], vec![4, 3, 3, 3], vec![8, 4], vec![3, 4]];
        for half in [false, true] {
            as_on_gpu(|| {
                let run = |given: &[Tensor]| {
                    let _precision = Autocast::bfloat16(Device::Cpu, half);
                    let y = network(&given[0], &given[1], &given[2], &given[3]);
                    backward(&y.mean(None));
                    let told = |t: &Tensor| (t.size(), t.stride(), t.kind());
                    [vec![told(&y)], given[1..].iter().map(|t| told(&t.grad())).collect()].concat()
                };
                let asks = |t: Tensor| t.set_requires_grad(true);
                let with: Vec<Tensor> =
                    shapes.iter().map(|shape| asks(Tensor::full(shape, 0.5, (Kind::Float, Device::Cpu)))).collect();
                let without: Vec<Tensor> =
                    shapes.iter().map(|shape| asks(without_memory(shape, Kind::Float))).collect();
                let (wanted, peak) = peak_host_memory(|| run(&with));
                let before = held_by_shapes();
                let ((found, kept), told) = by_shapes(|| {
                    let found = run(&without);
                    clear_gradients(&without).unwrap();
                    (found, held_by_shapes())
                });
                assert_eq!(found, wanted);
                // kernels of the CPU take room for themselves besides
                assert!(told.peak <= peak, "{peak} bytes with memory, {} without", told.peak);
                assert_eq!((before, kept), (0, 0), "all that was made is gone");
                let flops: i64 = told.kernels.iter().map(|kernel| kernel.flops).sum();
                // by hand: convolution there and back to its kernel and input, map, attention, positions
                let [conv, map, attention, positions] = [2 * 32 * 108, 2 * 128 * 32, 2 * 128 * 64 * 8, 2 * 256 * 16];
                assert_eq!(flops, 3 * conv + 3 * map + 7 * attention + 3 * positions);
            });
        }
    }

    /// What is read on the host must be there: it is said which operation wanted it.
    #[test]
    fn values_that_are_not_there_are_not_read() {
        let x = without_memory(&[3], Kind::Float);
        let error = caught(|| {
            by_shapes(|| x.double_value(&[1]));
            Ok(())
        });
        let error = format!("{:#}", error.unwrap_err());
        assert!(error.contains("_local_scalar_dense reads the values of a tensor that has a shape alone"), "{error}");
        // tables are known
        let (sum, _) = by_shapes(|| Tensor::from_slice(&[1.0, 2.0]).sum(Kind::Double).double_value(&[]));
        assert_eq!(sum, 3.0);
    }
}
