//! How many threads compute, and how they wait for each other.

use std::{env, ffi::OsString, os::unix::process::CommandExt, process::Command, thread::available_parallelism};

/// Says how many threads compute; what it says stays.
const NUMBER: &str = "OMP_NUM_THREADS";
/// Says whether a thread that waits keeps its core; what it says stays.
const POLICY: &str = "OMP_WAIT_POLICY";
/// How often a thread that waits looks before it sleeps; what it says stays.
const LOOKS: &str = "GOMP_SPINCOUNT";
/// Beside two busy loops on two cores a training step takes 2.4 times what it takes alone with so many looks, 3.8 times
/// with GNU OpenMP's own number, some 300,000; alone the two differ by what one measurement differs from the next. Sleeping
/// at once costs more than a third alone. (experiments/bench/README.md)
const FEW: &str = "5000";

/// The CPUs that this process may use: of those of the machine, by its affinity and its cgroup's quota.
pub fn cpus() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// From now on LibTorch computes with one thread a CPU that this process may use, where the environment does not say
/// OMP_NUM_THREADS. By itself it looks at the affinity alone, and starts 64 threads in a container with 2 of 64 CPUs.
pub fn use_available_cpus() {
    if !is_set(NUMBER) {
        tch::set_num_threads(cpus().try_into().unwrap_or(1));
    }
}

/// Makes threads that wait for others give way soon to whoever wants their core, where the environment says nothing else:
/// beside other work they would hold for milliseconds at a time the very cores that the others wait for. LibTorch's OpenMP
/// runtime reads this when it is loaded, before any code of the program; so the program is started anew in its place, by
/// the same command line in the same process, with GOMP_SPINCOUNT set. With one thread nothing waits.
///
/// Returns where there is nothing to do, or the program cannot be started anew.
pub fn give_way_while_waiting() {
    let number = env::var(NUMBER).ok().and_then(|number| number.trim().parse().ok()).unwrap_or_else(cpus);
    if number <= 1 || is_set(POLICY) || is_set(LOOKS) {
        return;
    }
    let Ok(program) = env::current_exe() else { return };
    let mut arguments = env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from(&program));
    let error = Command::new(&program).arg0(name).args(arguments).env(LOOKS, FEW).exec();
    tracing::warn!("{} cannot be started anew ({error}): threads that wait keep their cores", program.display());
}

/// How threads wait, for people.
pub fn waiting() -> String {
    match [POLICY, LOOKS].into_iter().find(|name| is_set(name)) {
        Some(name) => format!("idle threads wait as {name}={} says", env::var_os(name).unwrap_or_default().display()),
        None => "idle threads wait as OpenMP does by default".to_string(),
    }
}

fn is_set(name: &str) -> bool {
    env::var_os(name).is_some_and(|value| !value.is_empty())
}
