use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use anyhow::{Result, anyhow};

/// Runs `body`; LibTorch's errors, which arrive as panics whose text goes on with a C++ backtrace, become errors of
/// one line. One of memory says what needs less of it.
///
/// # Errors
/// Those of `body`, and its panics.
pub fn caught<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = words(panic.as_ref());
        if text.contains("out of memory") || text.contains("can't allocate memory") {
            return Err(anyhow!(
                "out of memory: {text}. Lower trainer.batch (and raise trainer.accumulate), set unet.recompute=true, \
                 or trainer.precision=bf16"
            ));
        }
        Err(anyhow!("{text}"))
    })
}

/// What a panic said, without the C++ backtrace behind it.
pub(super) fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let text = text.unwrap_or("a failure without a text");
    text.split("\\n").next().unwrap_or(text).lines().next().unwrap_or(text)
}
