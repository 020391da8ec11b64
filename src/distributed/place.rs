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
        if let Some((rank, size)) = pair(variable, "RANK", "WORLD_SIZE")? {
            let local_rank = if variable("LOCAL_RANK").is_some() { number(variable, "LOCAL_RANK")? } else { rank };
            let agent = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
            return Self {
                rank,
                size,
                local_rank,
                host: variable("MASTER_ADDR").context("RANK is set, and MASTER_ADDR is not")?,
                port: port(number(variable, "MASTER_PORT")?)?,
                serves: rank == 0 && !agent,
            }
            .checked()
            .map(Some);
        }
        // MPI's launchers before SLURM: within a job they start one helper on each machine by srun, whose variables
        // their ranks inherit
        let open_mpi = pair(variable, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?;
        if let Some((rank, size @ 2..)) = open_mpi {
            let [local, here] = ["OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"];
            return Self::of_mpi(variable, rank, size, local, here).map(Some);
        }
        let tasks = variable("SLURM_STEP_NUM_TASKS");
        let mpich = pair(variable, "PMI_RANK", "PMI_SIZE")?;
        // srun may set MPICH's variables too
        if let Some((rank, size @ 2..)) = mpich
            && tasks.as_deref() != Some(&size.to_string())
        {
            return Self::of_mpi(variable, rank, size, "MPI_LOCALRANKID", "MPI_LOCALNRANKS").map(Some);
        }
        Self::of_slurm(variable)
    }

    /// As mpirun says. Where the ranks meet it does not say: on this machine, if all of them are here.
    fn of_mpi(variable: Variables, rank: usize, size: usize, local_rank: &str, local_size: &str) -> Result<Self> {
        let all_here = variable(local_size).is_some_and(|here| here == size.to_string());
        let host = match variable("MASTER_ADDR") {
            Some(host) => host,
            None if all_here => "127.0.0.1".into(),
            None => bail!(
                "mpirun has started {size} ranks, not all on one machine: set MASTER_ADDR to the host name of rank 0's \
                 machine, for all of them (mpirun -x MASTER_ADDR=… or -genv MASTER_ADDR …)"
            ),
        };
        let port = match variable("MASTER_PORT") {
            Some(_) => port(number(variable, "MASTER_PORT")?)?,
            // the same for all ranks, another one for each mpirun
            None => {
                let job = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID"].into_iter().find_map(variable);
                job.map_or(29_500, |job| {
                    any_port(job.bytes().fold(0u64, |id, byte| id.wrapping_mul(31).wrapping_add(u64::from(byte))))
                })
            }
        };
        let local_rank = match variable(local_rank) {
            Some(_) => number(variable, local_rank)?,
            None if all_here => rank,
            None => {
                bail!("mpirun has started {size} ranks, and {local_rank}, a rank's number on its machine, is not set")
            }
        };
        Self { rank, size, local_rank, host, port, serves: rank == 0 }.checked()
    }

    /// As srun says.
    fn of_slurm(variable: Variables) -> Result<Option<Self>> {
        if variable("SLURM_PROCID").is_none() {
            return Ok(None);
        }
        let rank = number(variable, "SLURM_PROCID")?;
        if variable("SLURM_STEP_NUM_TASKS").is_none() {
            // A batch script, outside of srun, is one process. What srun has started is one of as many as there are tasks.
            let in_step = variable("SLURM_STEP_ID").is_some_and(|step| step != BATCH_STEP);
            let tasks = if variable("SLURM_NTASKS").is_some() { number(variable, "SLURM_NTASKS")? } else { 1 };
            ensure!(
                rank == 0 && !(in_step && tasks > 1),
                "SLURM has started several tasks of this command (this is task {rank}), but SLURM_STEP_NUM_TASKS, their \
                 number, is not set: start them by srun, which sets it, and keep its variables"
            );
            return Ok(None);
        }
        let size = number(variable, "SLURM_STEP_NUM_TASKS")?;
        if size < 2 {
            return Ok(None);
        }
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
                any_port(id("SLURM_JOB_ID") * 31 + id("SLURM_STEP_ID"))
            }
        };
        let local_rank = number(variable, "SLURM_LOCALID")?;
        Self { rank, size, local_rank, host, port, serves: rank == 0 }.checked().map(Some)
    }

    /// What the environment of a process says that has this place among ranks of one machine, where another one serves the
    /// store.
    pub(super) fn variables(&self) -> [(&'static str, String); 7] {
        [
            (RANKS_HERE, self.size.to_string()),
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

/// How many ranks torchrun, or `--nproc`, has started on this machine. srun and mpirun give each rank CPUs of its own.
const RANKS_HERE: &str = "LOCAL_WORLD_SIZE";

/// The ranks that share this process's CPUs, itself among them.
pub fn ranks_here() -> usize {
    std::env::var(RANKS_HERE).ok().and_then(|count| count.parse().ok()).unwrap_or(1).max(1)
}

/// What SLURM calls the step of a batch script.
const BATCH_STEP: &str = "4294967291";

/// A rank and the number of ranks: both, or none.
///
/// # Errors
/// One without the other: a process that took itself for the only one would do the work beside others.
fn pair(variable: Variables, rank: &str, size: &str) -> Result<Option<(usize, usize)>> {
    match (variable(rank), variable(size)) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Ok(Some((number(variable, rank)?, number(variable, size)?))),
        (Some(value), None) => bail!("{rank} is set ({value}), and {size} is not: set both, or none to work alone"),
        (None, Some(value)) => bail!("{size} is set ({value}), and {rank} is not: set both, or none to work alone"),
    }
}

/// A port that follows from what all ranks know of their job.
fn any_port(id: u64) -> u16 {
    20_000 + (id % 10_000) as u16
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
        let script = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "0")];
        assert_eq!(place(&script).unwrap(), None);
        assert_eq!(place(&[&script[..], &[("SLURM_STEP_ID", BATCH_STEP)]].concat()).unwrap(), None);
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

    /// One of several processes that takes itself for the only one trains in the folder of the others.
    #[test]
    fn a_half_set_environment_is_an_error() {
        for (variables, words) in [
            (&[("RANK", "1")][..], ["RANK is set (1)", "WORLD_SIZE is not"]),
            (
                &[("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "a")],
                ["WORLD_SIZE is set (2)", "RANK is not"],
            ),
            (&[("OMPI_COMM_WORLD_SIZE", "2")], ["OMPI_COMM_WORLD_SIZE is set", "OMPI_COMM_WORLD_RANK is not"]),
            (&[("PMI_RANK", "0")], ["PMI_RANK is set", "PMI_SIZE is not"]),
            (&[("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2")], ["task 1", "SLURM_STEP_NUM_TASKS"]),
            (
                &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("SLURM_STEP_ID", "0")],
                ["several tasks", "SLURM_STEP_NUM_TASKS"],
            ),
            (&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "two")], ["SLURM_STEP_NUM_TASKS", "not a number"]),
            (&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "4")], ["4 ranks", "MASTER_ADDR"]),
            (
                &[("PMI_RANK", "0"), ("PMI_SIZE", "4"), ("MASTER_ADDR", "node0")],
                ["MPI_LOCALRANKID", "number on its machine"],
            ),
        ] {
            let error = format!("{:#}", place(variables).unwrap_err());
            assert!(words.iter().all(|word| error.contains(word)), "{variables:?}: {error}");
        }
    }

    #[test]
    fn mpirun() {
        let on = |here: &'static str, more: &[(&'static str, &'static str)]| {
            let base = [
                ("OMPI_COMM_WORLD_RANK", "3"),
                ("OMPI_COMM_WORLD_SIZE", "4"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", here),
                // of the helper that srun started on this machine
                ("SLURM_PROCID", "1"),
                ("SLURM_STEP_NUM_TASKS", "2"),
            ];
            place(&[&base[..], more].concat()).map(Option::unwrap)
        };
        let found = on("4", &[]).unwrap();
        assert_eq!((found.rank, found.local_rank, found.size, found.serves), (3, 1, 4, false));
        assert_eq!((found.host.as_str(), found.port), ("127.0.0.1", 29_500));
        let [one, other] =
            ["prterun-a-1@1", "prterun-a-2@1"].map(|job| on("4", &[("PMIX_NAMESPACE", job)]).unwrap().port);
        assert!(one != other && (20_000..30_000).contains(&one), "{one} and {other}");
        assert!(on("2", &[]).is_err());
        let found = on("2", &[("MASTER_ADDR", "node0"), ("MASTER_PORT", "4321")]).unwrap();
        assert_eq!((found.host.as_str(), found.port), ("node0", 4321));
        // MPICH's and Intel's
        let base = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "0"), ("MPI_LOCALNRANKS", "2")];
        let found = place(&base).unwrap().unwrap();
        assert_eq!((found.rank, found.size, found.host.as_str(), found.serves), (0, 2, "127.0.0.1", true));
        // mpirun -np 1
        assert_eq!(place(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]).unwrap(), None);
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
        let with_pmi = place(&[
            ("SLURM_PROCID", "0"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_STEP_NODELIST", "gpu07"),
            ("PMI_RANK", "0"),
            ("PMI_SIZE", "2"),
        ]);
        assert_eq!(with_pmi.unwrap().unwrap().host, "gpu07");
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
