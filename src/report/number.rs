//! Numbers as people read them.

/// So many digits behind the point.
pub(super) fn fixed(value: f64, digits: usize) -> String {
    format!("{value:.digits$}").replace('-', "−")
}

/// Four digits that matter.
pub(super) fn number(value: f64) -> String {
    let size = value.abs();
    let text = match size {
        _ if !value.is_finite() || size == 0.0 => value.to_string(),
        1000.0.. => format!("{value:.0}"),
        1e-4.. => format!("{value:.*}", (3 - size.log10().floor() as i32).max(0) as usize),
        _ => format!("{value:.2e}"),
    };
    text.replace('-', "−")
}

/// The number, or a dash where there is none.
pub(super) fn or_dash(value: Option<f64>) -> String {
    value.map_or("–".into(), number)
}

/// Seconds to a tenth of a millisecond, or a dash.
pub(super) fn seconds(value: Option<f64>) -> String {
    value.map_or("–".into(), |seconds| format!("{seconds:.4}"))
}

/// 1234567 → 1,234,567
pub fn with_commas(number: i64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or("")).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        let written = [0.0, 836.2182, 0.000123456, 0.0000123, -2.5956, 12345.6, 64.0, f64::NAN].map(number);
        assert_eq!(written, ["0", "836.2", "0.0001235", "1.23e−5", "−2.596", "12346", "64.00", "NaN"]);
        assert_eq!(fixed(-0.5, 2), "−0.50");
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!([0, 999, 1000, 548_904_580].map(with_commas), ["0", "999", "1,000", "548,904,580"]);
    }
}
