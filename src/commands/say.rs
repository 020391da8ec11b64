//! What a command prints on stdout.

use std::{
    fmt,
    io::{self, Write},
    sync::{Mutex, PoisonError},
};

use anyhow::{Result, anyhow};

use crate::text_file::printable;

/// Why something could not be printed.
static FAILURE: Mutex<Option<io::Error>> = Mutex::new(None);

/// As `println!`, except that what cannot be printed ends no work: [`all_was_said`] tells of it at the end.
macro_rules! say {
    () => { $crate::commands::say::text(format_args!("\n")) };
    ($format:literal $($values:tt)*) => { $crate::commands::say::text(format_args!("{}\n", format_args!($format $($values)*))) };
}

/// As `print!`, in the same way. After a failure nothing more is printed.
pub fn text(text: impl fmt::Display) {
    let mut failure = FAILURE.lock().unwrap_or_else(PoisonError::into_inner);
    if failure.is_none() {
        *failure = io::stdout().write_all(shown(&text.to_string()).as_bytes()).err();
    }
}

/// Control characters, which names of files may hold, are shown by their code; what we print has line breaks and tabs alone.
fn shown(text: &str) -> String {
    let lines: Vec<String> = text.split('\n').map(printable).collect();
    lines.join("\n")
}

/// Whether all that was printed has come to its reader, or to one who wanted no more, as `head` does.
///
/// # Errors
/// Why not, as on a full disk.
pub fn all_was_said() -> Result<()> {
    match &*FAILURE.lock().unwrap_or_else(PoisonError::into_inner) {
        Some(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(anyhow!("cannot write to stdout: {error}")),
        _ => Ok(()),
    }
}
