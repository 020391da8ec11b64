use tch::{Kind, Tensor};

/// The sinusoidal embedding of diffusion time, `[cos | sin]` of t·exp(−ln 10000·i/half):
/// t `[B]` → `[B, width]` in `kind`. An odd width ends in a zero.
pub fn timestep_embedding(t: &Tensor, width: i64, kind: Kind) -> Tensor {
    let half = width / 2;
    let i = Tensor::arange(half, (kind, t.device()));
    let frequencies = (i * (-(10000f64.ln()) / half as f64)).exp();
    let angles = t.to_kind(kind).unsqueeze(1) * frequencies.unsqueeze(0);
    let embedding = Tensor::cat(&[angles.cos(), angles.sin()], 1);
    if width % 2 == 1 { embedding.constant_pad_nd([0, 1]) } else { embedding }
}
