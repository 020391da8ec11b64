//! The two sizes in which plots are drawn.

/// Sizes of a figure, in pixels.
pub(super) struct Look {
    pub(super) width: f64,
    pub(super) height_of_curves: f64,
    pub(super) margin: f64,
    pub(super) title: f64,
    pub(super) subtitle: f64,
    pub(super) label: f64,
    pub(super) name: f64,
    pub(super) number: f64,
    /// Thickness of a curve, which markers and dashes go by.
    pub(super) curve: f64,
    /// Of a name's piece of curve in the legend.
    pub(super) sample: f64,
    /// Points nearer to each other than this do not each get a marker.
    pub(super) close: f64,
    /// Between the markers of a curve with close points, at least.
    pub(super) between_markers: f64,
    /// For names at the ends of several curves, right of all curves; with none, names stand in the legend alone.
    pub(super) names: f64,
    /// Longer curves are drawn as means of neighbours.
    pub(super) points: usize,
}

/// For a figure of its own. On its width 64 points have a marker each.
pub(super) const FIGURE: Look = Look {
    width: 1200.0,
    height_of_curves: 540.0,
    margin: 20.0,
    title: 24.0,
    subtitle: 15.0,
    label: 19.0,
    name: 17.0,
    number: 16.0,
    curve: 2.4,
    sample: 44.0,
    close: 14.0,
    between_markers: 30.0,
    names: 0.0,
    points: usize::MAX,
};

/// For one of many on a page, down to the width of a phone.
pub(super) const SMALL: Look = Look {
    width: 360.0,
    height_of_curves: 170.0,
    margin: 3.0,
    title: 13.0,
    subtitle: 11.0,
    label: 11.0,
    name: 11.0,
    number: 10.5,
    curve: 1.5,
    sample: 30.0,
    close: 9.0,
    between_markers: 34.0,
    names: 100.0,
    points: 120,
};
