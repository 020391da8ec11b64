//! How far long work has come: a bar on a terminal, a plain line now and then elsewhere.

use std::{
    io::{IsTerminal, Write},
    sync::OnceLock,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where stderr is no terminal, a line comes at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(5)))
}

/// Runs `write`, which may write to the terminal, with the bars out of its way.
pub fn beside_bars<T>(write: impl FnOnce() -> T) -> T {
    bars().suspend(write)
}

/// A line on stderr. Where that is gone, as when a terminal was closed, the work goes on without.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// The progress of one piece of work.
pub struct Progress {
    label: String,
    total: u64,
    start: u64,
    done: u64,
    began: Instant,
    shown: Instant,
    bar: Option<ProgressBar>,
    silent: bool,
    /// The work ends after so much time since this start, if not before.
    limit: Option<Duration>,
}

impl Progress {
    /// Work of `total` steps, of which `start` were done before (in a run that goes on); the rate
    /// counts the steps since.
    pub fn new(label: &str, total: u64, start: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} {bar:30} {wide_msg}").expect("the template is right");
            let bar = ProgressBar::new(total).with_style(style).with_prefix(label.to_string()).with_position(start);
            bars().add(bar)
        });
        let now = Instant::now();
        Progress {
            label: label.to_string(),
            total,
            start,
            done: start,
            began: now,
            shown: now,
            bar,
            silent: false,
            limit: None,
        }
    }

    /// The work ends after so much time from now, whether all steps are done or not.
    pub fn within(mut self, limit: Option<Duration>) -> Self {
        self.limit = limit;
        self
    }

    /// Shown or not: of several ranks one speaks.
    pub fn shown(mut self, shown: bool) -> Self {
        if !shown {
            if let Some(bar) = self.bar.take() {
                bar.finish_and_clear();
            }
            self.silent = true;
        }
        self
    }

    /// `n` steps are done now, counted from the very start of the work; `message` says how it stands.
    pub fn step(&mut self, n: u64, message: &str) {
        self.done = n;
        let elapsed = self.began.elapsed();
        let rest = self.limit.map(|limit| limit.saturating_sub(elapsed));
        let standing = || standing(n, self.total, n.saturating_sub(self.start), elapsed, rest, message);
        if let Some(bar) = &self.bar {
            bar.set_message(standing());
            bar.set_position(n);
        } else if !self.silent && self.shown.elapsed() >= LINE_EVERY {
            tell(&format!("{}: {}", self.label, standing()));
            self.shown = Instant::now();
        }
    }

    /// The work is over: one last line stays.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.silent {
            return;
        }
        let spent = clock(self.began.elapsed());
        beside_bars(|| tell(&format!("{}: {}/{} in {spent}", self.label, self.done, self.total)));
    }
}

/// Steps done, rate and time left, by the steps since this start (indicatif's own rate would count
/// those of an earlier one); `rest` is the most that is left in any case.
fn standing(n: u64, total: u64, since_start: u64, elapsed: Duration, rest: Option<Duration>, message: &str) -> String {
    let rate = since_start as f64 / elapsed.as_secs_f64().max(1e-9);
    let mut text = format!("{n}/{total}");
    if since_start > 0 {
        let left = Duration::from_secs_f64((total.saturating_sub(n) as f64 / rate).min(1e9));
        text += &format!("  {}, {} left", per_second(rate), clock(rest.map_or(left, |rest| rest.min(left))));
    }
    if !message.is_empty() {
        text += &format!("  {message}");
    }
    text
}

fn per_second(rate: f64) -> String {
    if rate >= 1.0 { format!("{rate:.1}/s") } else { format!("{:.1} s each", 1.0 / rate) }
}

fn clock(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        seconds => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_counts_from_where_the_run_went_on() {
        let text = standing(60, 100, 10, Duration::from_secs(5), None, "loss 0.5");
        assert_eq!(text, "60/100  2.0/s, 20 s left  loss 0.5");
        let text = standing(60, 100, 10, Duration::from_secs(50), None, "");
        assert_eq!(text, "60/100  5.0 s each, 3 min 20 s left");
        assert_eq!(standing(50, 100, 0, Duration::ZERO, None, ""), "50/100");
    }

    /// Work that ends by the clock has no more time left than the clock says.
    #[test]
    fn the_time_left_is_at_most_the_time_there_is() {
        let left = |rest| standing(60, 100, 10, Duration::from_secs(50), Some(Duration::from_secs(rest)), "");
        assert_eq!(left(30), "60/100  5.0 s each, 30 s left");
        assert_eq!(left(900), "60/100  5.0 s each, 3 min 20 s left");
    }

    #[test]
    fn a_clock_is_short() {
        assert_eq!(clock(Duration::from_secs(59)), "59 s");
        assert_eq!(clock(Duration::from_secs(60)), "1 min 0 s");
        assert_eq!(clock(Duration::from_secs(3 * 3600 + 125)), "3 h 2 min");
    }
}
