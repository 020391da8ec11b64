//! The conditions that a network is given besides z and t.

use tch::{Kind, Tensor};

use super::Ports;

/// The conditions of a forward pass. Each part is present or not, and none excludes another.
#[derive(Debug, Default)]
pub struct Inputs {
    /// Further input channels, `[B, C_i, F, h, w]` each.
    pub concat: Vec<Tensor>,
    /// `[B, 1, F, h, w]`, or a shape that expands to it: 1 where a frame is given, else 0. Without it, no frame is given.
    pub mask: Option<Tensor>,
    /// The clean frames right before a clip and right after it, `[B, C, past + future, h, w]`; zeros are frames that are not
    /// given, and so are all without it.
    pub around: Option<Tensor>,
    /// The encoded text, `[B, S, width]` with S tokens.
    pub text: Option<Tensor>,
    /// The class of each clip, `[B]` int64. The number of classes, one past the last class, means "no class", and so does
    /// its absence.
    pub label: Option<Tensor>,
    /// The noise level of the given frames of each clip, `[B]` int64. A negative number means that they are clean, and so
    /// does its absence.
    pub level: Option<Tensor>,
    /// In training, the number of each clip by which activations are dropped, `[B]` int64 below 2³¹; without it none are.
    pub dropout: Option<Tensor>,
    /// The time of the noise that `concat` carries, `[B]` real, as [`NoisePath::embed`](crate::diffusion::NoisePath::embed)
    /// makes it; to a network that is told it, always given.
    pub concat_time: Option<Tensor>,
    /// Each frame is a picture that has nothing to do with the others: layers over frames are the identity. Clips then have
    /// one frame each.
    pub stills: bool,
}

impl Clone for Inputs {
    /// The same tensors, not copies of them.
    fn clone(&self) -> Self {
        self.map(Tensor::shallow_clone)
    }
}

impl Inputs {
    /// Each part through `of`.
    fn map(&self, mut of: impl FnMut(&Tensor) -> Tensor) -> Self {
        Inputs {
            concat: self.concat.iter().map(&mut of).collect(),
            mask: self.mask.as_ref().map(&mut of),
            around: self.around.as_ref().map(&mut of),
            text: self.text.as_ref().map(&mut of),
            label: self.label.as_ref().map(&mut of),
            level: self.level.as_ref().map(&mut of),
            dropout: self.dropout.as_ref().map(&mut of),
            concat_time: self.concat_time.as_ref().map(&mut of),
            stills: self.stills,
        }
    }

    /// As [`Self::tensors`], to put others in their places.
    pub fn tensors_mut(&mut self) -> Vec<&mut Tensor> {
        let Inputs { concat, mask, around, text, label, level, dropout, concat_time, stills: _ } = self;
        let rest = [mask, around, text, label, level, dropout, concat_time];
        concat.iter_mut().chain(rest.into_iter().flatten()).collect()
    }

    /// The parts that are present, in the order of the fields.
    pub fn tensors(&self) -> Vec<&Tensor> {
        let Inputs { concat, mask, around, text, label, level, dropout, concat_time, stills: _ } = self;
        concat
            .iter()
            .chain(mask)
            .chain(around)
            .chain(text)
            .chain(label)
            .chain(level)
            .chain(dropout)
            .chain(concat_time)
            .collect()
    }

    /// The same parts with other tensors, given in the order of [`Self::tensors`].
    pub fn with_tensors(&self, tensors: &[Tensor]) -> Self {
        let mut tensors = tensors.iter();
        self.map(|_| tensors.next().expect("as many tensors as parts").shallow_clone())
    }

    /// The input of the network, `[B, inputs, F, h, w]`: z `[B, C, F, h, w]`, then the mask if the network has one, then
    /// `concat`.
    pub fn beside(&self, z: &Tensor, ports: &Ports) -> Tensor {
        let (b, _, f, h, w) = z.size5().expect("latents [B, C, F, h, w]");
        let mask = ports.mask.then(|| match &self.mask {
            Some(mask) => mask.to_kind(z.kind()).expand([b, 1, f, h, w], false),
            None => Tensor::zeros([b, 1, f, h, w], (z.kind(), z.device())),
        });
        if mask.is_none() && self.concat.is_empty() {
            return z.shallow_clone();
        }
        let concat = self.concat.iter().map(|part| part.to_kind(z.kind())).collect::<Vec<_>>();
        let parts: Vec<&Tensor> = [z].into_iter().chain(&mask).chain(&concat).collect();
        Tensor::cat(&parts, 1)
    }

    /// The frames around a clip z `[B, C, F, h, w]`, `[B, C, past + future, h, w]` of its kind.
    pub fn frames_around(&self, z: &Tensor, ports: &Ports) -> Tensor {
        let (b, c, _, h, w) = z.size5().expect("latents [B, C, F, h, w]");
        match &self.around {
            Some(around) => around.to_kind(z.kind()),
            None => Tensor::zeros([b, c, ports.past + ports.future, h, w], (z.kind(), z.device())),
        }
    }

    /// The same conditions with every part that the network has: for clips like z, an absent mask becomes an empty one, an
    /// absent level a negative one, an absent class "no class", absent frames around the clip zeros. The network's output
    /// does not change.
    pub fn completed(&self, z: &Tensor, ports: &Ports) -> Self {
        let (b, _, f, _, _) = z.size5().expect("latents [B, C, F, h, w]");
        let number = |value: i64| Tensor::full([b], value, (Kind::Int64, z.device()));
        let mut all = self.clone();
        if ports.mask && all.mask.is_none() {
            all.mask = Some(Tensor::zeros([b, 1, f, 1, 1], (Kind::Float, z.device())));
        }
        if ports.past + ports.future > 0 && all.around.is_none() {
            all.around = Some(self.frames_around(z, ports));
        }
        if ports.levels.is_some() && all.level.is_none() {
            all.level = Some(number(-1));
        }
        if let (Some(classes), None) = (ports.classes, &all.label) {
            all.label = Some(number(classes));
        }
        all
    }

    /// The conditions of a batch that holds clips like z twice: first under these conditions, then under `other`. A part
    /// that only one of them has is completed for the other as in [`Self::completed`].
    ///
    /// # Panics
    /// If only one of them has a text or further channels, for which there is no empty value.
    pub fn stacked(&self, other: &Inputs, z: &Tensor, ports: &Ports) -> Self {
        let (first, second) = (self.completed(z, ports), other.completed(z, ports));
        let (ours, theirs) = (first.tensors(), second.tensors());
        let parts = |given: &Inputs| (given.concat.len(), given.text.is_some());
        assert_eq!(
            parts(&first),
            parts(&second),
            "only one of the two conditions of guidance has a text or further channels"
        );
        let both: Vec<Tensor> = ours.into_iter().zip(theirs).map(|(a, b)| Tensor::cat(&[a, b], 0)).collect();
        first.with_tensors(&both)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        tensor.to_kind(Kind::Double).flatten(0, -1).try_into().unwrap()
    }

    /// Each keeps its parts, and a part that it lacks becomes the empty one.
    #[test]
    fn a_part_that_one_side_lacks_is_its_nothing() {
        let ports = Ports { mask: true, levels: Some(11), classes: Some(7), ..Ports::of([2, 3, 1, 1]) };
        let z = Tensor::zeros([1, 2, 3, 1, 1], (Kind::Float, tch::Device::Cpu));
        let given = Inputs {
            mask: Some(Tensor::from_slice(&[1f32, 0.0, 0.0]).reshape([1, 1, 3, 1, 1])),
            label: Some(Tensor::from_slice(&[4i64])),
            ..Inputs::default()
        };
        let other = Inputs { level: Some(Tensor::from_slice(&[9i64])), ..Inputs::default() };
        let both = given.stacked(&other, &z, &ports);
        assert_eq!(numbers(both.mask.as_ref().unwrap()), [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(numbers(both.label.as_ref().unwrap()), [4.0, 7.0]);
        assert_eq!(numbers(both.level.as_ref().unwrap()), [-1.0, 9.0]);
        assert!(both.text.is_none() && both.concat.is_empty());
    }

    #[test]
    #[should_panic(expected = "only one of the two conditions of guidance has a text")]
    fn a_text_on_one_side_alone_is_refused() {
        let z = Tensor::zeros([1, 2, 3, 1, 1], (Kind::Float, tch::Device::Cpu));
        let text =
            Inputs { text: Some(Tensor::zeros([1, 4, 8], (Kind::Float, tch::Device::Cpu))), ..Inputs::default() };
        text.stacked(&Inputs::default(), &z, &Ports { text: Some(8), ..Ports::of([2, 3, 1, 1]) });
    }

    #[test]
    fn mask_and_channels_lie_behind_z() {
        let of = |value: f64, c: i64| Tensor::full([1, c, 2, 1, 1], value, (Kind::Float, tch::Device::Cpu));
        let ports = Ports { mask: true, concat: 1, ..Ports::of([1, 2, 1, 1]) };
        let given = Inputs { concat: vec![of(5.0, 1)], ..Inputs::default() };
        assert_eq!(numbers(&given.beside(&of(3.0, 1), &ports)), [3.0, 3.0, 0.0, 0.0, 5.0, 5.0]);
        assert_eq!(ports.inputs(), 3);
    }
}
