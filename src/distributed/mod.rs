//! Several processes, one a GPU (or a share of the CPU), that do one piece of work: ranks.
//!
//! Who they are comes from `--nproc`, from torchrun's environment or from SLURM's ([`run`]). What they share
//! goes through [`Ranks`]; a process that works alone has one too, and its calls then do nothing.

mod launch;
mod meeting;
mod place;
mod ranks;
mod stop;
mod watch;

pub use launch::{Backend, Launch, run};
pub use place::{Place, here, rank, ranks_here};
pub use ranks::Ranks;
pub use stop::{Catching, OnSignal, Stopped, ask_to_stop, catch_signals, stop_is_asked};
