//! The classes of a training.

use std::path::Path;

use anyhow::{Result, bail, ensure};

use super::latents::classes_in;
use crate::{
    data::DataConfig,
    experiment::{ClassList, DiffusionExperiment},
};

/// The experiment with the names of its classes, which its run keeps: those that it says itself, else those of its data,
/// sorted.
///
/// # Errors
/// Data without classes; other classes than the experiment says.
pub fn with_classes(experiment: &DiffusionExperiment) -> Result<DiffusionExperiment> {
    let mut experiment = experiment.clone();
    if let Some(labels) = &mut experiment.labels {
        complete(&mut labels.classes, experiment.latents.as_deref(), &experiment.data)?;
    }
    Ok(experiment)
}

/// As [`with_classes`], for what an experiment says of its classes, of its file of latents or of its data.
///
/// # Errors
/// As [`with_classes`].
pub(super) fn complete(classes: &mut Option<ClassList>, latents: Option<&Path>, data: &DataConfig) -> Result<()> {
    let found = match latents {
        Some(file) => classes_in(file)?,
        None => data.videos()?.classes(),
    };
    let place = match latents {
        Some(file) => file.display().to_string(),
        None => data.dataset.line(),
    };
    let Some(found) = found else {
        bail!(
            "labels: not every video of {place} has a class; give an index that `lvdm data prepare ucf101` wrote, or a folder \
             that holds a folder for each class"
        )
    };
    match classes {
        Some(ClassList::Names(names)) => {
            let foreign = found.iter().find(|class| !names.contains(class));
            ensure!(foreign.is_none(), "labels.classes does not name `{}` of {place}", foreign.map_or("", |name| name));
        }
        Some(ClassList::Count(count)) if *count != found.len() as i64 => {
            bail!("labels.classes is {count}, and {place} has {} classes", found.len())
        }
        _ => *classes = Some(ClassList::Names(found)),
    }
    Ok(())
}
