//! Several processes, called ranks, that share one piece of work. Each has a GPU, or a part of the CPU.
//!
//! `--nproc`, or the environment of torchrun, SLURM or MPI, says how many there are and which one this is ([`run`]). They
//! exchange tensors through [`Ranks`]. A process that works alone has a `Ranks` too, whose calls then do nothing.

mod buckets;
mod keys;
mod launch;
mod place;
mod ranks;
mod rendezvous;
mod shards;
mod stop;
mod watch;

pub use buckets::BucketSizes;
pub use launch::{Launch, run};
pub use place::{Place, here, rank, ranks_here};
pub use ranks::{Backend, Ranks};
pub use shards::{Shards, owners};
pub use stop::{Catching, OnSignal, Stopped, ask_to_stop, catch_signals, stop_is_asked};
