//! What a plot is made of.

/// One curve.
pub struct Series {
    /// What the legend calls it.
    pub name: String,
    /// x and y, joined in this order. Where one of the two is not finite, the curve has a gap.
    pub points: Vec<(f64, f64)>,
}

/// Whether a point can be drawn at all.
pub(super) fn is_finite((x, y): &(f64, f64)) -> bool {
    x.is_finite() && y.is_finite()
}
