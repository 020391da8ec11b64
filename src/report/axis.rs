//! Axes: what a value's pixel is, and which values are written along.

use anyhow::{Result, ensure};

use super::series::{Series, is_finite};

/// How y grows along its axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Contains 0, so that heights can be compared.
    Linear,
    /// Equal factors are equally far apart; what is not positive leaves a gap.
    Logarithmic,
}

impl Scale {
    /// Where half of all values would lie in the lowest tenth of an axis from 0, none of them 0 or below: logarithmic.
    pub fn of(series: &[Series]) -> Self {
        let mut values: Vec<f64> =
            series.iter().flat_map(|s| &s.points).filter(|p| is_finite(p)).map(|(_, y)| *y).collect();
        values.sort_by(f64::total_cmp);
        match (values.first(), values.get(values.len() / 2), values.last()) {
            (Some(&least), Some(median), Some(most)) if least > 0.0 && median * 10.0 < *most => Scale::Logarithmic,
            _ => Scale::Linear,
        }
    }

    /// Whether a y has a place on the axis.
    pub(super) fn has(self, y: f64) -> bool {
        y.is_finite() && (self == Scale::Linear || y > 0.0)
    }
}

/// The values between two pixels.
pub(super) struct Axis {
    pub(super) low: f64,
    high: f64,
    /// Round values with what is written at them.
    pub(super) ticks: Vec<(f64, String)>,
    scale: Scale,
    /// Pixels of `low` and `high`.
    pub(super) from: f64,
    pub(super) to: f64,
}

impl Axis {
    /// An axis a little longer than from `low` to `high`, with about `count` ticks.
    pub(super) fn new(low: f64, high: f64, count: f64) -> Result<Self> {
        let span = high - low;
        let size = low.abs().max(high.abs());
        ensure!(size < 1e300, "the values {low:e} and {high:e} do not fit on one axis");
        // A single value, as far as numbers can tell: it stands in the middle.
        if span <= 1e-12 * size || span < 1e-300 {
            let room = size.max(1.0);
            let ticks = vec![(low, signed(low.to_string()))];
            return Ok(Self { low: low - room, high: low + room, ticks, scale: Scale::Linear, from: 0.0, to: 1.0 });
        }
        let (low, high) = (low - 0.02 * span, high + 0.02 * span);
        Ok(Self { low, high, ticks: ticks(low, high, count), scale: Scale::Linear, from: 0.0, to: 1.0 })
    }

    /// A logarithmic axis a little longer than from `low` to `high`, both positive.
    pub(super) fn logarithmic(low: f64, high: f64) -> Self {
        let room = (high / low).powf(0.03).max(1.1);
        let (low, high) = ((low / room).max(f64::MIN_POSITIVE), (high * room).min(f64::MAX));
        Self { low, high, ticks: powers(low, high), scale: Scale::Logarithmic, from: 0.0, to: 1.0 }
    }

    pub(super) fn place(&mut self, from: f64, to: f64) {
        (self.from, self.to) = (from, to);
    }

    /// The pixel of a value.
    pub(super) fn at(&self, value: f64) -> f64 {
        let part = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Logarithmic => (value.ln() - self.low.ln()) / (self.high.ln() - self.low.ln()),
        };
        self.from + part * (self.to - self.from)
    }
}

/// About `count` values from `low` to `high`, one, two or five times a power of ten apart, as numbers and in
/// writing.
fn ticks(low: f64, high: f64, count: f64) -> Vec<(f64, String)> {
    let rough = (high - low) / count;
    let power = rough.log10().floor() as i32;
    let (digit, power) = match rough / 10f64.powi(power) {
        r if r < 1.5 => (1, power),
        r if r < 3.5 => (2, power),
        r if r < 7.5 => (5, power),
        _ => (1, power + 1),
    };
    // By way of the decimal writing, so that 3 · 0.1 is 0.3.
    let round = |k: i64| format!("{}e{power}", k * digit).parse::<f64>().expect("a number");
    let step = round(1);
    let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
    (first..=last).map(|k| (round(k), written(round(k), power))).collect()
}

/// Powers of ten from `low` to `high`, with their doubles and fives where there are few, as numbers and in writing.
fn powers(low: f64, high: f64) -> Vec<(f64, String)> {
    let (first, last) = (low.log10().floor() as i32, high.log10().ceil() as i32);
    let every = ((last - first) / 6).max(1) as usize;
    let digits: &[i32] = if high / low < 200.0 { &[1, 2, 5] } else { &[1] };
    let all = (first..=last).step_by(every).flat_map(|power| digits.iter().map(move |digit| (power, *digit)));
    let number = |(power, digit): (i32, i32)| (format!("{digit}e{power}").parse().expect("a number"), power);
    let found = all.map(number).filter(|(value, _): &(f64, i32)| (low..=high).contains(value));
    found.map(|(value, power)| (value, written(value, power))).collect()
}

/// A multiple of a power of ten.
fn written(value: f64, power: i32) -> String {
    signed(match power {
        -5..=6 => format!("{value:.*}", 0.max(-power) as usize),
        _ if value == 0.0 => "0".to_string(),
        _ => format!("{value:e}"),
    })
}

/// With the minus that is as wide as a digit.
fn signed(number: String) -> String {
    number.replace('-', "−")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        let written = |low, high, count| ticks(low, high, count).into_iter().map(|t| t.1).collect::<Vec<_>>().join(" ");
        assert_eq!(written(-20.0, 1028.0, 10.0), "0 100 200 300 400 500 600 700 800 900 1000");
        assert_eq!(written(0.0, 3.3, 8.0), "0.0 0.5 1.0 1.5 2.0 2.5 3.0");
        assert_eq!(written(-0.021, 0.1, 8.0), "−0.02 0.00 0.02 0.04 0.06 0.08 0.10");
        assert_eq!(written(0.0, 7e-7, 8.0), "0 1e−7 2e−7 3e−7 4e−7 5e−7 6e−7 7e−7");
        assert_eq!(written(0.0, 2.5e9, 5.0), "0 5e8 1e9 1.5e9 2e9 2.5e9");
        assert_eq!(ticks(0.0, 0.9, 9.0)[3].0, 0.3);
    }
}
