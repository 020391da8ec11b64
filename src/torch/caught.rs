//! Panics as errors, with what was said and where.

use std::{
    any::Any,
    backtrace::{Backtrace, BacktraceStatus},
    cell::Cell,
    io::{self, Write},
    panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind, set_hook},
    sync::{Mutex, PoisonError},
    thread::{self, ThreadId},
};

use anyhow::{Result, anyhow};

/// Where panics happened that nobody has asked about yet.
static PLACES: Mutex<Vec<(ThreadId, String)>> = Mutex::new(Vec::new());

thread_local! {
    /// How many calls of [`attempt`] this thread is in.
    static ATTEMPTS: Cell<usize> = const { Cell::new(0) };
}

/// From here on a panic is not printed as it happens: the error that [`caught`] makes of it says where it was. With
/// RUST_BACKTRACE=1 its backtrace is printed too. A panic that ends a thread which does not catch it is told at once,
/// since no error will tell it.
pub fn locate_panics() {
    set_hook(Box::new(|panic| {
        let place = place(panic);
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            let _ = writeln!(io::stderr(), "{}, at {place}:\n{backtrace}", words(panic.payload()));
        }
        let thread = thread::current();
        if ATTEMPTS.get() == 0 {
            let (name, words) = (thread.name().unwrap_or("?"), words(panic.payload()));
            let _ = writeln!(io::stderr(), "warning: thread {name} ended: {words}, at {place}");
        }
        PLACES.lock().unwrap_or_else(PoisonError::into_inner).push((thread.id(), place));
    }));
}

/// The file and line of a panic; where these belong to a library, as of all of LibTorch's errors, those of the call to
/// it.
fn place(panic: &PanicHookInfo) -> String {
    let Some(location) = panic.location() else { return "an unknown place".into() };
    if location.file().starts_with("src/") {
        return format!("{}:{}", location.file(), location.line());
    }
    let frames = Backtrace::force_capture().to_string();
    own_frame(&frames).unwrap_or_else(|| format!("{}:{}", location.file(), location.line()))
}

/// The innermost call out of this crate in the text of a backtrace: its file and line, or, in a program without line
/// tables, its name.
fn own_frame(frames: &str) -> Option<String> {
    let mut lines = frames.lines().map(str::trim).peekable();
    while let Some(line) = lines.next() {
        let Some((_, name)) = line.split_once(": ") else { continue };
        let place = match lines.peek().and_then(|line| line.strip_prefix("at ")) {
            Some(file) => own_file(file).and_then(|file| file.rsplit_once(':')).map(|(place, _column)| place),
            None => Some(name).filter(|name| name.trim_start_matches('<').starts_with("lvdm::")),
        };
        if let Some(place) =
            place.filter(|place| !place.contains("torch/caught.rs") && !place.contains("torch::caught"))
        {
            return Some(place.to_string());
        }
    }
    None
}

/// `src/…` of a file of this crate, whose path stands below the folder it was built in, or below the working folder.
fn own_file(path: &str) -> Option<&str> {
    let path = path.strip_prefix(concat!(env!("CARGO_MANIFEST_DIR"), "/")).or_else(|| path.strip_prefix("./"))?;
    path.starts_with("src/").then_some(path)
}

/// Runs `body`; LibTorch's errors, which arrive as panics whose text goes on with a C++ backtrace, become errors of
/// one line, which says where (see [`locate_panics`]). One of memory says what needs less of it.
///
/// # Errors
/// Those of `body`, and its panics.
pub fn caught<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    attempt(body).unwrap_or_else(|text| {
        if text.contains("out of memory") || text.contains("can't allocate memory") {
            return Err(anyhow!(
                "out of memory: {text}. Lower trainer.batch (and raise trainer.accumulate), set unet.recompute=true, \
                 or trainer.precision=bf16"
            ));
        }
        Err(anyhow!("{text}"))
    })
}

/// Runs `body`; a panic becomes what it said and where it was, in a line.
pub(super) fn attempt<T>(body: impl FnOnce() -> T) -> Result<T, String> {
    ATTEMPTS.set(ATTEMPTS.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(body));
    ATTEMPTS.set(ATTEMPTS.get() - 1);
    result.map_err(|panic| {
        let words = words(panic.as_ref());
        let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
        // a panic that another thread handed over came last
        let own = places.iter().rposition(|(thread, _)| *thread == thread::current().id());
        match own.map(|at| places.remove(at)).or_else(|| places.pop()) {
            Some((_, place)) => format!("{words}, at {place}"),
            None => words.to_string(),
        }
    })
}

/// What a panic said: without what Rust says of an `unwrap`, and without the C++ backtrace behind it.
fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("a failure without a text");
    let text = text.strip_prefix("called `Result::unwrap()` on an `Err` value: ").unwrap_or(text);
    let text = text.strip_prefix("Torch(\"").unwrap_or(text);
    text.split("\\n").next().unwrap_or(text).lines().next().unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a backtrace the innermost call from this crate is the place.
    #[test]
    fn a_place_is_the_innermost_call_out_of_this_crate() {
        let inside = "   3: place\n             at ./src/torch/caught.rs:46:9\n\
                         4: core::result::unwrap_failed\n             at /rustc/abc/library/core/src/result.rs:1:5\n\
                         5: tch::wrappers::tensor_generated::<impl tch::Tensor>::matmul\n";
        // of an inlined call the name alone is known
        let with_lines = format!("{inside}   6: forward\n             at ./src/nn/linear.rs:33:12\n");
        assert_eq!(own_frame(&with_lines).unwrap(), "src/nn/linear.rs:33");
        let elsewhere = with_lines.replace("at ./src", concat!("at ", env!("CARGO_MANIFEST_DIR"), "/src"));
        assert_eq!(own_frame(&elsewhere).unwrap(), "src/nn/linear.rs:33");
        let without = format!("{inside}   6: <lvdm::nn::Linear as X>::forward\n   7: lvdm::main\n");
        assert_eq!(own_frame(&without).unwrap(), "<lvdm::nn::Linear as X>::forward");
        assert_eq!(own_frame(inside), None);
    }

    #[test]
    fn a_panic_is_an_error_of_one_line() {
        let said = |panic: fn() -> tch::Tensor| caught(|| Ok(panic())).unwrap_err().to_string();
        assert!(said(|| panic!("a word\nand a backtrace")).starts_with("a word"));
        let of_libtorch = said(|| tch::Tensor::from_slice(&[1, 2]).reshape([3]));
        assert!(of_libtorch.starts_with("shape '[3]' is invalid"), "{of_libtorch}");
        let memory = said(|| panic!("CUDA out of memory. Tried to allocate"));
        assert!(memory.contains("trainer.batch"), "{memory}");
    }
}
