//! How far long work has come: a bar on a terminal, a plain line now and then elsewhere.

use std::{
    io::{self, IsTerminal, Write},
    sync::OnceLock,
    time::{Duration, Instant},
};

use console::Term;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

/// Where stderr is no terminal, a line comes at most this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The bars of this process; none where stderr is no terminal.
fn bars() -> Option<&'static MultiProgress> {
    static BARS: OnceLock<Option<MultiProgress>> = OnceLock::new();
    let new = || {
        let target = || ProgressDrawTarget::term_like_with_hz(Box::new(Terminal(Term::stderr())), 5);
        io::stderr().is_terminal().then(|| MultiProgress::with_draw_target(target()))
    };
    BARS.get_or_init(new).as_ref()
}

/// stderr as a terminal that may go away, as one that is closed does: what cannot be drawn any more ends nothing.
#[derive(Debug)]
struct Terminal(Term);

/// That something was drawn, whether it was or not.
fn drawn(_: io::Result<()>) -> io::Result<()> {
    Ok(())
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        self.0.size().1
    }

    fn height(&self) -> u16 {
        self.0.size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        drawn(self.0.move_cursor_up(n))
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        drawn(self.0.move_cursor_down(n))
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        drawn(self.0.move_cursor_right(n))
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        drawn(self.0.move_cursor_left(n))
    }

    fn write_line(&self, line: &str) -> io::Result<()> {
        drawn(self.0.write_line(line))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        drawn(self.0.write_str(text))
    }

    fn clear_line(&self) -> io::Result<()> {
        drawn(self.0.clear_line())
    }

    fn flush(&self) -> io::Result<()> {
        drawn(self.0.flush())
    }
}

/// Writes to stderr, with the bars out of the way. Where stderr is gone, as when a terminal was closed or its reader
/// has ended, or on a full disk, the work goes on without.
pub fn tell(text: &[u8]) {
    let write = || {
        let _ = io::stderr().write_all(text);
    };
    match bars() {
        Some(bars) => bars.suspend(write),
        None => write(),
    }
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
        let bar = bars().map(|bars| {
            let style = ProgressStyle::with_template("{prefix} {bar:30} {wide_msg}").expect("the template is right");
            let bar = ProgressBar::new(total).with_style(style).with_prefix(label.to_string()).with_position(start);
            bars.add(bar)
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
            tell(format!("{}: {}\n", self.label, standing()).as_bytes());
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
        tell(format!("{}: {}/{} in {spent}\n", self.label, self.done, self.total).as_bytes());
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
    use std::fs::File;

    use super::*;

    #[test]
    fn the_rate_counts_from_where_the_run_went_on() {
        let text = standing(60, 100, 10, Duration::from_secs(5), None, "loss 0.5");
        assert_eq!(text, "60/100  2.0/s, 20 s left  loss 0.5");
        let text = standing(60, 100, 10, Duration::from_secs(50), None, "");
        assert_eq!(text, "60/100  5.0 s each, 3 min 20 s left");
        assert_eq!(standing(50, 100, 0, Duration::ZERO, None, ""), "50/100");
    }

    /// What is drawn when a terminal is closed goes nowhere; indicatif by itself panics where a bar gives way to a line.
    #[test]
    fn a_terminal_that_is_gone_ends_nothing() {
        let gone = || File::options().read(true).write(true).open("/dev/full").unwrap();
        let terminal = || Term::read_write_pair(gone(), gone());
        assert!(terminal().write_line("").is_err());
        let target = ProgressDrawTarget::term_like_with_hz(Box::new(Terminal(terminal())), 5);
        let bars = MultiProgress::with_draw_target(target);
        let bar = bars.add(ProgressBar::new(9));
        for position in 0..3 {
            bar.set_position(position);
            bar.tick();
            bars.suspend(|| {});
        }
        bar.finish_and_clear();
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
