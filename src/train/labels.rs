//! Class labels of training samples: the number of each sample's class.

use anyhow::{Context, Result, bail};
use rand::RngExt;
use tch::{Device, Tensor};

use crate::{
    experiment::{ClassList, LabelConditioning},
    random::{Purpose, stream},
    torch::upload,
};

/// `[N]` int64 on the host: the number of each class by its name.
///
/// # Errors
/// A clip without a class, or of a class that is not among `names`.
pub(super) fn class_numbers<'a>(names: &[String], classes: impl Iterator<Item = Option<&'a str>>) -> Result<Vec<i64>> {
    let number = |class: Option<&str>| {
        let class = class.context("data.dataset: a clip has no class")?;
        let place = names.iter().position(|name| name == class);
        Ok(place.with_context(|| format!("data.dataset: labels.classes does not name `{class}`"))? as i64)
    };
    classes.map(number).collect()
}

/// Makes labels of the names of classes, some of which are dropped.
pub(super) struct Labels {
    names: Vec<String>,
    drop: f64,
    seed: u64,
    device: Device,
}

impl Labels {
    /// # Errors
    /// Classes whose names are not known, see [`with_classes`].
    pub(super) fn new(labels: &LabelConditioning, seed: u64, device: Device) -> Result<Self> {
        let Some(ClassList::Names(names)) = &labels.classes else {
            bail!("labels.classes: the names of the classes are not known");
        };
        Ok(Labels { names: names.clone(), drop: labels.drop, seed, device })
    }

    /// The labels of a batch, `[B]` int64 on the device. In place of a class that is dropped stands the number of classes,
    /// which is no class; which are depends on the seed and the sample alone.
    ///
    /// # Errors
    /// As [`class_numbers`].
    pub(super) fn of<'a>(&self, classes: impl Iterator<Item = Option<&'a str>>, samples: &[u64]) -> Result<Tensor> {
        let mut numbers = class_numbers(&self.names, classes)?;
        for (number, &sample) in numbers.iter_mut().zip(samples) {
            if stream(self.seed, Purpose::Label, sample, 0).random_bool(self.drop) {
                *number = self.names.len() as i64;
            }
        }
        Ok(upload(&Tensor::from_slice(&numbers), self.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As often as asked, by seed and sample alone, and never another class.
    #[test]
    fn labels_are_dropped_sample_by_sample() {
        let classes = Some(ClassList::Names(["a", "b"].map(String::from).to_vec()));
        let of = |drop, seed| {
            Labels::new(&LabelConditioning { classes: classes.clone(), drop, guidance: 1.0 }, seed, Device::Cpu)
        };
        let labels_of = |labels: &Labels, samples: &[u64]| -> Vec<i64> {
            let names = samples.iter().map(|sample| Some(if sample % 2 == 0 { "a" } else { "b" }));
            labels.of(names, samples).unwrap().try_into().unwrap()
        };
        let all: Vec<u64> = (0..2000).collect();
        let labels = of(0.1, 3).unwrap();
        let found = labels_of(&labels, &all);
        let dropped = found.iter().filter(|&&label| label == 2).count();
        assert!((150..250).contains(&dropped), "{dropped} of 2000");
        assert!(found.iter().zip(&all).all(|(&label, sample)| label == 2 || label == (sample % 2) as i64));
        assert_eq!(labels_of(&labels, &all[700..900]), found[700..900]);
        assert_ne!(labels_of(&of(0.1, 4).unwrap(), &all), found);
        assert!(labels_of(&of(0.0, 3).unwrap(), &all).iter().all(|&label| label < 2));
        let error = labels.of([Some("c")].into_iter(), &[0]).unwrap_err().to_string();
        assert!(error.contains("does not name `c`"), "{error}");
    }
}
