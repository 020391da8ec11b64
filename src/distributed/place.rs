//! Who this process is among the ranks, by its environment.

use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};

/// One of several processes, and where they meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// This process's number, from 0.
    pub rank: usize,
    /// How many processes there are.
    pub size: usize,
    /// Counted on this machine alone: the number of its GPU.
    pub local_rank: usize,
    /// Where the store is.
    pub host: String,
    /// Where the store listens.
    pub port: u16,
    /// Whether this process serves the store.
    pub serves: bool,
}

/// The place that the environment gives this process; none where it works alone.
///
/// # Errors
/// Names the variable that is missing or wrong.
pub fn here() -> Result<Option<Place>> {
    Place::from(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
}

/// The rank of this process, for its warnings; none where it works alone or its environment is wrong.
pub fn rank() -> Option<usize> {
    static RANK: OnceLock<Option<usize>> = OnceLock::new();
    *RANK.get_or_init(|| here().ok().flatten().filter(|place| place.size > 1).map(|place| place.rank))
}

type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Place {
    fn from(variable: Variables) -> Result<Option<Self>> {
        // torchrun, `lvdm … --nproc`, and clusters that set the same by hand
        if variable("RANK").is_some() && variable("WORLD_SIZE").is_some() {
            let number = |name| number(variable, name);
            let (rank, size) = (number("RANK")?, number("WORLD_SIZE")?);
            let local_rank = if variable("LOCAL_RANK").is_some() { number("LOCAL_RANK")? } else { rank };
            let agent = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
            return Self {
                rank,
                size,
                local_rank,
                host: variable("MASTER_ADDR").context("RANK is set, and MASTER_ADDR is not")?,
                port: port(number("MASTER_PORT")?)?,
                serves: rank == 0 && !agent,
            }
            .checked()
            .map(Some);
        }
        // srun; in a batch script outside of it the number of the step's tasks is not set
        let tasks = variable("SLURM_STEP_NUM_TASKS").and_then(|tasks| tasks.parse::<usize>().ok());
        if let (Some(size @ 2..), Some(_)) = (tasks, variable("SLURM_PROCID")) {
            let rank = number(variable, "SLURM_PROCID")?;
            let nodes = variable("SLURM_STEP_NODELIST").or_else(|| variable("SLURM_JOB_NODELIST"));
            let host = match variable("MASTER_ADDR") {
                Some(host) => host,
                None => first_host(&nodes.context("neither MASTER_ADDR nor SLURM_STEP_NODELIST is set")?)?,
            };
            let port = match variable("MASTER_PORT") {
                Some(_) => port(number(variable, "MASTER_PORT")?)?,
                // the same on all nodes, another one for each step of each job
                None => {
                    let id = |name| variable(name).and_then(|id| id.parse::<u64>().ok()).unwrap_or(0);
                    20_000 + ((id("SLURM_JOB_ID") * 31 + id("SLURM_STEP_ID")) % 10_000) as u16
                }
            };
            let local_rank = number(variable, "SLURM_LOCALID")?;
            return Self { rank, size, local_rank, host, port, serves: rank == 0 }.checked().map(Some);
        }
        Ok(None)
    }

    /// What the environment of a process says that has this place, where another one serves the store.
    pub(super) fn variables(&self) -> [(&'static str, String); 6] {
        [
            ("RANK", self.rank.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("WORLD_SIZE", self.size.to_string()),
            ("MASTER_ADDR", self.host.clone()),
            ("MASTER_PORT", self.port.to_string()),
            ("TORCHELASTIC_USE_AGENT_STORE", "True".to_string()),
        ]
    }

    fn checked(self) -> Result<Self> {
        ensure!(self.rank < self.size, "rank {} of {} ranks: they are counted from 0", self.rank, self.size);
        Ok(self)
    }
}

fn number(variable: Variables, name: &str) -> Result<usize> {
    let text = variable(name).with_context(|| format!("the environment sets a rank, but not {name}"))?;
    text.parse().with_context(|| format!("{name} is `{text}`, which is not a number"))
}

fn port(number: usize) -> Result<u16> {
    u16::try_from(number).with_context(|| format!("MASTER_PORT is {number}, which is not a port"))
}

/// The first of SLURM's hosts: `a[03-05,9],b` → `a03`.
fn first_host(list: &str) -> Result<String> {
    let end = list.find(['[', ',']).unwrap_or(list.len());
    let name = &list[..end];
    if !list[end..].starts_with('[') {
        return Ok(name.to_string());
    }
    let inside = list[end + 1..].split(']').next().unwrap_or_default();
    let first = inside.split([',', '-']).next().unwrap_or_default();
    if first.is_empty() {
        bail!("SLURM's list of hosts `{list}` cannot be read; set MASTER_ADDR");
    }
    let behind = list[end..].split_once(']').map_or("", |(_, rest)| rest.split(',').next().unwrap_or_default());
    Ok(format!("{name}{first}{behind}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn place(variables: &[(&str, &str)]) -> Result<Option<Place>> {
        let known: BTreeMap<&str, &str> = variables.iter().copied().collect();
        Place::from(&|name| known.get(name).map(|value| value.to_string()))
    }

    #[test]
    fn alone_without_variables() {
        assert_eq!(place(&[]).unwrap(), None);
        // a batch script, outside of srun
        assert_eq!(place(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "0")]).unwrap(), None);
        // one task
        assert_eq!(place(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")]).unwrap(), None);
    }

    #[test]
    fn torchrun() {
        let base = [
            ("RANK", "9"),
            ("LOCAL_RANK", "1"),
            ("WORLD_SIZE", "16"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "29500"),
        ];
        let found = place(&base).unwrap().unwrap();
        assert_eq!((found.rank, found.local_rank, found.size), (9, 1, 16));
        assert_eq!((found.host.as_str(), found.port, found.serves), ("node0", 29500, false));
        let first = |more: &[(&'static str, &'static str)]| {
            let mut list: Vec<_> = base.iter().copied().filter(|(name, _)| *name != "RANK").collect();
            list.push(("RANK", "0"));
            list.extend(more);
            place(&list).unwrap().unwrap()
        };
        assert!(first(&[]).serves);
        assert!(!first(&[("TORCHELASTIC_USE_AGENT_STORE", "True")]).serves);
        for (name, value, word) in [
            ("WORLD_SIZE", "9", "rank 9 of 9"),
            ("MASTER_PORT", "99999", "MASTER_PORT"),
            ("LOCAL_RANK", "x", "LOCAL_RANK"),
        ] {
            let mut wrong: Vec<_> = base.iter().copied().filter(|(other, _)| *other != name).collect();
            wrong.push((name, value));
            let error = format!("{:#}", place(&wrong).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
        assert!(format!("{:#}", place(&base[..3]).unwrap_err()).contains("MASTER_ADDR"));
    }

    #[test]
    fn slurm() {
        let found = place(&[
            ("SLURM_PROCID", "5"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NUM_TASKS", "8"),
            ("SLURM_STEP_NODELIST", "gpu[07-08]"),
            ("SLURM_JOB_ID", "4242"),
            ("SLURM_STEP_ID", "0"),
        ])
        .unwrap()
        .unwrap();
        assert_eq!((found.rank, found.local_rank, found.size, found.serves), (5, 1, 8, false));
        assert_eq!((found.host.as_str(), found.port), ("gpu07", 20_000 + (4242 * 31 % 10_000) as u16));
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in [
            ("one", "one"),
            ("one,two", "one"),
            ("a[03-05,9],b", "a03"),
            ("a[9],b", "a9"),
            ("rack1-[001,003]-ib,x", "rack1-001-ib"),
        ] {
            assert_eq!(first_host(list).unwrap(), host);
        }
        assert!(first_host("a[").is_err());
    }
}
