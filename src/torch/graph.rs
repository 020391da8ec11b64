//! CUDA graphs: what a function queues on a GPU is recorded once and then launched as one.

use std::{
    cell::{Cell, RefCell},
    env,
    ffi::{CString, c_char, c_int, c_void},
    sync::OnceLock,
};

use anyhow::{Context, Result, anyhow, bail};
use libloading::os::unix::{Library, RTLD_NOW};
use tch::{Device, Kind, Tensor};

use super::{
    Autocast, Tf32,
    backend::GpuPart,
    caught::attempt,
    check,
    fixed_weights::{FixedWeights, weights_are_fixed},
    load_cuda,
};

unsafe extern "C" {
    fn strdup(text: *const c_char) -> *mut c_char;
}

type Body<'a> = &'a mut dyn FnMut();

/// The functions of `graph.cpp`.
struct Functions {
    capture: unsafe extern "C" fn(
        c_int,
        *mut c_void,
        unsafe extern "C" fn(*mut c_void) -> *mut c_char,
        *mut *mut c_void,
    ) -> *mut c_char,
    replay: unsafe extern "C" fn(*mut c_void) -> *mut c_char,
    free: unsafe extern "C" fn(*mut c_void),
}

fn functions() -> Result<&'static Functions> {
    static OPENED: OnceLock<Result<Functions, String>> = OnceLock::new();
    let open = || -> Result<Functions> {
        if let Err(error) = load_cuda() {
            bail!("CUDA graphs need LibTorch with CUDA: {error}");
        }
        let path = GpuPart::GRAPHS.locate()?;
        // SAFETY: the library is graph.cpp, built with this program; its functions have these signatures.
        unsafe {
            let library = Library::open(Some(&path), RTLD_NOW)
                .map_err(|error| anyhow!("cannot load {}: {error}", path.display()))?;
            let functions = Functions {
                capture: *library.get(b"lvdm_graph_capture")?,
                replay: *library.get(b"lvdm_graph_replay")?,
                free: *library.get(b"lvdm_graph_free")?,
            };
            std::mem::forget(library); // for as long as the program runs
            Ok(functions)
        }
    };
    OPENED.get_or_init(|| open().map_err(|error| format!("{error:#}"))).as_ref().map_err(|error| anyhow!("{error}"))
}

struct Graph {
    graph: *mut c_void,
    functions: &'static Functions,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: ours, freed once.
        unsafe { (self.functions.free)(self.graph) }
    }
}

unsafe extern "C" fn call(data: *mut c_void) -> *mut c_char {
    // SAFETY: `data` is the body that `Graph::record` lends.
    let body = unsafe { &mut *data.cast::<Body>() };
    match attempt(body) {
        Ok(()) => std::ptr::null_mut(),
        Err(text) => {
            let text = CString::new(text.replace('\0', " ")).unwrap_or_default();
            // SAFETY: a string; C++ frees the copy.
            unsafe { strdup(text.as_ptr()) }
        }
    }
}

thread_local! {
    static IS_RECORDING: Cell<bool> = const { Cell::new(false) };
}

/// This thread records a graph, as long as it lives.
struct Recording;

impl Recording {
    fn begin() -> Self {
        IS_RECORDING.set(true);
        Recording
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        IS_RECORDING.set(false);
    }
}

/// Whether this thread records a graph. Then nothing may come from the host: a graph would bring up the same again at each
/// launch.
pub(super) fn is_recording() -> bool {
    IS_RECORDING.get()
}

impl Graph {
    fn record(device: usize, body: &mut dyn FnMut()) -> Result<Self> {
        let functions = functions()?;
        let (mut body, mut graph): (Body, _) = (body, std::ptr::null_mut());
        let _recording = Recording::begin();
        // SAFETY: `body` outlives the call; `graph` receives an owned pointer where there is no error.
        check(unsafe { (functions.capture)(device as c_int, (&raw mut body).cast(), call, &mut graph) })
            .context("recording a CUDA graph")?;
        Ok(Graph { graph, functions })
    }

    fn replay(&self) -> Result<()> {
        // SAFETY: a live graph.
        check(unsafe { (self.functions.replay)(self.graph) })
    }
}

/// A function's calls with inputs of one form.
struct Recorded {
    function_id: usize,
    form: Form,
    state: State,
}

/// What a graph was recorded for: shapes and types of the inputs, and how exactly products were computed.
#[derive(Debug, PartialEq)]
struct Form {
    inputs: Vec<(Vec<i64>, Kind)>,
    mixed: bool,
    tf32: bool,
}

impl Form {
    fn of(inputs: &[&Tensor], device: Device) -> Self {
        let inputs = inputs.iter().map(|t| (t.size(), t.kind())).collect();
        Form { inputs, mixed: Autocast::is_on(device), tf32: Tf32::is_on() }
    }
}

enum State {
    /// Called once, as an ordinary function.
    Called,
    /// Where the inputs and the output lie. The output goes before the memory it lies in.
    Graph(Vec<Tensor>, Tensor, Graph),
    /// It could not be recorded.
    Refused,
}

thread_local! {
    static RECORDED: RefCell<Vec<Recorded>> = const { RefCell::new(Vec::new()) };
}

/// Graphs read weights at the addresses that they had during the capture, and so end with the [`FixedWeights`].
fn forget_graphs() {
    RECORDED.with_borrow_mut(Vec::clear);
}

/// Whether calls are recorded: where the part for CUDA graphs was built and opens, unless LVDM_CUDA_GRAPHS=0. With
/// LVDM_CUDA_GRAPHS=1 they are asked for, and it is told where there are none.
///
/// # Panics
/// Where the variable is neither 1 nor 0.
pub fn cuda_graphs() -> bool {
    static ASKED: OnceLock<bool> = OnceLock::new();
    *ASKED.get_or_init(|| match env::var("LVDM_CUDA_GRAPHS").as_deref() {
        Ok("1") => true,
        Ok("0") => false,
        Ok("") | Err(_) => functions().is_ok(),
        Ok(other) => panic!("LVDM_CUDA_GRAPHS is 1 or 0, not {other}"),
    })
}

/// `body(inputs)`. On a GPU with CUDA graphs ([`cuda_graphs`]) and while weights are fixed ([`FixedWeights`]), the second call with
/// inputs of the same shapes and types is captured, and from then on launched as a whole. The first call is an ordinary one, so
/// that whatever is prepared once is there when the graph is captured. Where it cannot be captured, a warning says why, and
/// all calls are ordinary ones.
///
/// `function_id` tells functions apart. The address of the network that `body` computes with can serve, as long as that
/// network is not dropped before the [`FixedWeights`] ends, which forgets all graphs.
///
/// # Panics
/// Where `body` does or LibTorch refuses, as ordinary `tch` calls do.
pub fn replayed(function_id: usize, inputs: &[&Tensor], body: impl Fn(&[Tensor]) -> Tensor) -> Tensor {
    let shared = || inputs.iter().map(|t| t.shallow_clone()).collect::<Vec<_>>();
    let Device::Cuda(device) = inputs[0].device() else { return body(&shared()) };
    if !cuda_graphs() || !weights_are_fixed() {
        return body(&shared());
    }
    let form = Form::of(inputs, inputs[0].device());
    RECORDED.with_borrow_mut(|recorded| {
        let Some(known) = recorded.iter_mut().find(|known| known.function_id == function_id && known.form == form)
        else {
            if recorded.is_empty() {
                FixedWeights::at_end(forget_graphs);
            }
            recorded.push(Recorded { function_id, form, state: State::Called });
            return body(&shared());
        };
        if matches!(known.state, State::Called) {
            let places: Vec<Tensor> = inputs.iter().map(|t| t.copy()).collect();
            let mut output = None;
            let graph = Graph::record(device, &mut || output = Some(body(&places)));
            known.state = match graph.and_then(|graph| Ok((output.context("nothing was recorded")?, graph))) {
                Ok((output, graph)) => State::Graph(places, output, graph),
                Err(error) => {
                    tracing::warn!("a CUDA graph could not be recorded, and calls are made one by one: {error:#}");
                    State::Refused
                }
            };
        }
        let State::Graph(places, output, graph) = &mut known.state else { return body(&shared()) };
        for (place, input) in places.iter_mut().zip(inputs) {
            place.copy_(input);
        }
        graph.replay().unwrap_or_else(|error| panic!("{error:#}"));
        output.copy()
    })
}

/// The tensors of a step that are others in every step.
pub trait StepInputs {
    /// In an order that is the same for all steps of one form.
    fn tensors(&mut self) -> Vec<&mut Tensor>;
}

/// The steps of a training on a GPU, each form of their inputs recorded once and then launched as a whole.
#[derive(Default)]
pub struct StepGraphs {
    known: Vec<KnownStep>,
}

struct KnownStep {
    form: (i64, Form),
    state: StepState,
}

enum StepState {
    /// Made so many times as an ordinary step.
    Made(usize),
    /// As [`State::Graph`].
    Graph(Vec<Tensor>, Tensor, Graph),
    Refused,
}

impl StepGraphs {
    /// Ordinary steps before one is recorded: they choose kernels and prepare what is prepared once.
    const ORDINARY: usize = 2;

    /// `body(inputs)`, which gives a tensor of numbers. On a GPU with CUDA graphs ([`cuda_graphs`]) the third step of one `form` with
    /// inputs of the same shapes and types is captured, and from then on they are copied to where they lay then, and the step is
    /// launched as a whole. Whatever else `body` reads, it must find in the same tensors at every step. Where it cannot be captured, a
    /// warning says why, and all steps are ordinary ones.
    ///
    /// # Errors
    /// Those of `body`.
    pub fn run<I: StepInputs>(
        &mut self,
        form: i64,
        inputs: &mut I,
        body: &mut dyn FnMut(&I) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let mut tensors = inputs.tensors();
        let Some(Device::Cuda(device)) = tensors.first().map(|t| t.device()).filter(|_| cuda_graphs()) else {
            return body(inputs);
        };
        let shown: Vec<&Tensor> = tensors.iter().map(|t| &**t).collect();
        let form = (form, Form::of(&shown, Device::Cuda(device)));
        let place = match self.known.iter().position(|known| known.form == form) {
            Some(place) => place,
            None => {
                self.known.push(KnownStep { form, state: StepState::Made(0) });
                self.known.len() - 1
            }
        };
        let state = &mut self.known[place].state;
        if let StepState::Graph(places, output, graph) = state {
            for (place, input) in places.iter_mut().zip(&tensors) {
                place.copy_(input);
            }
            graph.replay()?;
            return Ok(output.copy());
        }
        if !matches!(state, StepState::Made(Self::ORDINARY)) {
            if let StepState::Made(times) = state {
                *times += 1;
            }
            return body(inputs);
        }
        let places: Vec<Tensor> = tensors.iter().map(|t| t.copy()).collect();
        for (tensor, place) in tensors.iter_mut().zip(&places) {
            **tensor = place.shallow_clone();
        }
        let mut output = None;
        let recorded = Graph::record(device, &mut || match body(inputs) {
            Ok(values) => output = Some(values),
            Err(error) => panic!("{error:#}"),
        });
        match recorded.and_then(|graph| Ok((output.context("nothing was recorded")?, graph))) {
            Ok((output, graph)) => {
                graph.replay()?;
                let values = output.copy();
                *state = StepState::Graph(places, output, graph);
                Ok(values)
            }
            Err(error) => {
                tracing::warn!(
                    "the step of the training could not be recorded as a CUDA graph, and its kernels are started one by one: {error:#}"
                );
                *state = StepState::Refused;
                body(inputs)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A graph of bf16 kernels is not launched for a float32 call.
    #[test]
    fn a_graph_is_known_by_the_precision_too() {
        let x = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
        let form = || Form::of(&[&x], Device::Cpu);
        let exact = form();
        {
            let _mixed = Autocast::bfloat16(Device::Cpu, true);
            assert_ne!(form(), exact);
        }
        assert_eq!(form(), exact);
        assert_ne!(Form { tf32: !Tf32::is_on(), ..form() }, exact);
        assert_ne!(Form::of(&[&x.to_kind(Kind::Double)], Device::Cpu), exact);
    }
}
