//! Cards that people train on: memory and highest rates as their makers' data sheets give them.

use crate::experiment::Precision;

/// A GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub memory: i64,
    /// How fast it is at most; none where that is not known.
    pub rates: Option<Rates>,
}

/// The highest rates of a card, as its maker's data sheet gives them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Operations a second of dense products: bfloat16 summed in float32, TF32, float32.
    pub peaks: [f64; 3],
    /// Bytes a second between its memory and its processors.
    pub bandwidth: f64,
}

impl Rates {
    /// The peak in such a precision.
    pub fn peak(&self, precision: Precision, tf32: bool) -> f64 {
        let [bf16, as_tf32, f32] = self.peaks;
        match precision {
            Precision::Bf16 => bf16,
            Precision::F32 if tf32 => as_tf32,
            Precision::F32 => f32,
        }
    }
}

/// Name, memory in GiB, peaks in 10¹² operations a second, and bandwidth in 10⁹ bytes a second, from NVIDIA's data sheets of the
/// A100, H100, H200 (SXM) and L40S, and its papers on the architectures GA102 and Ada; without sparsity.
pub const CARDS: [(&str, i64, [f64; 3], f64); 7] = [
    ("RTX 3090", 24, [71.0, 35.6, 35.6], 936.0),
    ("RTX 4090", 24, [165.2, 82.6, 82.6], 1008.0),
    ("A100 40 GB", 40, [312.0, 156.0, 19.5], 1555.0),
    ("L40S", 48, [362.0, 183.0, 91.6], 864.0),
    ("A100 80 GB", 80, [312.0, 156.0, 19.5], 2039.0),
    ("H100", 80, [989.4, 494.7, 66.9], 3350.0),
    ("H200", 140, [989.4, 494.7, 66.9], 4800.0),
];

impl Card {
    /// The share of a card's memory that a plan counts on. The rest is an allowance, not a measurement: for CUDA's context,
    /// workspaces of its libraries, the gradients that are on their way, and memory that lies in pieces.
    pub const USABLE: f64 = 0.85;

    /// The share of the peak that a roofline takes for products.
    pub const PEAK_REACHED: f64 = 0.5;

    /// The share of the bandwidth that a roofline takes.
    pub const BANDWIDTH_REACHED: f64 = 0.6;

    /// Seconds that a kernel takes at the least, in a CUDA graph.
    pub const KERNEL: f64 = 3e-6;

    /// Those of [`CARDS`].
    pub fn known() -> Vec<Card> {
        let card = |(name, gib, peaks, bandwidth): (&str, i64, [f64; 3], f64)| Card {
            name: name.into(),
            memory: gib << 30,
            rates: Some(Rates { peaks: peaks.map(|peak| peak * 1e12), bandwidth: bandwidth * 1e9 }),
        };
        CARDS.into_iter().map(card).collect()
    }

    /// A card of which only the memory is known, in GiB.
    pub fn of_memory(gib: f64) -> Card {
        Card { name: format!("{gib} GB"), memory: (gib * (1i64 << 30) as f64) as i64, rates: None }
    }
}
