//! One verb, one file. A verb parses its arguments, calls the library, and prints.
//!
//! # Floors
//! A file imports from lower floors only; `tests/architecture` reads this list and holds the code to it.
//!
//! ```text
//! config                                               the keys of all files, those of `demo` too
//! demo                                                 the whole job, out of other verbs
//! encode                                               takes the clips of `data`
//! data | evaluate | evaluate_long | sample_long        take options of `sample`
//! export | import | report | sample | train            from files to files
//! bench | doctor | plan | verify | weights             of this machine and this build
//! out | say                                            files that verbs write; what they print
//! ```

#[macro_use]
mod say;

mod bench;
mod config;
mod data;
mod demo;
mod doctor;
mod encode;
mod evaluate;
mod evaluate_long;
mod export;
mod import;
mod out;
mod plan;
mod report;
mod sample;
mod sample_long;
mod train;
mod verify;
mod weights;

pub use bench::Bench;
pub use config::Config;
pub use data::Data;
pub use demo::{Demo, DemoData};
pub use doctor::Doctor;
pub use encode::Encode;
pub use evaluate::Evaluate;
pub use evaluate_long::EvaluateLong;
pub use export::Export;
pub use import::Import;
pub use plan::PlanTraining;
pub use report::Report;
pub use sample::Sample;
pub use sample_long::SampleLong;
pub use say::all_was_said;
pub use train::Train;
pub use verify::Verify;
pub use weights::Weights;

use std::{
    fmt,
    io::Write,
    path::{Path, PathBuf},
};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    fmt::{
        FmtContext, MakeWriter,
        format::{FormatEvent, FormatFields, Writer},
    },
    registry::LookupSpan,
};

use crate::{distributed::rank, exchange::Part, report::with_commas, train::progress::tell};

/// The file of a verb that needs none, and what is replaced in it: without a file the first override stands in its
/// place.
fn file_or_override(file: Option<PathBuf>, mut overrides: Vec<String>) -> (Option<PathBuf>, Vec<String>) {
    match file.as_ref().and_then(|file| file.to_str()) {
        Some(text) if text.contains('=') && !Path::new(text).exists() => {
            overrides.insert(0, text.to_string());
            (None, overrides)
        }
        _ => (file, overrides),
    }
}

/// One row a network of a checkpoint.
fn parts_table(parts: &[Part]) -> String {
    let row = |name: &str, tensors: &str, parameters: &str| format!("{name:22} {tensors:>8} {parameters:>14}\n");
    let mut table = row("part", "tensors", "parameters");
    for part in parts {
        table += &row(part.name, &part.tensors.to_string(), &with_commas(part.parameters));
    }
    table
}

/// `1 video`, `2 videos`
fn counted(count: u64, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Sends warnings, errors and notes (`tracing::info!`) to stderr, one short line each, above any
/// progress bar. Of several ranks each gives its name, and those other than the first no notes. A second
/// call does nothing.
pub fn init_tracing() {
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(if rank().is_none_or(|rank| rank == 0) { Level::INFO } else { Level::WARN })
        .with_ansi(false)
        .event_format(ShortLine(rank()))
        .with_writer(AboveBars)
        .finish();
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// `warning: what happened`, of one of several ranks `warning: rank 1: what happened`; a note stands without a word
/// before it.
struct ShortLine(Option<usize>);

impl<S, N> FormatEvent<S, N> for ShortLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        match *event.metadata().level() {
            Level::ERROR => writer.write_str("error: ")?,
            Level::WARN => writer.write_str("warning: ")?,
            _ => {}
        }
        if let Some(rank) = self.0 {
            write!(writer, "rank {rank}: ")?;
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

struct AboveBars;

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        tell(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for AboveBars {
    type Writer = AboveBars;

    fn make_writer(&self) -> AboveBars {
        AboveBars
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_stands_first_is_a_file_or_an_override() {
        let of = |file: &str| file_or_override(Some(file.into()), vec!["b=2".into()]);
        assert_eq!(of("unet=null"), (None, vec!["unet=null".into(), "b=2".into()]));
        assert_eq!(of("clip.yaml"), (Some("clip.yaml".into()), vec!["b=2".into()]));
        let file = tempfile::Builder::new().prefix("a=1").tempfile().unwrap();
        assert_eq!(file_or_override(Some(file.path().into()), vec![]), (Some(file.path().into()), vec![]));
    }

    #[test]
    fn one_is_singular() {
        assert_eq!([0, 1, 2].map(|count| counted(count, "video")), ["0 videos", "1 video", "2 videos"]);
    }

    #[test]
    fn a_warning_is_one_short_line() {
        let said = |rank| {
            let kept = Kept::default();
            let writer = kept.clone();
            let subscriber = tracing_subscriber::fmt()
                .with_ansi(false)
                .event_format(ShortLine(rank))
                .with_writer(move || writer.clone())
                .finish();
            tracing::subscriber::with_default(subscriber, || {
                tracing::warn!("skipped {}", "a.mp4");
                tracing::info!(clips = 3, "read");
            });
            String::from_utf8(kept.0.lock().unwrap().clone()).unwrap()
        };
        assert_eq!(said(None), "warning: skipped a.mp4\nread clips=3\n");
        assert_eq!(said(Some(1)), "warning: rank 1: skipped a.mp4\nrank 1: read clips=3\n");
    }
}
