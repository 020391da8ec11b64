//! Cards that people train on: memory, and peak throughput of dense products as their makers' data sheets give it.

use crate::experiment::Precision;

/// A GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct Card {
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub memory: i64,
    /// Peak of dense products in 10¹² operations a second: bfloat16 summed in float32, TF32, float32; none where it is not
    /// known.
    pub peaks: Option<[f64; 3]>,
}

/// Name, memory in GiB, and peaks, from NVIDIA's data sheets of the A100, H100, H200 (SXM) and L40S, and its papers on the
/// architectures GA102 and Ada; without sparsity.
pub const CARDS: [(&str, i64, [f64; 3]); 7] = [
    ("RTX 3090", 24, [71.0, 35.6, 35.6]),
    ("RTX 4090", 24, [165.2, 82.6, 82.6]),
    ("A100 40 GB", 40, [312.0, 156.0, 19.5]),
    ("L40S", 48, [362.0, 183.0, 91.6]),
    ("A100 80 GB", 80, [312.0, 156.0, 19.5]),
    ("H100", 80, [989.4, 494.7, 66.9]),
    ("H200", 140, [989.4, 494.7, 66.9]),
];

impl Card {
    /// The share of a card's memory that a plan counts on. The rest is an allowance, not a measurement: for CUDA's context,
    /// workspaces of its libraries, the gradients that are on their way, and memory that lies in pieces.
    pub const USABLE: f64 = 0.85;

    /// Those of [`CARDS`].
    pub fn known() -> Vec<Card> {
        let card = |(name, gib, peaks): (&str, i64, [f64; 3])| Card {
            name: name.into(),
            memory: gib << 30,
            peaks: Some(peaks),
        };
        CARDS.into_iter().map(card).collect()
    }

    /// A card of which only the memory is known, in GiB.
    pub fn of_memory(gib: f64) -> Card {
        Card { name: format!("{gib} GB"), memory: (gib * (1i64 << 30) as f64) as i64, peaks: None }
    }

    /// Its peak in such a precision.
    pub fn peak(&self, precision: Precision, tf32: bool) -> Option<f64> {
        let [bf16, as_tf32, f32] = self.peaks?;
        Some(match precision {
            Precision::Bf16 => bf16,
            Precision::F32 if tf32 => as_tf32,
            Precision::F32 => f32,
        })
    }
}
