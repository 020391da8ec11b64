//! β of a file → the schedule that it follows.

use anyhow::{Result, bail, ensure};
use tch::{Kind, Tensor};

use crate::diffusion::{NoiseSchedule, ScheduleConfig, ScheduleKind};

/// The schedule that a checkpoint's β follow; without them the published one. Of all that agree with the β to their
/// rounding, it is the one whose ends are written with the fewest digits.
pub(super) fn schedule(betas: Option<&[f64]>, text: bool) -> Result<ScheduleConfig> {
    let Some(betas) = betas else {
        let stable_diffusion = ScheduleConfig { beta_start: 0.00085, beta_end: 0.012, ..ScheduleConfig::default() };
        return Ok(if text { stable_diffusion } else { ScheduleConfig::default() });
    };
    let (Some(&first), Some(&last)) = (betas.first(), betas.last()) else { bail!("`betas` is empty") };
    ensure!(betas.iter().all(|beta| beta.is_finite()), "`betas` holds values that are not finite");
    let Rounding { relative, absolute } = Rounding::of(betas);
    let written = |beta: f64, digits: usize| format!("{beta:.digits$e}").parse::<f64>();
    for digits in 0..=2 * MOST_DIGITS {
        for of_first in digits.saturating_sub(MOST_DIGITS)..=digits.min(MOST_DIGITS) {
            let (beta_start, beta_end) = (written(first, of_first)?, written(last, digits - of_first)?);
            for kind in [ScheduleKind::ScaledLinear, ScheduleKind::Linear] {
                let config =
                    ScheduleConfig { kind, steps: betas.len() as i64, beta_start, beta_end, zero_terminal_snr: false };
                let Ok(schedule) = NoiseSchedule::new(&config) else { continue };
                let near = |(ours, theirs): (&f64, &f64)| (ours - theirs).abs() <= (relative * ours).max(absolute);
                if schedule.beta.iter().zip(betas).all(near) {
                    return Ok(config);
                }
            }
        }
    }
    bail!("`betas` run from {first:.6} to {last:.6} on no curve that is known (linear, or linear in the root)")
}

/// Digits behind the first with which the ends of a schedule are written down.
const MOST_DIGITS: usize = 5;

/// How far numbers may be from those that they were before they were stored.
struct Rounding {
    /// Relative to them.
    relative: f64,
    /// However small they are.
    absolute: f64,
}

impl Rounding {
    /// Of the shortest type that holds all of these values.
    fn of(values: &[f64]) -> Self {
        let singles: Vec<f32> = values.iter().map(|&value| value as f32).collect();
        let given = Tensor::from_slice(&singles);
        let survive = |kind: Kind| given.to_kind(kind).to_kind(Kind::Float).equal(&given);
        if survive(Kind::BFloat16) {
            Rounding { relative: 2f64.powi(-8), absolute: 0.0 }
        } else if survive(Kind::Half) {
            // below 2⁻¹⁴ half precision has steps of 2⁻²⁴
            Rounding { relative: 2f64.powi(-11), absolute: 2f64.powi(-25) }
        } else {
            // they come squared out of float32
            Rounding { relative: 1e-5, absolute: 0.0 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn betas_tell_their_schedule() {
        let given = ScheduleConfig {
            kind: ScheduleKind::Linear,
            steps: 50,
            beta_start: 0.001,
            beta_end: 0.02,
            ..Default::default()
        };
        for config in [ScheduleConfig::default(), given] {
            let mut betas = NoiseSchedule::new(&config).unwrap().beta;
            assert_eq!(schedule(Some(&betas), false).unwrap(), config);
            betas[20] *= 1.001;
            assert!(schedule(Some(&betas), false).unwrap_err().to_string().contains("no curve"));
        }
        assert_eq!(schedule(None, false).unwrap(), ScheduleConfig::default());
        assert_eq!(schedule(None, true).unwrap().beta_start, 0.00085);
        assert!(schedule(Some(&[]), false).is_err());
        assert!(schedule(Some(&[f64::NAN, 0.5]), false).is_err());
    }

    /// Tools that halve a file halve its buffers too; some store them in float32 again.
    #[test]
    fn betas_in_half_precision_tell_their_schedule() {
        let of = |kind, steps, beta_start, beta_end| ScheduleConfig {
            kind,
            steps,
            beta_start,
            beta_end,
            zero_terminal_snr: false,
        };
        let (scaled, linear) = (ScheduleKind::ScaledLinear, ScheduleKind::Linear);
        for config in [
            of(scaled, 1000, 0.00085, 0.012),
            of(scaled, 1000, 0.0015, 0.0155),
            of(scaled, 1000, 0.0015, 0.0195),
            of(linear, 1000, 0.0001, 0.02),
            of(linear, 1000, 0.00085, 0.012),
        ] {
            let betas = NoiseSchedule::new(&config).unwrap().beta;
            for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
                let stored = Tensor::from_slice(&betas).to_kind(kind).to_kind(Kind::Float).to_kind(Kind::Double);
                let mut stored = Vec::<f64>::try_from(stored).unwrap();
                assert_eq!(schedule(Some(&stored), true).unwrap(), config, "{kind:?}");
                // in float32 the smallest is held as exactly as the others
                if kind == Kind::Float {
                    let mut bent = stored.clone();
                    bent[0] *= 1.0002;
                    assert!(schedule(Some(&bent), true).is_err(), "{config:?}");
                }
                // a bend of a percent is none of rounding
                stored[500] *= 1.02;
                let bent = Tensor::from_slice(&stored).to_kind(kind).to_kind(Kind::Double);
                assert!(schedule(Some(&Vec::<f64>::try_from(bent).unwrap()), true).is_err(), "{kind:?}");
            }
        }
    }
}
