//! Class labels that a network is given.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// The classes that a network tells apart. A class's number is its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(untagged, expecting = "the number of classes, or a list of their names")]
pub enum ClassList {
    /// So many; what they are called is not known.
    Count(i64),
    /// Their names.
    Names(Vec<String>),
}

impl ClassList {
    /// How many there are.
    pub fn count(&self) -> i64 {
        match self {
            ClassList::Count(count) => *count,
            ClassList::Names(names) => names.len() as i64,
        }
    }

    /// The number of a class that is given by its name or by its number.
    ///
    /// # Errors
    /// No such class; some that there are.
    pub fn number(&self, name_or_number: &str) -> Result<i64> {
        if let ClassList::Names(names) = self
            && let Some(place) = names.iter().position(|name| name == name_or_number)
        {
            return Ok(place as i64);
        }
        let number: Option<i64> = name_or_number.parse().ok();
        number.filter(|number| (0..self.count()).contains(number)).with_context(|| {
            format!("the class `{name_or_number}` is none of {}; give the name or the number of a class", self.line())
        })
    }

    /// For each of these classes its number in another list; none where it is not in that.
    ///
    /// # Errors
    /// Names on one side alone, and another number of classes: which is which cannot be told.
    pub fn numbers_in(&self, other: &ClassList) -> Result<Vec<Option<i64>>> {
        match (self, other) {
            (ClassList::Names(names), ClassList::Names(others)) => {
                let place = |name: &String| others.iter().position(|other| other == name).map(|place| place as i64);
                Ok(names.iter().map(place).collect())
            }
            _ => {
                ensure!(
                    self.count() == other.count(),
                    "{} classes whose names are not known cannot be found among {}: as many are needed, in the same order",
                    other.count(),
                    self.line()
                );
                Ok((0..self.count()).map(Some).collect())
            }
        }
    }

    /// The classes in a line, many of them by the first.
    pub fn line(&self) -> String {
        let count = self.count();
        match self {
            ClassList::Names(names) if count <= 12 => names.join(", "),
            ClassList::Names(names) => format!("the {count} classes {}, … (0 to {})", names[..5].join(", "), count - 1),
            ClassList::Count(_) => format!("the {count} classes 0 to {}", count - 1),
        }
    }
}

/// Class labels: `labels:` of an experiment. The data give each video its class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LabelConditioning {
    /// The names of the classes, or how many there are. Without it they are those of the data, sorted, and the run keeps
    /// their names.
    pub classes: Option<ClassList>,
    /// Probability that a training sample goes without its label, so that there is guidance.
    pub drop: f64,
    /// Weight of guidance where nothing else is said: of the pictures in the log, and of sampling.
    pub guidance: f64,
}

impl Default for LabelConditioning {
    /// Latte's.
    fn default() -> Self {
        LabelConditioning { classes: None, drop: 0.1, guidance: 7.0 }
    }
}

impl LabelConditioning {
    /// # Errors
    /// Guidance of a network that never learned to go without a label.
    pub fn check_guidance(&self, guidance: f64) -> Result<()> {
        ensure!(
            self.drop > 0.0 || guidance == 1.0,
            "with labels.drop 0 the network never goes without a label, which guidance leads away from: it must be 1, not \
             {guidance}"
        );
        Ok(())
    }

    /// # Errors
    /// Names the key and the rule.
    pub fn validate(&self) -> Result<()> {
        ensure!((0.0..=1.0).contains(&self.drop), "labels.drop is a probability, not {}", self.drop);
        ensure!(self.guidance.is_finite(), "labels.guidance is {}", self.guidance);
        self.check_guidance(self.guidance).context("labels.guidance")?;
        let Some(classes) = &self.classes else { return Ok(()) };
        let count = classes.count();
        ensure!((1..=1_000_000).contains(&count), "labels.classes: {count} classes; there must be at least one");
        if let ClassList::Names(names) = classes {
            let mut sorted: Vec<&String> = names.iter().collect();
            sorted.sort();
            let twice = sorted.windows(2).find(|pair| pair[0] == pair[1]);
            ensure!(twice.is_none(), "labels.classes: `{}` is there twice", twice.map_or("", |pair| pair[0]));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_told_by_name_or_number() {
        let names = ClassList::Names(["Archery", "7", "Basketball"].map(String::from).to_vec());
        assert_eq!(names.number("Basketball").unwrap(), 2);
        // a name comes before a number
        assert_eq!((names.number("7").unwrap(), names.number("0").unwrap()), (1, 0));
        assert_eq!(ClassList::Count(101).number("100").unwrap(), 100);
        for (classes, given) in [(&names, "3"), (&names, "archery"), (&names, "-1"), (&ClassList::Count(101), "101")] {
            let error = classes.number(given).unwrap_err().to_string();
            assert!(error.contains(given) && error.contains(&classes.line()), "{error}");
        }
        let of = |text: &str| serde_yaml::from_str::<LabelConditioning>(text).map(|labels| labels.validate());
        assert!(of("{classes: [a, b], drop: 0.2}").unwrap().is_ok() && of("{classes: 3}").unwrap().is_ok());
        for (text, word) in [("{classes: [a, b, a]}", "twice"), ("{classes: 0}", "at least one"), ("{drop: 2}", "drop")]
        {
            assert!(of(text).unwrap().unwrap_err().to_string().contains(word), "{text}");
        }
        assert!(of("{classes: {a: 1}}").unwrap_err().to_string().contains("list of their names"));
    }

    #[test]
    fn classes_are_found_by_name() {
        let names = |names: &[&str]| ClassList::Names(names.iter().map(|name| name.to_string()).collect());
        let (now, before) = (names(&["a", "b", "new"]), names(&["b", "gone", "a"]));
        assert_eq!(now.numbers_in(&before).unwrap(), [Some(2), Some(0), None]);
        assert_eq!(now.numbers_in(&ClassList::Count(3)).unwrap(), [Some(0), Some(1), Some(2)]);
        let error = now.numbers_in(&ClassList::Count(101)).unwrap_err().to_string();
        assert!(error.contains("101 classes whose names are not known") && error.contains("a, b, new"), "{error}");
    }

    #[test]
    fn guidance_needs_training_without_labels() {
        let never = LabelConditioning { drop: 0.0, ..LabelConditioning::default() };
        assert!(never.validate().unwrap_err().to_string().contains("labels.guidance"));
        LabelConditioning { guidance: 1.0, ..never }.validate().unwrap();
    }
}
