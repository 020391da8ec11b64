//! Activations that are computed again in the backward pass instead of being kept.

use std::{
    cell::RefCell,
    ffi::{CString, c_char, c_void},
};

use tch::Tensor;

use super::{by_shapes, caught::attempt, check, held_by_shapes, pointers};

type Body = Box<dyn Fn(&[Tensor]) -> Tensor + Send>;

unsafe extern "C" {
    fn strdup(text: *const c_char) -> *mut c_char;
    fn lvdm_recompute(
        data: *mut c_void,
        call: unsafe extern "C" fn(*mut c_void, *const *mut c_void, i64, *mut *mut c_char) -> *mut c_void,
        drop: unsafe extern "C" fn(*mut c_void),
        inputs: *const *mut c_void,
        count: i64,
        output: *mut *mut c_void,
    ) -> *mut c_char;
}

unsafe extern "C" fn call(
    data: *mut c_void,
    inputs: *const *mut c_void,
    count: i64,
    said: *mut *mut c_char,
) -> *mut c_void {
    // SAFETY: `data` is the boxed body; `inputs` are `count` tensors handed over to us.
    let (body, inputs) = unsafe {
        let inputs: Vec<Tensor> =
            std::slice::from_raw_parts(inputs, count as usize).iter().map(|&p| Tensor::from_ptr(p.cast())).collect();
        (&*data.cast::<Body>(), inputs)
    };
    match attempt(|| body(&inputs)) {
        Ok(output) => {
            let pointer = output.as_ptr().cast_mut().cast();
            std::mem::forget(output); // C++ owns it now
            pointer
        }
        Err(text) => {
            let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
            // SAFETY: `said` is C++'s own; it frees the copy.
            unsafe { *said = strdup(text.as_ptr()) };
            std::ptr::null_mut()
        }
    }
}

unsafe extern "C" fn drop_body(data: *mut c_void) {
    // SAFETY: made by `Box::into_raw` below; C++ calls this once.
    drop(unsafe { Box::from_raw(data.cast::<Body>()) });
}

/// What a forward pass leaves in memory for its backward pass, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// All of it, were nothing computed again.
    pub whole: i64,
    /// What stays where the bodies of [`recompute`] are computed again.
    pub stays: i64,
    /// For each of these bodies, in their order, what it keeps while it runs once more; one at a time.
    pub recomputed: Vec<i64>,
}

thread_local! {
    /// While a forward pass is counted: of each body of [`recompute`] what it keeps, and how large its output is.
    static COUNTED: RefCell<Option<Vec<[i64; 2]>>> = const { RefCell::new(None) };
}

/// What the forward pass `body` keeps of tensors [`without_memory`](super::without_memory) for a backward pass, which is not run.
///
/// # Panics
/// Where `body` does.
pub fn kept_for_backward(body: impl FnOnce() -> Tensor) -> Kept {
    let before = COUNTED.replace(Some(Vec::new()));
    let ((_output, whole), _) = by_shapes(|| {
        let output = body();
        (output, held_by_shapes())
    });
    let counted = COUNTED.replace(before).unwrap_or_default();
    // what goes in stays, and so does what comes out, which is what goes into the next
    let inside: i64 = counted.iter().map(|[kept, output]| kept - output).sum();
    Kept { whole, stays: whole - inside, recomputed: counted.into_iter().map(|[kept, _]| kept).collect() }
}

/// Runs the body as its second run will, and notes what that keeps.
fn count(inputs: &[&Tensor], body: impl Fn(&[Tensor]) -> Tensor) -> Tensor {
    let before = held_by_shapes();
    let output = body(&inputs.iter().map(|input| input.shallow_clone()).collect::<Vec<_>>());
    let bytes = [held_by_shapes() - before, (output.numel() * output.kind().elt_size_in_bytes()) as i64];
    COUNTED.with_borrow_mut(|counted| counted.as_mut().expect("counting").push(bytes));
    output
}

/// `body(inputs)`, keeping only the inputs: `body` runs once more in the backward pass, where the
/// gradients of the parameters it uses are accumulated. It must be a pure function of its inputs.
///
/// On a GPU the second run happens on LibTorch's backward thread while this one waits, and `body` ends there: so it is
/// `Send`. A counter that is not made for several threads is refused:
///
/// ```compile_fail
/// let counted = std::rc::Rc::new(2.0);
/// let x = tch::Tensor::from(1.0f32);
/// lvdm::torch::recompute(&[&x], move |inputs| &inputs[0] * *counted);
/// ```
///
/// and one that is, is not:
///
/// ```no_run
/// let counted = std::sync::Arc::new(2.0);
/// let x = tch::Tensor::from(1.0f32);
/// lvdm::torch::recompute(&[&x], move |inputs| &inputs[0] * *counted);
/// ```
///
/// # Panics
/// Where `body` panics or LibTorch refuses an operation, as ordinary `tch` calls do.
pub fn recompute(inputs: &[&Tensor], body: impl Fn(&[Tensor]) -> Tensor + Send + 'static) -> Tensor {
    if COUNTED.with_borrow(Option::is_some) {
        return count(inputs, body);
    }
    let body: Body = Box::new(body);
    let data: *mut Body = Box::into_raw(Box::new(body));
    let inputs: Vec<Tensor> = inputs.iter().map(|t| t.shallow_clone()).collect();
    let mut output = std::ptr::null_mut();
    // SAFETY: C++ takes over `data` and calls `drop_body` at its end; `output` is ours where there is no error.
    unsafe {
        let error =
            lvdm_recompute(data.cast(), call, drop_body, pointers(&inputs).as_ptr(), inputs.len() as i64, &mut output);
        check(error).unwrap_or_else(|error| panic!("{error}"));
        Tensor::from_ptr(output.cast())
    }
}
