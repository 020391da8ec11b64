//! The classes of a training.

use anyhow::{Result, bail, ensure};

use super::latents::classes_in;
use crate::experiment::{ClassList, DiffusionExperiment};

/// The experiment with the names of its classes, which its run keeps: those that it says itself, else those of its data,
/// sorted.
///
/// # Errors
/// Data without classes; other classes than the experiment says.
pub fn with_classes(experiment: &DiffusionExperiment) -> Result<DiffusionExperiment> {
    let mut experiment = experiment.clone();
    let Some(labels) = &mut experiment.labels else { return Ok(experiment) };
    let found = match &experiment.latents {
        Some(file) => classes_in(file)?,
        None => experiment.data.videos()?.classes(),
    };
    let place = match &experiment.latents {
        Some(file) => file.display().to_string(),
        None => experiment.data.dataset.line(),
    };
    let Some(found) = found else {
        bail!(
            "labels: not every video of {place} has a class; give an index that `lvdm data prepare ucf101` wrote, or a folder \
             that holds a folder for each class"
        )
    };
    match &labels.classes {
        Some(ClassList::Names(names)) => {
            let foreign = found.iter().find(|class| !names.contains(class));
            ensure!(foreign.is_none(), "labels.classes does not name `{}` of {place}", foreign.map_or("", |name| name));
        }
        Some(ClassList::Count(count)) if *count != found.len() as i64 => {
            bail!("labels.classes is {count}, and {place} has {} classes", found.len())
        }
        _ => labels.classes = Some(ClassList::Names(found)),
    }
    Ok(experiment)
}
