//! What ranks do together: sums, exchanges, checks, and the end of the common work.

use std::{cell::Cell, rc::Rc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::{
    BucketSizes, Place,
    rendezvous::{self, Arrival, Rendezvous},
    watch::Watch,
};
use crate::torch::{GradientBuckets, Listener, ProcessGroup, Reduced, Store, checksums};

/// What sums the gradients that lie on GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Backend {
    /// Directly from GPU to GPU
    #[default]
    Nccl,
    /// Through the memory of the hosts: slower, and works wherever the processes reach each other over a network
    Gloo,
}

/// This process among those that share the work. Where it works alone, the calls do nothing. Clones are the same rank.
#[derive(Clone)]
pub struct Ranks {
    inner: Option<Rc<Inner>>,
}

struct Inner {
    place: Place,
    group: ProcessGroup,
    store: Store,
    watch: Watch,
    /// Those that suit the backend which sums the gradients.
    bucket_sizes: Cell<BucketSizes>,
    /// The last reduction of gradients.
    reduced: Cell<Reduced>,
    timeout: Duration,
    /// How often the ranks met.
    meetings: Cell<u64>,
}

/// Between two looks at the store whether a rank has come.
const POLL: Duration = Duration::from_millis(5);

impl Ranks {
    /// No other process.
    pub fn alone() -> Self {
        Ranks { inner: None }
    }

    /// Waits for all the others. A rank that is silent, or late for a call, for `timeout` is given up. If this rank has no
    /// `device`, the others learn of it.
    ///
    /// # Errors
    /// Nobody who serves the store, ranks that do not come, that cannot take part or that share a GPU.
    pub(super) fn join(place: Place, device: Result<Device>, timeout: Duration) -> Result<(Self, Device)> {
        let Place { rank, size, .. } = place;
        let foreign = rendezvous::foreign(&place);
        let mut watch = Watch::new(rank, size, timeout, foreign)?;
        let interface = std::env::var("GLOO_SOCKET_IFNAME").ok().filter(|name| !name.is_empty());
        let named = interface.as_ref().map(|name| {
            Listener::on(name).with_context(|| format!("GLOO_SOCKET_IFNAME is `{name}`, where nothing can listen"))
        });
        let (named, device) = match named.transpose() {
            Ok(named) => (named, device),
            Err(error) => (None, Err(error)),
        };
        let store = rendezvous::reach(&place, timeout, &watch)?;
        let rendezvous = Rendezvous::hold(&place, &store, Arrival::new(&place, &device), timeout, &watch)?;
        let device = device?;
        let (listener, listens) = match (named, interface) {
            (Some(listener), Some(interface)) => (listener, interface),
            _ => (Listener::at(rendezvous.address)?, rendezvous.address.to_string()),
        };
        if rank == 0 {
            tracing::info!("{}; Gloo on {listens}", rendezvous.words());
        }
        let store = store.under(&rendezvous.prefix)?;
        // a connection of its own: the other one may be waiting for a key
        let theirs = if place.serves { "127.0.0.1" } else { &place.host };
        watch.begin(&Store::join(theirs, place.port, timeout)?, &rendezvous.prefix)?;
        let group = ProcessGroup::open(&store, listener, rank, size, timeout).with_context(|| {
            format!(
                "rank {rank} of {size}: all ranks are there, and not all reach each other: {}; Gloo listens on {listens} \
                 here, and GLOO_SOCKET_IFNAME names another network interface",
                watch.blame()
            )
        })?;
        let (bucket_sizes, reduced, meetings) = (Cell::new(BucketSizes::GLOO), Cell::default(), Cell::new(0));
        let inner = Inner { place, group, store, watch, bucket_sizes, reduced, timeout, meetings };
        Ok((Ranks { inner: Some(Rc::new(inner)) }, device))
    }

    /// Gradients will lie on this device: those of a GPU are summed by `backend`. What ranks exchange besides stays on
    /// the host.
    ///
    /// # Errors
    /// For NCCL: a build without it; a GPU that it cannot use.
    pub fn train_on(&self, device: Device, backend: Backend) -> Result<()> {
        let (Some(inner), Device::Cuda(index)) = (&self.inner, device) else { return Ok(()) };
        Self::call(inner, |group| match backend {
            Backend::Nccl => {
                inner.bucket_sizes.set(BucketSizes::NCCL);
                group
                    .add_gpu(&inner.store, inner.place.rank, index, inner.timeout)
                    .context("NCCL sums the gradients of several GPUs (--backend gloo does it without, and slowly)")
            }
            Backend::Gloo => {
                group.sum_gpu_by_host();
                Ok(())
            }
        })
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.inner.as_ref().map_or(0, |inner| inner.place.rank)
    }

    /// How many processes there are; 1 where it is alone.
    pub fn size(&self) -> usize {
        self.inner.as_ref().map_or(1, |inner| inner.place.size)
    }

    /// Whether this process writes what the run keeps.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// The training stands at this step: errors of this rank and of others will say so.
    pub fn at_step(&self, step: i64) {
        if let Some(inner) = &self.inner {
            inner.watch.at_step(step);
        }
    }

    /// One call to all ranks.
    fn call<T>(inner: &Inner, body: impl FnOnce(&ProcessGroup) -> Result<T>) -> Result<T> {
        inner.watch.call();
        let result = body(&inner.group);
        inner.watch.call();
        result
    }

    /// Each number summed over all ranks.
    ///
    /// # Errors
    /// A rank that is gone or late.
    pub fn sum(&self, values: &[f64]) -> Result<Vec<f64>> {
        let Some(inner) = &self.inner else { return Ok(values.to_vec()) };
        let mut tensor = Tensor::from_slice(values);
        Self::call(inner, |group| group.sum(&mut tensor))?;
        Ok(Vec::try_from(tensor)?)
    }

    /// The mean over all ranks of a tensor of one shape on all of them. A GPU's is queued, not waited for.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn mean(&self, values: &Tensor) -> Result<Tensor> {
        let Some(inner) = &self.inner else { return Ok(values.shallow_clone()) };
        let mut sum = values.copy();
        Self::call(inner, |group| group.sum(&mut sum))?;
        Ok(sum / self.size() as f64)
    }

    /// The number that rank 0 has.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn of_first(&self, value: i64) -> Result<i64> {
        let mut tensor = Tensor::from_slice(&[value]);
        self.broadcast(&mut tensor, 0)?;
        Ok(tensor.int64_value(&[0]))
    }

    /// The tensor, of one shape and type on all ranks, becomes that of rank `root`. A GPU's is queued, not waited for.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        let Some(inner) = &self.inner else { return Ok(()) };
        Self::call(inner, |group| group.broadcast(tensor, root))
    }

    /// Waits until what is queued on a GPU for all ranks is done: the host may then read it and waits for no rank in the
    /// driver.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn settle(&self) -> Result<()> {
        let Some(inner) = &self.inner else { return Ok(()) };
        Self::call(inner, ProcessGroup::settle)
    }

    /// Waits for all ranks, however long what they still do takes: at the store, in no call that would be given up. Where
    /// one is gone or has failed, this process ends and says so.
    ///
    /// # Errors
    /// A store that does not answer.
    pub fn meet(&self) -> Result<()> {
        let Some(inner) = &self.inner else { return Ok(()) };
        let Inner { place, store, watch, meetings, .. } = &**inner;
        meetings.set(meetings.get() + 1);
        let key = |rank: usize| format!("meeting/{}/{rank}", meetings.get());
        let lost = || watch.blame();
        store.set(&key(place.rank), b"here").with_context(lost)?;
        for rank in 0..place.size {
            while !store.has(&key(rank)).with_context(lost)? {
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    /// What rank 0 alone does, for which the others wait as in [`Self::meet`].
    ///
    /// # Errors
    /// Those of `body`, on rank 0; as [`Self::meet`].
    pub fn on_first(&self, body: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.is_first() {
            body()?;
        }
        self.meet()
    }

    /// Σ over ranks of a tensor of one shape on all of them, in the graph.
    ///
    /// # Panics
    /// Where a rank is gone or late, as ordinary `tch` calls do.
    pub fn sum_with_gradient(&self, x: &Tensor) -> Tensor {
        match &self.inner {
            None => x.shallow_clone(),
            Some(inner) => {
                inner.watch.call();
                let y = inner.group.sum_with_gradient(x);
                inner.watch.call();
                y
            }
        }
    }

    /// Gradients of these parameters, to be reduced to their means as numbers of this kind; none where this process is alone.
    ///
    /// # Errors
    /// LibTorch's own.
    pub fn buckets(&self, parameters: &[Tensor], kind: Kind) -> Result<Option<GradientBuckets>> {
        let Some(inner) = &self.inner else { return Ok(None) };
        self.buckets_of(parameters, kind, inner.bucket_sizes.get())
    }

    /// As [`Self::buckets`], of these sizes.
    ///
    /// # Errors
    /// As [`Self::buckets`].
    pub fn buckets_of(&self, parameters: &[Tensor], kind: Kind, sizes: BucketSizes) -> Result<Option<GradientBuckets>> {
        let Some(inner) = &self.inner else { return Ok(None) };
        let bytes = |parameter: &Tensor| (parameter.numel() * kind.elt_size_in_bytes()) as i64;
        let counts = sizes.counts(&parameters.iter().map(bytes).collect::<Vec<_>>());
        GradientBuckets::new(&inner.group, parameters, &counts, kind).map(Some)
    }

    /// Waits until the gradients are means over all ranks.
    ///
    /// # Errors
    /// As [`Self::sum`].
    pub fn finish(&self, buckets: &GradientBuckets) -> Result<()> {
        let Some(inner) = &self.inner else { return Ok(()) };
        inner.reduced.set(Self::call(inner, |_| buckets.finish())?);
        Ok(())
    }

    /// What the last reduction of gradients was.
    pub fn reduced(&self) -> Option<Reduced> {
        self.inner.as_ref().map(|inner| inner.reduced.get())
    }

    /// Checks that all ranks hold the same tensors, by a checksum of each.
    ///
    /// # Errors
    /// Names the first tensor that differs, and the ranks that differ from rank 0. As [`Self::sum`].
    pub fn ensure_same(&self, when: &str, tensors: &[(String, Tensor)]) -> Result<()> {
        let Some(inner) = &self.inner else { return Ok(()) };
        // before the hashes wait in the driver for whatever it still does
        self.settle()?;
        let mut hashes = vec![tensors.len() as i64];
        hashes.extend(checksums(tensors.iter().map(|(_, tensor)| tensor))?);
        let counts = Self::call(inner, |group| group.gather(&Tensor::from_slice(&hashes[..1])))?;
        let counts: Vec<i64> = counts.iter().map(|count| count.int64_value(&[0])).collect();
        ensure!(counts.iter().all(|&count| count == counts[0]), "{when}: the ranks hold {counts:?} tensors");
        let all = Self::call(inner, |group| group.gather(&Tensor::from_slice(&hashes)))?;
        let all: Vec<Vec<i64>> = all.into_iter().map(Vec::try_from).collect::<Result<_, _>>()?;
        for (i, (name, _)) in tensors.iter().enumerate() {
            let others: Vec<String> = (1..all.len())
                .filter(|&rank| all[rank][i + 1] != all[0][i + 1])
                .map(|rank| format!("rank {rank}"))
                .collect();
            if !others.is_empty() {
                bail!(
                    "{when}: the ranks' weights differ; the first tensor that does is `{name}`, on {}",
                    others.join(", ")
                );
            }
        }
        Ok(())
    }

    /// `make(0)`, …, `make(count − 1)`, each made by one rank, all known to all: the same on any number of ranks as
    /// long as what is made depends on its number alone.
    ///
    /// # Errors
    /// Those of `make`; as [`Self::sum`].
    pub fn share(&self, count: usize, mut make: impl FnMut(usize) -> Result<Tensor>) -> Result<Vec<Tensor>> {
        let size = self.size();
        let mut all = Vec::with_capacity(count);
        for first in (0..count).step_by(size) {
            let own = first + self.rank();
            let mine = if own < count { Some(make(own)?.to_device(Device::Cpu).contiguous()) } else { None };
            self.meet()?; // a piece takes as long as it takes
            for rank in 0..size.min(count - first) {
                all.push(self.from(rank, mine.as_ref())?);
            }
        }
        Ok(all)
    }

    /// Each rank's tensors, in the order of ranks, on rank 0, which alone waits for them; the others get nothing. They
    /// may be of any number and shape.
    ///
    /// # Errors
    /// A type that is not sent; as [`Self::sum`].
    pub fn gather(&self, mine: &[Tensor]) -> Result<Vec<Vec<Tensor>>> {
        let Some(inner) = &self.inner else { return Ok(vec![mine.iter().map(Tensor::shallow_clone).collect()]) };
        let bytes = packed(mine)?;
        let lengths = Self::call(inner, |group| group.gather(&Tensor::from_slice(&[bytes.len() as i64])))?;
        let lengths: Vec<i64> = lengths.iter().map(|length| length.int64_value(&[0])).collect();
        let longest = lengths.iter().max().copied().unwrap_or(0);
        let own = Tensor::from_slice(&bytes).constant_pad_nd([0, longest - bytes.len() as i64]);
        let all = Self::call(inner, |group| group.gather_to(&own, 0, self.is_first()))?;
        all.iter().zip(lengths).map(|(bytes, length)| unpacked(&Vec::try_from(bytes.narrow(0, 0, length))?)).collect()
    }

    /// `make(0)`, …, `make(count − 1)`, each made by one rank, go to `take` on rank 0, in their order and as they come.
    /// Made and taken is the same on any number of ranks as long as what is made depends on its number alone.
    ///
    /// # Errors
    /// Those of `make` and `take`; as [`Self::gather`].
    pub fn collect(
        &self,
        count: usize,
        mut make: impl FnMut(usize) -> Result<Vec<Tensor>>,
        mut take: impl FnMut(usize, Vec<Tensor>) -> Result<()>,
    ) -> Result<()> {
        for first in (0..count).step_by(self.size()) {
            let own = first + self.rank();
            let mine = if own < count { make(own)? } else { Vec::new() };
            self.meet()?; // as in `share`
            for (i, made) in (first..count).zip(self.gather(&mine)?) {
                take(i, made)?;
            }
        }
        Ok(())
    }

    /// The host tensor that one rank has.
    fn from(&self, root: usize, tensor: Option<&Tensor>) -> Result<Tensor> {
        let own = || tensor.context("this rank has made nothing");
        if self.inner.is_none() {
            return Ok(own()?.shallow_clone());
        }
        // type, number of axes, axes
        let mut head = [0i64; 10];
        if root == self.rank() {
            let tensor = own()?;
            let kind = KINDS.iter().position(|&kind| kind == tensor.kind());
            head[0] = kind.with_context(|| format!("type {:?} is not sent", tensor.kind()))? as i64;
            head[1] = tensor.dim() as i64;
            head[2..2 + tensor.dim()].copy_from_slice(&tensor.size());
        }
        let mut head = Tensor::from_slice(&head);
        self.broadcast(&mut head, root)?;
        let head: Vec<i64> = Vec::try_from(head)?;
        let mut tensor = if root == self.rank() {
            own()?.shallow_clone()
        } else {
            Tensor::zeros(&head[2..2 + head[1] as usize], (KINDS[head[0] as usize], Device::Cpu))
        };
        self.broadcast(&mut tensor, root)?;
        Ok(tensor)
    }

    /// Ends the common work: an error that another rank caused names that rank and this rank's step; the others
    /// learn of one of this rank's own.
    pub(super) fn end<T>(&self, result: Result<T>) -> Result<T> {
        let Some(inner) = &self.inner else { return result };
        let Inner { place, group, watch, .. } = &**inner;
        // who serves the store
        let leave_last = |patience| {
            if place.serves {
                watch.wait_for_ends(patience);
            }
        };
        let result = result.and_then(|value| self.meet().map(|()| value));
        let who = match watch.step() {
            step if step < 0 => format!("rank {}", place.rank),
            step => format!("rank {}, step {step}", place.rank),
        };
        match result {
            Ok(value) => {
                watch.done();
                leave_last(Duration::from_secs(10));
                Ok(value)
            }
            Err(error) if group.has_failed() => {
                // first, lest NCCL's watchdog end the process before it has said who is to blame
                group.abort();
                let blame = watch.blame();
                Err(error.context(format!("{who}: {blame}")))
            }
            Err(error) => {
                watch.failed(&format!("{error:#}"));
                // sums that the others will never answer must not be waited for
                group.abort();
                leave_last(Duration::from_secs(5));
                Err(error.context(who))
            }
        }
    }
}

/// What ranks send each other besides gradients.
const KINDS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Uint8, Kind::Int64];

/// Tensors as bytes: the length of the head, the head (types and shapes, as JSON), the values.
fn packed(tensors: &[Tensor]) -> Result<Vec<u8>> {
    let mut head: Vec<(usize, Vec<i64>)> = Vec::new();
    let mut values = Vec::new();
    for tensor in tensors {
        let kind = KINDS.iter().position(|&kind| kind == tensor.kind());
        head.push((kind.with_context(|| format!("type {:?} is not sent", tensor.kind()))?, tensor.size()));
        values.extend(bytes(tensor)?);
    }
    let head = serde_json::to_vec(&head)?;
    Ok([&(head.len() as u64).to_le_bytes()[..], &head, &values].concat())
}

fn unpacked(bytes: &[u8]) -> Result<Vec<Tensor>> {
    let cut = || bytes.split_first_chunk::<8>().context("a message of another rank is cut");
    let (length, rest) = cut()?;
    let (head, mut values) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let head: Vec<(usize, Vec<i64>)> = serde_json::from_slice(head).context("a message of another rank is damaged")?;
    let tensor = |(kind, shape): (usize, Vec<i64>)| {
        let kind = KINDS[kind];
        let (own, others) = values.split_at(shape.iter().product::<i64>() as usize * kind.elt_size_in_bytes());
        values = others;
        Ok(Tensor::f_from_data_size(own, &shape, kind)?)
    };
    head.into_iter().map(tensor).collect()
}

fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    let host = tensor.detach().to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0u8; host.numel() * host.kind().elt_size_in_bytes()];
    host.f_copy_data_u8(&mut bytes, host.numel())?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_calls_do_nothing() {
        let ranks = Ranks::alone();
        assert_eq!((ranks.rank(), ranks.size(), ranks.is_first()), (0, 1, true));
        assert_eq!(ranks.sum(&[1.5, f64::INFINITY]).unwrap(), [1.5, f64::INFINITY]);
        let made = ranks.share(3, |i| Ok(Tensor::from(i as i64))).unwrap();
        assert_eq!(made.iter().map(|t| t.int64_value(&[])).collect::<Vec<_>>(), [0, 1, 2]);
        ranks.ensure_same("at the start", &[]).unwrap();
        assert!(ranks.buckets(&[], Kind::Float).unwrap().is_none());
    }

    #[test]
    fn tensors_are_sent_as_they_are() {
        let sent = [
            Tensor::from_slice(&[1.5f32, f32::NAN, -0.0]).reshape([3, 1]),
            Tensor::from_slice(b"caption"),
            Tensor::from(7i64),
            Tensor::zeros([0, 5], (Kind::Double, Device::Cpu)),
        ];
        let came = unpacked(&packed(&sent).unwrap()).unwrap();
        for (sent, came) in sent.iter().zip(&came) {
            assert_eq!((sent.kind(), sent.size()), (came.kind(), came.size()));
            assert_eq!(bytes(sent).unwrap(), bytes(came).unwrap());
        }
        assert_eq!((came.len(), unpacked(&packed(&[]).unwrap()).unwrap().len()), (4, 0));
        assert!(unpacked(&[1, 2]).is_err() && packed(&[Tensor::from(true)]).is_err());
    }
}
