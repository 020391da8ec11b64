//! Walks over latent frames: one after the other with a window that slides along, and those of a gap between two.

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::networks::{Gpt, Sees};

/// How the interpolation model is fed when it fills a gap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// As in training: the frame behind the gap stands where it stood there and is seen from both sides, and the first token of
    /// the gap follows from the last of the frame before it.
    #[default]
    Consistent,
    /// As the released code: the frame behind the gap begins one position too late and sees only what comes before it, and the
    /// first token of the gap follows from that frame's last.
    Released,
}

/// Latent frames of `s` tokens, one after the other: tokens `[B, frames·s]` of sequences that begin with `start` `[B]`. The
/// network sees `window` frames when it makes the next, and what goes out of the window is forgotten: for each frame it is fed
/// the window anew, with a cache of its own. `first` are tokens `[B, k·s]` of frames that are given. `draw` makes tokens `[B]` of
/// their logits `[B, V]`.
pub fn slide(
    network: &Gpt,
    start: &Tensor,
    first: Option<&Tensor>,
    [frames, s, window]: [i64; 3],
    draw: &mut dyn FnMut(&Tensor) -> Tensor,
) -> Tensor {
    let start = start.unsqueeze(1); // [B, 1]
    let mut made = first.map_or_else(|| start.narrow(1, 0, 0), Tensor::shallow_clone);
    let mut done = made.size()[1];
    while done < frames * s {
        let seen = done.min(window * s);
        let count = if done == 0 { window.min(frames) * s } else { s };
        let prompt = Tensor::cat(&[&start, &made.narrow(1, done - seen, seen)], 1);
        let mut cache = network.cache();
        let mut logits = network.feed(&prompt, &[(0, seen + 1)], &network.prompt_mask(seen + 1), seen, &mut cache);
        let mut tokens = vec![made];
        for i in 1..=count {
            let token = draw(&logits).unsqueeze(1);
            if i < count {
                let at = seen + i;
                logits = network.feed(&token, &[(at, 1)], &Sees::All, 0, &mut cache);
            }
            tokens.push(token);
        }
        made = Tensor::cat(&tokens, 1);
        done += count;
    }
    made
}

/// The tokens of the latent frames between two, `[B, L − 2·s]`, where each of the two, `before` and `after`, is `[B, s]`.
pub fn fill_gap(
    network: &Gpt,
    start: &Tensor,
    [before, after]: [&Tensor; 2],
    form: Form,
    draw: &mut dyn FnMut(&Tensor) -> Tensor,
) -> Tensor {
    let (length, s) = (network.sequences().length, before.size()[1]);
    let mut cache = network.cache();
    let (after, sees, row) = match form {
        // the last token of a sequence is never among its inputs
        Form::Consistent => (after.narrow(1, 0, s - 1), Sees::All, s),
        Form::Released => (after.shallow_clone(), network.prompt_mask(2 * s + 1), 2 * s),
    };
    let prompt = Tensor::cat(&[&start.unsqueeze(1), before, &after], 1);
    let count = after.size()[1];
    let positions = [(0, s + 1), (length - count, count)];
    let mut logits = network.feed(&prompt, &positions, &sees, row, &mut cache);
    let mut tokens = Vec::new();
    for at in s + 1..=length - s {
        let token = draw(&logits).unsqueeze(1);
        if at < length - s {
            logits = network.feed(&token, &[(at, 1)], &Sees::All, 0, &mut cache);
        }
        tokens.push(token);
    }
    Tensor::cat(&tokens, 1)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, no_grad};

    use super::*;
    use crate::{
        autoregression::{CodeSampling, Vocabulary, loss, numbers},
        networks::{GptConfig, Sequences},
        nn::Parameters,
        random::{Purpose, normal},
    };

    const VOCABULARY: Vocabulary = Vocabulary { classes: 2, codes: 7 };
    /// Tokens of a latent frame.
    const S: i64 = 4;

    /// Of sequences of five latent frames.
    fn network(fills_gaps: bool) -> Gpt {
        let parameters = Parameters::new(Device::Cpu, 3);
        let config = GptConfig { layers: 2, heads: 2, width: 8, recompute: false };
        let unmasked = if fills_gaps { S } else { 0 };
        let network =
            Gpt::new(&parameters.root(), &config, Sequences { vocabulary: VOCABULARY.size(), length: 5 * S, unmasked });
        parameters.freeze();
        for (i, (_, mut tensor)) in parameters.named().into_iter().enumerate() {
            tensor += normal(1, Purpose::Evaluation, i as u64, 0, &tensor.size()) * 0.3;
        }
        network
    }

    fn start() -> Tensor {
        Tensor::from_slice(&[0i64, 1, 1])
    }

    type Draw<'a> = &'a mut dyn FnMut(&Tensor) -> Tensor;

    /// Draws tokens that were decided before, `[B, n]`, and keeps the logits `[B, n, V]`.
    fn told(tokens: &Tensor, kept: &mut Vec<Tensor>, walk: &mut dyn FnMut(Draw)) -> Tensor {
        let mut i = -1;
        walk(&mut |logits: &Tensor| {
            i += 1;
            kept.push(logits.shallow_clone());
            tokens.select(1, i)
        });
        Tensor::stack(kept, 1)
    }

    /// Tokens of three clips of five latent frames, and the logits that training sees of them, `[3, 5·S, V]`.
    fn training(network: &Gpt) -> (Tensor, Tensor) {
        let tokens = Tensor::randint_low(0, VOCABULARY.size(), [3, 5 * S], (Kind::Int64, Device::Cpu));
        let (logits, _) = no_grad(|| loss(network, &start(), &tokens));
        (tokens, logits)
    }

    fn far(a: &Tensor, b: &Tensor) -> f64 {
        assert_eq!(a.size(), b.size());
        (a - b).abs().max().double_value(&[])
    }

    /// With a window of all frames, what a walk draws from is what training learns, token by token, though each is fed once.
    /// In a window that slides, each frame is drawn as the first behind its window.
    #[test]
    fn a_walk_draws_from_what_training_learns() {
        let network = network(false);
        let (tokens, learned) = training(&network);
        let walk = |window, frames| {
            let drawn = tokens.narrow(1, 0, frames * S);
            told(&drawn, &mut Vec::new(), &mut |draw| {
                let made = slide(&network, &start(), None, [frames, S, window], draw);
                assert!(made.equal(&drawn));
            })
        };
        assert!(far(&walk(4, 4), &learned.narrow(1, 0, 4 * S)) < 1e-5);
        let slid = walk(1, 5);
        assert!(far(&slid.narrow(1, 0, 2 * S), &learned.narrow(1, 0, 2 * S)) < 1e-5);
        for frame in 1..4 {
            let window = tokens.narrow(1, frame * S, 2 * S);
            let (logits, _) = no_grad(|| loss(&network, &start(), &window));
            assert!(far(&slid.narrow(1, (frame + 1) * S, S), &logits.narrow(1, S, S)) < 1e-5, "frame {frame}");
        }
        assert!(far(&slid.narrow(1, 2 * S, S), &learned.narrow(1, 2 * S, S)) > 1e-3);
        // frames that are given are gone on from
        let given = tokens.narrow(1, 0, 2 * S);
        let rest = tokens.narrow(1, 2 * S, 3 * S);
        let logits = told(&rest, &mut Vec::new(), &mut |draw| {
            let made = slide(&network, &start(), Some(&given), [5, S, 2], draw);
            assert!(made.equal(&tokens));
        });
        assert!(far(&logits.narrow(1, 0, S), &learned.narrow(1, 2 * S, S)) < 1e-5);
    }

    /// A gap is drawn from what training learns, as long as it is filled consistently; the released form is another.
    #[test]
    fn a_gap_is_drawn_from_what_training_learns() {
        let network = network(true);
        let (tokens, learned) = training(&network);
        let [before, after] = [0, 4].map(|frame| tokens.narrow(1, frame * S, S));
        let middle = tokens.narrow(1, S, 3 * S);
        let walk = |form| {
            told(&middle, &mut Vec::new(), &mut |draw| {
                let made = fill_gap(&network, &start(), [&before, &after], form, draw);
                assert!(made.equal(&middle));
            })
        };
        let learned = learned.narrow(1, S, 3 * S);
        assert!(far(&walk(Form::Consistent), &learned) < 1e-5);
        assert!(far(&walk(Form::Released), &learned) > 1e-3);
    }

    /// A frame costs as much wherever in a video it stands: the window with the start token, and each of its tokens but the
    /// last, once.
    #[test]
    fn the_cost_of_a_token_does_not_grow() {
        let network = network(false);
        let numbers = Tensor::stack(&[0, 1, 2].map(|sample| numbers(1, sample, 0, 40 * S)), 1);
        for window in 1..4 {
            let mut fed = Vec::new();
            for frames in [10, 20, 40] {
                let (before, mut i) = (network.fed(), -1);
                let _ = slide(&network, &start(), None, [frames, S, window], &mut |logits| {
                    i += 1;
                    CodeSampling::default().draw(logits, &numbers.get(i))
                });
                fed.push(network.fed() - before);
            }
            let first = window * S; // the frames of the first window, from the start token alone
            let others = |frames| (frames - window) * (1 + window * S + S - 1);
            assert_eq!(fed, [10, 20, 40].map(|frames| first + others(frames)), "window {window}");
        }
    }
}
