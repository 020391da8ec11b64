//! The parameters and buffers of a network, by name, in the order in which they were declared.

use std::{cell::RefCell, collections::BTreeMap, fmt::Display, rc::Rc};

use anyhow::{Result, bail};
use rand::RngExt;
use rand_distr::{Distribution, StandardNormal};
use tch::{Device, Kind, Tensor, no_grad};

use super::{Adapter, channels_last};
use crate::{
    random::{Purpose, stream},
    torch::{upload_all, without_memory},
};

/// How a parameter starts.
#[derive(Debug, Clone, Copy)]
pub enum Init {
    /// Everywhere the same.
    Constant(f64),
    /// Uniform in ±bound.
    Uniform(f64),
    /// Normal with this mean and standard deviation.
    Normal(f64, f64),
}

impl Init {
    /// All zero.
    pub const ZEROS: Init = Init::Constant(0.0);
    /// All one.
    pub const ONES: Init = Init::Constant(1.0);

    /// PyTorch's default for convolutions and linear layers, weight and bias: uniform in ±1/√fan_in.
    pub fn fan_in(fan_in: i64) -> Init {
        Init::Uniform(1.0 / (fan_in as f64).sqrt())
    }

    /// Uniform with the variance 2 / (inputs + outputs) (Glorot & Bengio 2010).
    pub fn xavier(inputs: i64, outputs: i64) -> Init {
        Init::Uniform((6.0 / (inputs + outputs) as f64).sqrt())
    }
}

/// One tensor of a network.
pub struct Entry {
    /// The name in a checkpoint: the released LVDM's own, without its prefix.
    pub name: String,
    /// A second name under which released checkpoints list the same tensor.
    pub alias: Option<String>,
    /// Its values.
    pub tensor: Tensor,
    /// False for buffers (running statistics).
    pub trainable: bool,
    /// Whether training moves it without a gradient (running statistics, a codebook).
    moves: bool,
    /// What its values start as; none for values that are a fixed function of the settings.
    init: Option<Init>,
    /// A kernel `[o, i, f, h, w]` or `[o, i, h, w]` whose channels lie last in memory.
    channels_last: bool,
}

/// All tensors of a network. Cloning shares them.
#[derive(Clone)]
pub struct Parameters {
    entries: Rc<RefCell<Vec<Entry>>>,
    device: Device,
    seed: u64,
    unfilled: bool,
}

impl Parameters {
    /// An empty set; what is declared in it starts as a function of (seed, name) alone.
    pub fn new(device: Device, seed: u64) -> Self {
        Parameters { entries: Rc::default(), device, seed, unfilled: false }
    }

    /// A set whose tensors have shapes and no memory until [`Self::fill`] gives them values: so that a network that comes
    /// from a file is held once, and that one that would not fit can be counted and its names checked.
    pub fn unfilled(device: Device) -> Self {
        Parameters { unfilled: true, ..Parameters::new(device, 0) }
    }

    /// The place from which a network declares its parameters. They start on the host; when this scope and all below it
    /// are gone, they lie on the device.
    pub fn root(&self) -> Scope {
        let declared = Rc::new(Declared(self.clone()));
        Scope { parameters: self.clone(), prefix: String::new(), adapter: None, _declared: declared }
    }

    /// Moves to the device what is still on the host, keeping the identity of tensors for the layers that hold them.
    fn place(&self) {
        if self.unfilled {
            return;
        }
        let entries = self.entries.borrow();
        let (mut own, values): (Vec<Tensor>, Vec<Tensor>) = entries
            .iter()
            .filter(|entry| entry.tensor.device() != self.device)
            .map(|entry| (entry.tensor.shallow_clone(), entry.tensor.detach()))
            .unzip();
        let placed = upload_all(&values, self.device);
        no_grad(|| own.iter_mut().zip(placed).for_each(|(own, placed)| own.set_data(&placed)));
    }

    /// Where the parameters lie.
    pub fn device(&self) -> Device {
        self.device
    }

    /// (name, tensor) of all parameters and buffers, in order of declaration.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        self.entries.borrow().iter().map(|e| (e.name.clone(), e.tensor.shallow_clone())).collect()
    }

    /// (name, tensor) of what an optimizer moves, in order of declaration.
    pub fn trainable(&self) -> Vec<(String, Tensor)> {
        let entries = self.entries.borrow();
        entries.iter().filter(|e| e.trainable).map(|e| (e.name.clone(), e.tensor.shallow_clone())).collect()
    }

    /// What training moves without a gradient, in order of declaration.
    pub fn moving(&self) -> Vec<Tensor> {
        self.entries.borrow().iter().filter(|e| e.moves).map(|e| e.tensor.shallow_clone()).collect()
    }

    /// (alias, name) of tensors that released checkpoints list twice.
    pub fn aliases(&self) -> Vec<(String, String)> {
        let entries = self.entries.borrow();
        entries.iter().filter_map(|e| e.alias.clone().map(|alias| (alias, e.name.clone()))).collect()
    }

    /// Number of trainable numbers.
    pub fn count(&self) -> i64 {
        self.trainable().iter().map(|(_, t)| t.numel() as i64).sum()
    }

    /// Stops gradients for all of them (evaluation, frozen networks).
    pub fn freeze(&self) {
        for entry in self.entries.borrow_mut().iter_mut() {
            let _ = entry.tensor.requires_grad_(false);
            (entry.trainable, entry.moves) = (false, false);
        }
    }

    /// Freezes all but those that are chosen by name.
    pub fn train_only(&self, chosen: impl Fn(&str) -> bool) {
        for entry in self.entries.borrow_mut().iter_mut().filter(|e| e.trainable && !chosen(&e.name)) {
            let _ = entry.tensor.requires_grad_(false);
            entry.trainable = false;
        }
    }

    /// Switches gradients of what is trainable on or off.
    pub fn require_grad(&self, required: bool) {
        for entry in self.entries.borrow_mut().iter_mut().filter(|e| e.trainable) {
            let _ = entry.tensor.requires_grad_(required);
        }
    }

    /// Leaves all tensors their shapes and takes their memory away, for [`by_shapes`](crate::torch::by_shapes).
    pub fn forget_memory(&self) {
        for entry in self.entries.borrow().iter() {
            let mut shape = entry.tensor.size();
            if entry.channels_last {
                let channels = shape.remove(1);
                shape.push(channels);
            }
            let bare = without_memory(&shape, entry.tensor.kind());
            let bare = if entry.channels_last { bare.movedim_int(-1, 1) } else { bare };
            no_grad(|| entry.tensor.shallow_clone().set_data(&bare));
        }
    }

    /// Casts all floating-point tensors, keeping their identity for the layers that hold them.
    pub fn to_kind(&self, kind: Kind) {
        for entry in self.entries.borrow().iter() {
            if entry.tensor.is_floating_point() {
                let mut tensor = entry.tensor.shallow_clone();
                no_grad(|| tensor.set_data(&tensor.to_kind(kind)));
            }
        }
    }

    /// Clears the gradients.
    pub fn zero_grad(&self) {
        for (_, mut tensor) in self.trainable() {
            tensor.zero_grad();
        }
    }

    /// As [`Self::load`]. An unfilled set takes the values themselves where it can, and each is let go of when its turn has
    /// come, so that they are held once.
    ///
    /// # Errors
    /// As [`Self::check`]; then nothing is taken.
    pub fn fill(&self, mut tensors: BTreeMap<String, Tensor>) -> Result<()> {
        if !self.unfilled {
            return self.load(&tensors);
        }
        self.check(&tensors)?;
        let entries = self.entries.borrow();
        let value = |entry: &Entry| {
            let alias = entry.alias.as_ref().and_then(|alias| tensors.remove(alias));
            let found = tensors.remove(&entry.name).or(alias).expect("checked above");
            let value = found.detach().to_kind(entry.tensor.kind());
            if entry.channels_last { channels_last(&value) } else { value.contiguous() }
        };
        let values = upload_all(&entries.iter().map(value).collect::<Vec<_>>(), self.device);
        no_grad(|| entries.iter().zip(values).for_each(|(entry, value)| entry.tensor.shallow_clone().set_data(&value)));
        Ok(())
    }

    /// What a parameter holds, or, where it is still to be filled, starts as; none for a name that was not declared.
    pub fn value(&self, name: &str) -> Option<Tensor> {
        let entries = self.entries.borrow();
        let entry = entries.iter().find(|entry| entry.name == name)?;
        Some(match entry.init.filter(|_| self.unfilled) {
            Some(init) => initial(self.seed, name, &entry.tensor.size(), init),
            None => entry.tensor.shallow_clone(),
        })
    }

    /// Copies values in by name, aliases accepted.
    ///
    /// # Errors
    /// As [`Self::check`]; then nothing is copied.
    pub fn load(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        if self.unfilled {
            return self.fill(tensors.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect());
        }
        self.check(tensors)?;
        let entries = self.entries.borrow();
        let value = |entry: &Entry| {
            let found = tensors.get(&entry.name).or_else(|| tensors.get(entry.alias.as_ref()?));
            found.expect("checked above").shallow_clone()
        };
        let values = upload_all(&entries.iter().map(value).collect::<Vec<_>>(), self.device);
        no_grad(|| entries.iter().zip(values).for_each(|(entry, value)| entry.tensor.shallow_clone().copy_(&value)));
        Ok(())
    }

    /// Whether values fit by name and shape, aliases accepted.
    ///
    /// # Errors
    /// Names everything that is missing, unknown or of another shape.
    pub fn check(&self, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let entries = self.entries.borrow();
        let mut wrong = Vec::new();
        let mut known = Vec::new();
        for entry in entries.iter() {
            known.push(entry.name.as_str());
            known.extend(entry.alias.as_deref());
            let found = tensors.get(&entry.name).or_else(|| entry.alias.as_ref().and_then(|a| tensors.get(a)));
            match found {
                None => wrong.push(format!("`{}` is missing", entry.name)),
                Some(t) if t.size() != entry.tensor.size() => wrong.push(format!(
                    "`{}` has shape {:?}, the network needs {:?}",
                    entry.name,
                    t.size(),
                    entry.tensor.size()
                )),
                Some(_) => {}
            }
        }
        let known: std::collections::BTreeSet<&str> = known.into_iter().collect();
        wrong.extend(tensors.keys().filter(|n| !known.contains(n.as_str())).map(|n| format!("`{n}` is unknown")));
        if wrong.is_empty() {
            return Ok(());
        }
        let shown = wrong.iter().take(3).cloned().collect::<Vec<_>>().join("; ");
        let more = if wrong.len() > 3 { format!("; and {} more", wrong.len() - 3) } else { String::new() };
        bail!("these weights belong to another architecture: {shown}{more}")
    }

    fn declare(&self, name: String, alias: Option<String>, shape: &[i64], init: Init, trainable: bool) -> Tensor {
        let tensor = if self.unfilled {
            Tensor::zeros([1], (Kind::Float, Device::Cpu)).expand(shape, false)
        } else {
            initial(self.seed, &name, shape, init).set_requires_grad(trainable)
        };
        self.push(Entry {
            name,
            alias,
            tensor: tensor.shallow_clone(),
            trainable,
            moves: !trainable,
            init: Some(init),
            channels_last: false,
        });
        tensor
    }

    fn push(&self, entry: Entry) {
        let mut entries = self.entries.borrow_mut();
        assert!(entries.iter().all(|e| e.name != entry.name), "parameter `{}` is declared twice", entry.name);
        entries.push(entry);
    }
}

fn initial(seed: u64, name: &str, shape: &[i64], init: Init) -> Tensor {
    let count = shape.iter().product::<i64>() as usize;
    let mut generator = stream(seed, Purpose::Weights, fnv1a64(name), 0);
    let values: Vec<f32> = match init {
        Init::Constant(value) => return Tensor::full(shape, value, (Kind::Float, Device::Cpu)),
        Init::Uniform(bound) => {
            let bound = bound as f32;
            (0..count).map(|_| bound * (2.0 * generator.random::<f32>() - 1.0)).collect()
        }
        Init::Normal(mean, std) => (0..count)
            .map(|_| {
                let z: f32 = StandardNormal.sample(&mut generator);
                mean as f32 + std as f32 * z
            })
            .collect(),
    };
    Tensor::from_slice(&values).reshape(shape)
}

/// The 64-bit FNV-1a hash of a name.
pub fn fnv1a64(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ b as u64).wrapping_mul(0x0000_0100_0000_01B3))
}

/// A place in the tree of names: `scope.sub("decoder").sub(0)` declares under `decoder.0.`.
#[derive(Clone)]
pub struct Scope {
    parameters: Parameters,
    prefix: String,
    adapter: Option<Adapter>,
    _declared: Rc<Declared>,
}

/// Held by all scopes of a tree; with the last of them what they declared goes to the device, in few transfers.
struct Declared(Parameters);

impl Drop for Declared {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.0.place();
        }
    }
}

impl Scope {
    /// The scope one name below.
    pub fn sub(&self, name: impl Display) -> Scope {
        Scope { prefix: self.full(name), ..self.clone() }
    }

    /// The same place, where linear maps that can have an adapter get one.
    pub fn with_adapters(self, adapter: Option<Adapter>) -> Scope {
        Scope { adapter, ..self }
    }

    /// What adapters have, where there are to be some.
    pub fn adapter(&self) -> Option<Adapter> {
        self.adapter
    }

    /// A trainable parameter.
    pub fn parameter(&self, name: impl Display, shape: &[i64], init: Init) -> Tensor {
        self.parameters.declare(self.full(name), None, shape, init, true)
    }

    /// A trainable parameter that released checkpoints list under a second name too.
    pub fn aliased(&self, name: impl Display, alias: impl Display, shape: &[i64], init: Init) -> Tensor {
        self.parameters.declare(self.full(name), Some(self.full(alias)), shape, init, true)
    }

    /// A tensor that is stored but not trained.
    pub fn buffer(&self, name: impl Display, shape: &[i64], init: Init) -> Tensor {
        self.parameters.declare(self.full(name), None, shape, init, false)
    }

    /// An integer that counts, not trained.
    pub fn counter(&self, name: impl Display) -> Tensor {
        let tensor = Tensor::zeros([], (Kind::Int64, self.parameters.device));
        let name = self.full(name);
        self.parameters.push(Entry {
            name,
            alias: None,
            tensor: tensor.shallow_clone(),
            trainable: false,
            moves: true,
            init: Some(Init::ZEROS),
            channels_last: false,
        });
        tensor
    }

    /// Values that are stored with the weights and never trained: a fixed function of the network's settings.
    pub fn fixed(&self, name: impl Display, values: Tensor) -> Tensor {
        let (name, tensor) = (self.full(name), values.shallow_clone());
        self.parameters.push(Entry {
            name,
            alias: None,
            tensor,
            trainable: false,
            moves: false,
            init: None,
            channels_last: false,
        });
        values
    }

    /// Puts the channels of a kernel that was declared here last in memory, as convolution and gradient want it when
    /// activations lie so.
    pub fn store_channels_last(&self, name: impl Display) {
        let name = self.full(name);
        let mut entries = self.parameters.entries.borrow_mut();
        let entry = entries.iter_mut().rev().find(|entry| entry.name == name).expect("declared before");
        entry.channels_last = true;
        if !self.parameters.unfilled {
            no_grad(|| entry.tensor.set_data(&channels_last(&entry.tensor.detach())));
        }
    }

    /// Where the parameters lie.
    pub fn device(&self) -> Device {
        self.parameters.device
    }

    fn full(&self, name: impl Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
}
