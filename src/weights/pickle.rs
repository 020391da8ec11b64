//! Python's pickle format, read as data.
//!
//! A pickle is a program for a small stack machine that may name any function and ask for it to be
//! called. Here the names and the arguments are kept and nothing is ever called: what a checkpoint
//! means is decided by whoever looks at the [`Value`].
//!
//! The machine runs over an arena of nodes, so that neither deep nesting nor a value that holds
//! itself can exhaust the stack; at the end the arena becomes an immutable tree of bounded depth.

use std::{borrow::Cow, collections::HashMap, fmt, rc::Rc};

use anyhow::{Context, Result, anyhow, bail};

/// More operations than a checkpoint of ten thousand tensors needs; bounds memory against files that
/// ask for much with little.
const MAX_OPERATIONS: usize = 1 << 22;

/// Nesting deeper than Python itself writes by default.
const MAX_DEPTH: usize = 400;

/// What a pickle says. Values that the pickle shares are shared here too.
#[derive(Clone, PartialEq, Default)]
pub enum Value {
    /// Python's `None`.
    #[default]
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer of at most 64 bits.
    Int(i64),
    /// An integer beyond 64 bits, as the file spells it: little-endian two's complement, or digits.
    BigInt(Rc<[u8]>),
    /// A Python float.
    Float(f64),
    /// Raw bytes.
    Bytes(Rc<[u8]>),
    /// A text.
    String(Rc<str>),
    /// A list, in its order.
    List(Rc<[Value]>),
    /// A tuple, in its order.
    Tuple(Rc<[Value]>),
    /// A set or frozen set.
    Set(Rc<[Value]>),
    /// In the order of the file; of equal keys the last one counts.
    Dict(Rc<[(Value, Value)]>),
    /// A Python class or function that the file names: (module, name).
    Global(Rc<str>, Rc<str>),
    /// The result of a call that was not made.
    Object(Rc<Object>),
    /// A reference to something outside the pickle, such as a tensor's storage.
    Persistent(Rc<Value>),
    /// A value that lies inside itself, at the place where it returns to itself.
    Cycle,
}

/// A call that the pickle asks for, and what it would have done with the result.
#[derive(Clone, PartialEq, Default)]
pub struct Object {
    /// What would be called; it never is.
    pub callable: Value,
    /// What it would be called with.
    pub arguments: Value,
    /// Keyword arguments, or `None`.
    pub keywords: Value,
    /// What would be given to `__setstate__`, or `None`.
    pub state: Value,
    /// What would be set as `object[key] = value`.
    pub items: Vec<(Value, Value)>,
    /// What would be appended or added.
    pub elements: Vec<Value>,
}

impl Value {
    /// What kind of value it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Value::None => "None",
            Value::Bool(_) => "a truth value",
            Value::Int(_) | Value::BigInt(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Bytes(_) => "bytes",
            Value::String(_) => "a string",
            Value::List(_) => "a list",
            Value::Tuple(_) => "a tuple",
            Value::Set(_) => "a set",
            Value::Dict(_) => "a dictionary",
            Value::Global(..) => "a name of Python code",
            Value::Object(_) => "an object",
            Value::Persistent(_) => "an outside reference",
            Value::Cycle => "a reference to an enclosing value",
        }
    }

    /// The text, where it is one.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// The number, where it is a whole one.
    pub fn as_int(&self) -> Option<i64> {
        match self {
            Value::Int(value) => Some(*value),
            Value::Bool(value) => Some(i64::from(*value)),
            _ => None,
        }
    }

    /// The elements of a list or tuple.
    pub fn as_sequence(&self) -> Option<&[Value]> {
        match self {
            Value::List(values) | Value::Tuple(values) => Some(values),
            _ => None,
        }
    }

    /// The object, where it is one.
    pub fn as_object(&self) -> Option<&Object> {
        match self {
            Value::Object(object) => Some(object),
            _ => None,
        }
    }

    /// Whether it is this name of this module.
    pub fn is_global(&self, module: &str, name: &str) -> bool {
        matches!(self, Value::Global(m, n) if **m == *module && **n == *name)
    }

    /// The entries of a dictionary or an ordered dictionary.
    pub fn entries(&self) -> Option<&[(Value, Value)]> {
        match self {
            Value::Dict(entries) => Some(entries),
            Value::Object(object) if object.callable.is_global("collections", "OrderedDict") => Some(&object.items),
            _ => None,
        }
    }

    /// What a dictionary holds under a string.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries()?.iter().rev().find(|(k, _)| k.as_str() == Some(key)).map(|(_, value)| value)
    }

    /// Bytes in any of the ways in which Python 2 and 3 write them: old protocols spell them as a string
    /// to be encoded in Latin-1.
    pub fn as_bytes(&self) -> Option<Cow<'_, [u8]>> {
        let latin_1 = |text: &str| {
            text.chars().map(|c| u8::try_from(u32::from(c)).ok()).collect::<Option<Vec<u8>>>().map(Cow::Owned)
        };
        match self {
            Value::Bytes(bytes) => Some(Cow::Borrowed(bytes)),
            Value::String(text) => latin_1(text),
            Value::Object(object) if object.callable.is_global("_codecs", "encode") => {
                match object.arguments.as_sequence()? {
                    [Value::String(text), Value::String(codec)] if &**codec == "latin1" => latin_1(text),
                    _ => None,
                }
            }
            // bytearray(b"…"), and bytes() for an empty one
            Value::Object(object) => {
                let bytes = ["builtins", "__builtin__"].iter().any(|module| {
                    object.callable.is_global(module, "bytearray") || object.callable.is_global(module, "bytes")
                });
                match object.arguments.as_sequence()? {
                    _ if !bytes => None,
                    [] => Some(Cow::Borrowed(&[])),
                    [Value::Bytes(bytes)] => Some(Cow::Borrowed(bytes)),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// One level only: a hostile file can make a small value print without end.
impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bool(value) => write!(f, "{value}"),
            Value::Int(value) => write!(f, "{value}"),
            Value::Float(value) => write!(f, "{value:?}"),
            Value::String(text) => write!(f, "{:?}", text.chars().take(80).collect::<String>()),
            Value::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Value::List(values) => write!(f, "a list of {}", values.len()),
            Value::Tuple(values) => write!(f, "a tuple of {}", values.len()),
            Value::Set(values) => write!(f, "a set of {}", values.len()),
            Value::Dict(entries) => write!(f, "a dictionary of {}", entries.len()),
            Value::Global(module, name) => write!(f, "{module}.{name}"),
            Value::Object(object) => match &object.callable {
                Value::Global(module, name) => write!(f, "an object of {module}.{name}"),
                _ => write!(f, "an object"),
            },
            other => write!(f, "{}", other.kind()),
        }
    }
}

/// Reads one pickle.
///
/// # Errors
/// Anything that is not a whole pickle of protocol 0 to 5 and nothing after it, with the place.
pub fn read(bytes: &[u8]) -> Result<Value> {
    let (value, used) = read_first(bytes)?;
    if used != bytes.len() {
        bail!("the pickle ends at byte {used}, but the file goes on to byte {}", bytes.len());
    }
    Ok(value)
}

/// Reads the first of several pickles that lie one after the other; also gives its length.
///
/// # Errors
/// As [`read`].
pub fn read_first(bytes: &[u8]) -> Result<(Value, usize)> {
    let mut machine = Machine { input: Input { bytes, at: 0 }, ..Machine::default() };
    for _ in 0..MAX_OPERATIONS {
        let at = machine.input.at;
        match machine.step().with_context(|| format!("not a valid pickle: at byte {at}"))? {
            Step::On => {}
            Step::Stop(root) => return Ok((machine.arena.freeze(root)?, machine.input.at)),
        }
    }
    bail!("the pickle has more than {MAX_OPERATIONS} operations: it is no checkpoint that can be read here")
}

/// The bytes still to be read.
#[derive(Default)]
struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Input<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let count = usize::try_from(count).ok().filter(|n| *n <= rest.len()).ok_or_else(|| {
            anyhow!("{count} bytes are asked for and {} are left: the file is cut short or damaged", rest.len())
        })?;
        self.at += count;
        Ok(&rest[..count])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N as u64)?.try_into().expect("take gives what was asked for"))
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A length of 4 bytes that Python reads with a sign.
    fn signed_length(&mut self) -> Result<u64> {
        let length = i32::from_le_bytes(self.array()?);
        u64::try_from(length).map_err(|_| anyhow!("the length {length} is negative"))
    }

    /// Up to the next line feed, which is consumed and left out.
    fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|b| *b == b'\n').ok_or_else(|| anyhow!("a line does not end"))?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| anyhow!("a line is not text"))
    }

    fn text(&mut self, length: u64) -> Result<Item> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| anyhow!("a string is not UTF-8"))?;
        Ok(Item::Plain(Value::String(text.into())))
    }

    fn blob(&mut self, length: u64) -> Result<Item> {
        Ok(Item::Plain(Value::Bytes(self.take(length)?.into())))
    }

    /// A string of Python 2, which is text or bytes.
    fn old_string(&mut self, length: u64) -> Result<Item> {
        Ok(Item::Plain(old_string(self.take(length)?)))
    }

    fn long(&mut self, length: u64) -> Result<Item> {
        let bytes = self.take(length)?;
        if bytes.len() > 8 {
            return Ok(Item::Plain(Value::BigInt(bytes.into())));
        }
        let sign = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xFF } else { 0 };
        let mut wide = [sign; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        Ok(Item::Plain(Value::Int(i64::from_le_bytes(wide))))
    }
}

/// What lies on the machine's stack: a finished value, or a node of the arena.
#[derive(Clone)]
enum Item {
    Plain(Value),
    Node(usize),
}

/// A value that may still grow, or that holds such values.
enum Node {
    List(Vec<Item>),
    Tuple(Vec<Item>),
    Set(Vec<Item>),
    Dict(Vec<(Item, Item)>),
    Object(Box<Growing>),
    Persistent(Item),
}

struct Growing {
    callable: Item,
    arguments: Item,
    keywords: Item,
    state: Item,
    items: Vec<(Item, Item)>,
    elements: Vec<Item>,
}

enum Step {
    On,
    Stop(Item),
}

#[derive(Default)]
struct Machine<'a> {
    input: Input<'a>,
    stack: Vec<Item>,
    /// Heights of the stack at which a mark lies.
    marks: Vec<usize>,
    memo: HashMap<u32, Item>,
    arena: Arena,
}

impl Machine<'_> {
    fn step(&mut self) -> Result<Step> {
        let operation = self.input.u8()?;
        match operation {
            // what surrounds the content
            0x80 => {
                let protocol = self.input.u8()?;
                if protocol > 5 {
                    bail!("protocol {protocol} is unknown, the last known one is 5");
                }
            }
            0x95 => {
                let length = self.input.u64()?;
                let left = self.input.bytes.len() - self.input.at;
                if length > left as u64 {
                    bail!("a frame of {length} bytes, but {left} are left: the file is cut short or damaged");
                }
            }
            b'.' => {
                let root = self.pop()?;
                if !self.stack.is_empty() || !self.marks.is_empty() {
                    bail!("the pickle stops with values left over");
                }
                return Ok(Step::Stop(root));
            }

            // plain values
            b'N' => self.push(Value::None),
            0x88 => self.push(Value::Bool(true)),
            0x89 => self.push(Value::Bool(false)),
            b'K' => {
                let value = i64::from(self.input.u8()?);
                self.push(Value::Int(value));
            }
            b'M' => {
                let value = i64::from(u16::from_le_bytes(self.input.array()?));
                self.push(Value::Int(value));
            }
            b'J' => {
                let value = i64::from(i32::from_le_bytes(self.input.array()?));
                self.push(Value::Int(value));
            }
            b'I' => {
                let value = match self.input.line()? {
                    "00" => Value::Bool(false),
                    "01" => Value::Bool(true),
                    digits => integer(digits)?,
                };
                self.push(value);
            }
            b'L' => {
                let digits = self.input.line()?;
                self.push(integer(digits.strip_suffix('L').unwrap_or(digits))?);
            }
            b'F' => {
                let text = self.input.line()?;
                let value = text.trim().parse().map_err(|_| anyhow!("`{}` is no number", shorten(text)))?;
                self.push(Value::Float(value));
            }
            b'G' => {
                let value = f64::from_be_bytes(self.input.array()?);
                self.push(Value::Float(value));
            }
            0x8a => {
                let length = self.input.u8()?;
                let item = self.input.long(u64::from(length))?;
                self.stack.push(item);
            }
            0x8b => {
                let length = self.input.signed_length()?;
                let item = self.input.long(length)?;
                self.stack.push(item);
            }

            // strings and bytes
            0x8c => {
                let length = self.input.u8()?;
                let item = self.input.text(u64::from(length))?;
                self.stack.push(item);
            }
            b'X' => {
                let length = self.input.u32()?;
                let item = self.input.text(u64::from(length))?;
                self.stack.push(item);
            }
            0x8d => {
                let length = self.input.u64()?;
                let item = self.input.text(length)?;
                self.stack.push(item);
            }
            b'V' => {
                let text = unescape(self.input.line()?, Escapes::Unicode)?;
                self.push(Value::String(text.into_iter().collect::<String>().into()));
            }
            b'C' => {
                let length = self.input.u8()?;
                let item = self.input.blob(u64::from(length))?;
                self.stack.push(item);
            }
            b'B' => {
                let length = self.input.u32()?;
                let item = self.input.blob(u64::from(length))?;
                self.stack.push(item);
            }
            0x8e | 0x96 => {
                let length = self.input.u64()?;
                let item = self.input.blob(length)?;
                self.stack.push(item);
            }
            b'U' => {
                let length = self.input.u8()?;
                let item = self.input.old_string(u64::from(length))?;
                self.stack.push(item);
            }
            b'T' => {
                let length = self.input.signed_length()?;
                let item = self.input.old_string(length)?;
                self.stack.push(item);
            }
            b'S' => {
                let line = self.input.line()?.trim();
                let quoted = line.len() >= 2
                    && (line.starts_with('\'') && line.ends_with('\'') || line.starts_with('"') && line.ends_with('"'));
                if !quoted {
                    bail!("a string without its quotes");
                }
                let bytes = unescape(&line[1..line.len() - 1], Escapes::Bytes)?
                    .into_iter()
                    .map(|c| u8::try_from(u32::from(c)).map_err(|_| anyhow!("a byte string holds `{c}`")))
                    .collect::<Result<Vec<u8>>>()?;
                self.push(old_string(&bytes));
            }

            // containers
            b'(' => self.marks.push(self.stack.len()),
            b']' => self.node(Node::List(Vec::new())),
            b'}' => self.node(Node::Dict(Vec::new())),
            b')' => self.node(Node::Tuple(Vec::new())),
            0x8f => self.node(Node::Set(Vec::new())),
            b'l' => {
                let values = self.since_mark()?;
                self.node(Node::List(values));
            }
            b't' => {
                let values = self.since_mark()?;
                self.node(Node::Tuple(values));
            }
            0x91 => {
                let values = self.since_mark()?;
                self.node(Node::Set(values));
            }
            b'd' => {
                let entries = pairs(self.since_mark()?)?;
                self.node(Node::Dict(entries));
            }
            0x85..=0x87 => {
                let mut values = (0..operation - 0x84).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
                values.reverse();
                self.node(Node::Tuple(values));
            }
            b'a' => {
                let value = self.pop()?;
                self.append(vec![value])?;
            }
            b'e' | 0x90 => {
                let values = self.since_mark()?;
                self.append(values)?;
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.set_items(vec![(key, value)])?;
            }
            b'u' => {
                let entries = pairs(self.since_mark()?)?;
                self.set_items(entries)?;
            }

            // the stack and the memo
            b'0' => {
                if self.marks.last() == Some(&self.stack.len()) {
                    self.marks.pop();
                } else {
                    self.pop()?;
                }
            }
            b'1' => {
                self.since_mark()?;
            }
            b'2' => {
                let top = self.top()?.clone();
                self.stack.push(top);
            }
            b'p' => {
                let key = self.memo_key()?;
                self.store(key)?;
            }
            b'q' => {
                let key = u32::from(self.input.u8()?);
                self.store(key)?;
            }
            b'r' => {
                let key = self.input.u32()?;
                self.store(key)?;
            }
            0x94 => self.store(self.memo.len() as u32)?,
            b'g' => {
                let key = self.memo_key()?;
                self.recall(key)?;
            }
            b'h' => {
                let key = u32::from(self.input.u8()?);
                self.recall(key)?;
            }
            b'j' => {
                let key = self.input.u32()?;
                self.recall(key)?;
            }

            // names and calls, kept as data
            b'c' => {
                let (module, name) = (self.input.line()?, self.input.line()?);
                self.push(Value::Global(module.into(), name.into()));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Item::Plain(Value::String(module)), Item::Plain(Value::String(name))) = (module, name) else {
                    bail!("a name of Python code that is not a string");
                };
                self.push(Value::Global(module, name));
            }
            b'R' | 0x81 => {
                let (arguments, callable) = (self.pop()?, self.pop()?);
                self.call(callable, arguments, Item::Plain(Value::None));
            }
            0x92 => {
                let (keywords, arguments, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, arguments, keywords);
            }
            b'i' => {
                let (module, name) = (self.input.line()?, self.input.line()?);
                let callable = Item::Plain(Value::Global(module.into(), name.into()));
                let arguments = self.since_mark()?;
                let arguments = self.arena.add(Node::Tuple(arguments));
                self.call(callable, arguments, Item::Plain(Value::None));
            }
            b'o' => {
                let mut arguments = self.since_mark()?;
                if arguments.is_empty() {
                    bail!("a call without a callable");
                }
                let callable = arguments.remove(0);
                let arguments = self.arena.add(Node::Tuple(arguments));
                self.call(callable, arguments, Item::Plain(Value::None));
            }
            b'b' => {
                let state = self.pop()?;
                match self.arena.node_mut(self.top()?.clone()) {
                    Some(Node::Object(object)) => object.state = state,
                    _ => bail!("a state for something that is no object"),
                }
            }
            b'P' => {
                let name = self.input.line()?;
                self.node(Node::Persistent(Item::Plain(Value::String(name.into()))));
            }
            b'Q' => {
                let name = self.pop()?;
                self.node(Node::Persistent(name));
            }

            0x82..=0x84 => bail!("the copyreg extension registry is not supported"),
            0x97 | 0x98 => bail!("buffers outside the pickle are not supported"),
            other => bail!("0x{other:02x} is no operation: the file is damaged or no pickle"),
        }
        Ok(Step::On)
    }

    fn push(&mut self, value: Value) {
        self.stack.push(Item::Plain(value));
    }

    fn node(&mut self, node: Node) {
        let item = self.arena.add(node);
        self.stack.push(item);
    }

    /// The height below which the stack is out of reach until the mark is consumed.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Item> {
        if self.stack.len() <= self.floor() {
            bail!("a value is asked for and the stack is empty");
        }
        Ok(self.stack.pop().expect("checked above"))
    }

    fn top(&self) -> Result<&Item> {
        if self.stack.len() <= self.floor() {
            bail!("a value is asked for and the stack is empty");
        }
        Ok(self.stack.last().expect("checked above"))
    }

    fn since_mark(&mut self) -> Result<Vec<Item>> {
        let mark = self.marks.pop().ok_or_else(|| anyhow!("a mark is asked for and there is none"))?;
        Ok(self.stack.split_off(mark))
    }

    fn append(&mut self, values: Vec<Item>) -> Result<()> {
        match self.arena.node_mut(self.top()?.clone()) {
            Some(Node::List(elements) | Node::Set(elements)) => elements.extend(values),
            Some(Node::Object(object)) => object.elements.extend(values),
            _ => bail!("elements for something that is neither a list, a set nor an object"),
        }
        Ok(())
    }

    fn set_items(&mut self, items: Vec<(Item, Item)>) -> Result<()> {
        match self.arena.node_mut(self.top()?.clone()) {
            Some(Node::Dict(entries)) => entries.extend(items),
            Some(Node::Object(object)) => object.items.extend(items),
            _ => bail!("entries for something that is neither a dictionary nor an object"),
        }
        Ok(())
    }

    fn call(&mut self, callable: Item, arguments: Item, keywords: Item) {
        self.node(Node::Object(Box::new(Growing {
            callable,
            arguments,
            keywords,
            state: Item::Plain(Value::None),
            items: Vec::new(),
            elements: Vec::new(),
        })));
    }

    fn memo_key(&mut self) -> Result<u32> {
        let text = self.input.line()?;
        text.parse().map_err(|_| anyhow!("`{}` is no place in the memo", shorten(text)))
    }

    fn store(&mut self, key: u32) -> Result<()> {
        let top = self.top()?.clone();
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<()> {
        let item = self.memo.get(&key).ok_or_else(|| anyhow!("the memo has nothing at {key}"))?;
        self.stack.push(item.clone());
        Ok(())
    }
}

/// All nodes of a pickle, which refer to each other by number.
#[derive(Default)]
struct Arena {
    nodes: Vec<Node>,
}

/// How far a node is on its way into a [`Value`].
#[derive(Clone)]
enum Frozen {
    Untouched,
    Underway,
    /// With its height.
    Done(Value, usize),
}

impl Arena {
    fn add(&mut self, node: Node) -> Item {
        self.nodes.push(node);
        Item::Node(self.nodes.len() - 1)
    }

    fn node_mut(&mut self, item: Item) -> Option<&mut Node> {
        match item {
            Item::Node(index) => self.nodes.get_mut(index),
            Item::Plain(_) => None,
        }
    }

    fn freeze(&self, root: Item) -> Result<Value> {
        let mut done = vec![Frozen::Untouched; self.nodes.len()];
        Ok(self.freeze_item(&root, 0, &mut done)?.0)
    }

    /// The value and its height.
    fn freeze_item(&self, item: &Item, depth: usize, done: &mut [Frozen]) -> Result<(Value, usize)> {
        let index = match item {
            Item::Plain(value) => return Ok((value.clone(), 0)),
            Item::Node(index) => *index,
        };
        match &done[index] {
            Frozen::Underway => return Ok((Value::Cycle, 0)),
            Frozen::Done(value, height) => return Ok((value.clone(), *height)),
            Frozen::Untouched => {}
        }
        if depth > MAX_DEPTH {
            bail!("the pickle is nested deeper than {MAX_DEPTH} levels");
        }
        done[index] = Frozen::Underway;
        let mut height = 0;
        let mut one = |item: &Item| -> Result<Value> {
            let (value, h) = self.freeze_item(item, depth + 1, done)?;
            height = height.max(h + 1);
            Ok(value)
        };
        let value = match &self.nodes[index] {
            Node::List(items) => Value::List(items.iter().map(one).collect::<Result<_>>()?),
            Node::Tuple(items) => Value::Tuple(items.iter().map(one).collect::<Result<_>>()?),
            Node::Set(items) => Value::Set(items.iter().map(one).collect::<Result<_>>()?),
            Node::Dict(items) => Value::Dict(items.iter().map(|(k, v)| Ok((one(k)?, one(v)?))).collect::<Result<_>>()?),
            Node::Persistent(item) => Value::Persistent(Rc::new(one(item)?)),
            Node::Object(object) => Value::Object(Rc::new(Object {
                callable: one(&object.callable)?,
                arguments: one(&object.arguments)?,
                keywords: one(&object.keywords)?,
                state: one(&object.state)?,
                items: object.items.iter().map(|(k, v)| Ok((one(k)?, one(v)?))).collect::<Result<_>>()?,
                elements: object.elements.iter().map(one).collect::<Result<_>>()?,
            })),
        };
        // a shared value met on the way counts with its full height, which bounds every later walk
        if height > MAX_DEPTH {
            bail!("the pickle is nested deeper than {MAX_DEPTH} levels");
        }
        done[index] = Frozen::Done(value.clone(), height);
        Ok((value, height))
    }
}

fn pairs(values: Vec<Item>) -> Result<Vec<(Item, Item)>> {
    if !values.len().is_multiple_of(2) {
        bail!("a dictionary with a key that has no value");
    }
    let mut values = values.into_iter();
    let mut entries = Vec::with_capacity(values.len() / 2);
    while let (Some(key), Some(value)) = (values.next(), values.next()) {
        entries.push((key, value));
    }
    Ok(entries)
}

fn integer(text: &str) -> Result<Value> {
    let text = text.trim();
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        bail!("`{}` is no integer", shorten(text));
    }
    Ok(text.parse().map_or_else(|_| Value::BigInt(text.as_bytes().into()), Value::Int))
}

fn old_string(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) if bytes.is_ascii() => Value::String(text.into()),
        _ => Value::Bytes(bytes.into()),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Escapes {
    /// `\u0041` and `\U00000041` only.
    Unicode,
    /// As in a byte string's source: `\x41`, `\101`, `\n`, …
    Bytes,
}

fn unescape(text: &str, escapes: Escapes) -> Result<Vec<char>> {
    let chars: Vec<char> = text.chars().collect();
    let number = |from: usize, length: usize, radix: u32| -> Result<char> {
        let digits = chars.get(from..from + length).ok_or_else(|| anyhow!("an escape sequence is cut short"))?;
        let code = digits
            .iter()
            .try_fold(0u32, |code, c| c.to_digit(radix).and_then(|digit| code.checked_mul(radix)?.checked_add(digit)));
        code.and_then(char::from_u32).ok_or_else(|| anyhow!("an escape sequence is no character"))
    };
    let mut out = Vec::with_capacity(chars.len());
    let mut at = 0;
    while at < chars.len() {
        let next = chars.get(at + 1).copied();
        let (c, length) = match (chars[at], next, escapes) {
            ('\\', Some('u'), Escapes::Unicode) => (number(at + 2, 4, 16)?, 6),
            ('\\', Some('U'), Escapes::Unicode) => (number(at + 2, 8, 16)?, 10),
            ('\\', Some('x'), Escapes::Bytes) => (number(at + 2, 2, 16)?, 4),
            ('\\', Some('0'..='3'), Escapes::Bytes) => (number(at + 1, 3, 8)?, 4),
            ('\\', Some(c), Escapes::Bytes) => {
                let c = match c {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    'a' => '\x07',
                    'b' => '\x08',
                    'f' => '\x0c',
                    'v' => '\x0b',
                    '\\' | '\'' | '"' => c,
                    _ => bail!("the escape sequence `\\{c}` is unknown"),
                };
                (c, 2)
            }
            ('\\', None, Escapes::Bytes) => bail!("an escape sequence is cut short"),
            (c, ..) => (c, 1),
        };
        out.push(c);
        at += length;
    }
    Ok(out)
}

fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(value: &str) -> Value {
        Value::String(value.into())
    }

    fn ok(bytes: &[u8]) -> Value {
        read(bytes).unwrap()
    }

    fn error(bytes: &[u8]) -> String {
        format!("{:#}", read(bytes).unwrap_err())
    }

    /// `{"w": [1, -2, 2.5, None, True], "o": OrderedDict(a=b"xy"), "t": (…the same list…,)}` in protocol 4.
    fn small() -> Vec<u8> {
        let mut bytes = b"\x80\x04\x95".to_vec();
        let mut body = b"}\x94(\x8c\x01w\x94]\x94(K\x01J\xfe\xff\xff\xffG\x40\x04\0\0\0\0\0\0N\x88e".to_vec();
        body.extend(b"\x8c\x01o\x94\x8c\x0bcollections\x94\x8c\x0bOrderedDict\x94\x93\x94)R\x94");
        body.extend(b"\x8c\x01a\x94C\x02xy\x94s\x8c\x01t\x94h\x02\x85\x94u.");
        bytes.extend((body.len() as u64).to_le_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn a_small_pickle() {
        let value = ok(&small());
        let list = value.get("w").unwrap();
        let expected = [Value::Int(1), Value::Int(-2), Value::Float(2.5), Value::None, Value::Bool(true)];
        assert_eq!(list.as_sequence().unwrap(), expected);
        assert_eq!(value.get("o").unwrap().get("a").unwrap().as_bytes().unwrap().as_ref(), b"xy");
        let Value::Tuple(tuple) = value.get("t").unwrap() else { panic!("{value:?}") };
        let (Value::List(shared), Value::List(list)) = (&tuple[0], list) else { panic!() };
        assert!(Rc::ptr_eq(shared, list));
    }

    #[test]
    fn every_spelling_of_plain_values() {
        for (bytes, value) in [
            (&b"I01\n."[..], Value::Bool(true)),
            (b"I00\n.", Value::Bool(false)),
            (b"I-7\n.", Value::Int(-7)),
            (b"L12L\n.", Value::Int(12)),
            (b"L99999999999999999999L\n.", Value::BigInt(b"99999999999999999999"[..].into())),
            (b"F-1.5e3\n.", Value::Float(-1500.0)),
            (b"\x8a\x00.", Value::Int(0)),
            (b"\x8a\x01\xff.", Value::Int(-1)),
            (b"\x8a\x02\xff\x00.", Value::Int(255)),
            (b"\x8a\x08\0\0\0\0\0\0\0\x80.", Value::Int(i64::MIN)),
            (
                b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\0.",
                Value::BigInt(b"\xff\xff\xff\xff\xff\xff\xff\xff\0"[..].into()),
            ),
            (b"\x8b\x02\0\0\0\x00\x01.", Value::Int(256)),
            (b"M\x01\x02.", Value::Int(513)),
            (b"V\\u00e9a\\U0001F600\n.", text("éa😀")),
            (b"S'a\\x41\\'\\n'\n.", text("aA'\n")),
            (b"S'\\xe9'\n.", Value::Bytes(b"\xe9"[..].into())),
            (b"U\x02ab.", text("ab")),
            (b"T\x02\0\0\0\x80b.", Value::Bytes(b"\x80b"[..].into())),
            (b"X\x02\0\0\0ab.", text("ab")),
            (b"\x8d\x02\0\0\0\0\0\0\0ab.", text("ab")),
            (b"B\x01\0\0\0a.", Value::Bytes(b"a"[..].into())),
            (b"\x8e\x01\0\0\0\0\0\0\0a.", Value::Bytes(b"a"[..].into())),
            (b"\x96\x01\0\0\0\0\0\0\0a.", Value::Bytes(b"a"[..].into())),
            (b"(K\x01K\x02l.", Value::List([Value::Int(1), Value::Int(2)].into())),
            (b"(K\x01K\x02d.", Value::Dict([(Value::Int(1), Value::Int(2))].into())),
            (b"\x8f(K\x01\x90.", Value::Set([Value::Int(1)].into())),
            (b"(K\x01\x91.", Value::Set([Value::Int(1)].into())),
            (b"NK\x010.", Value::None),
            (b"N(K\x01K\x021.", Value::None),
            (b"N(0.", Value::None),
            (b"K\x012\x86.", Value::Tuple([Value::Int(1), Value::Int(1)].into())),
            (b"K\x05p300\n0g300\n.", Value::Int(5)),
            (b"K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff.", Value::Int(5)),
            (b"Pab\n.", Value::Persistent(Rc::new(text("ab")))),
            (b"K\x07Q.", Value::Persistent(Rc::new(Value::Int(7)))),
        ] {
            assert_eq!(ok(bytes), value, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn values_below_a_mark_are_out_of_reach() {
        assert!(error(b"K\x01(\x85.").contains("stack is empty"));
        assert!(error(b"](R.").contains("stack is empty"));
        assert!(error(b"K\x01t.").contains("mark"));
        assert!(error(b"K\x01K\x02.").contains("left over"));
        assert!(error(b"}(K\x01u.").contains("no value"));
    }

    #[test]
    fn calls_are_kept_and_never_made() {
        let folder = tempfile::tempdir().unwrap();
        let witness = folder.path().join("executed");
        let command = format!("touch {}", witness.display());
        let mut reduce = b"cposix\nsystem\n(X".to_vec();
        reduce.extend((command.len() as u32).to_le_bytes());
        reduce.extend(command.as_bytes());
        reduce.extend(b"tR.");
        let value = ok(&reduce);
        let object = value.as_object().unwrap();
        assert!(object.callable.is_global("posix", "system"));
        assert_eq!(object.arguments.as_sequence().unwrap(), [text(&command)]);
        assert!(!witness.exists());

        for (bytes, arguments) in [
            (&b"(K\x01ios\nsystem\n."[..], 1),
            (b"(cos\nsystem\nK\x01K\x02o.", 2),
            (b"cos\nsystem\n)\x81.", 0),
            (b"cos\nsystem\nK\x01\x85}\x92.", 1),
            (b"\x8c\x02os\x8c\x06system\x93K\x01\x85R(K\x02K\x03uK\x04aNb.", 1),
        ] {
            let value = ok(bytes);
            let object = value.as_object().unwrap();
            assert!(object.callable.is_global("os", "system"));
            assert_eq!(object.arguments.as_sequence().unwrap().len(), arguments);
        }
    }

    #[test]
    fn bytes_of_old_protocols() {
        let mut bytes = "c_codecs\nencode\n(X\x04\0\0\0\u{e9}\u{ff}X\x06\0\0\0latin1tR.".as_bytes().to_vec();
        assert_eq!(ok(&bytes).as_bytes().unwrap().as_ref(), b"\xe9\xff");
        bytes[2] ^= 1;
        assert!(ok(&bytes).as_bytes().is_none());
    }

    #[test]
    fn a_value_inside_itself_and_dictionary_keys_of_any_kind() {
        let value = ok(b"]q\0h\0a.");
        assert_eq!(value, Value::List([Value::Cycle].into()));
        let value = ok(b"}cos\nsystem\nK\x01s.");
        assert!(value.entries().unwrap()[0].0.is_global("os", "system"));
    }

    #[test]
    fn of_equal_keys_the_last_counts() {
        assert_eq!(ok(b"}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u.").get("a"), Some(&Value::Int(2)));
    }

    #[test]
    fn cut_at_every_length() {
        let bytes = small();
        for length in 0..bytes.len() {
            assert!(read(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(error(&longer).contains("goes on"));
        assert_eq!(read_first(&longer).unwrap().1, bytes.len());
    }

    #[test]
    fn every_bit_flipped() {
        let bytes = small();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // many flips leave another valid pickle; none may panic
            let _ = read(&damaged).map(|value| format!("{value:?}"));
        }
    }

    #[test]
    fn every_operation_alone_and_after_every_other() {
        for first in 0..=255u8 {
            for second in 0..=255u8 {
                let _ = read(&[first, second]);
                let _ = read(&[b'(', first, second, b'.']);
                let _ = read(&[b'K', 1, b']', first, second, 0, 0, 0, 0x80, b'.']);
            }
        }
    }

    #[test]
    fn lengths_beyond_the_file() {
        let mut cases = Vec::new();
        for operation in [0x8d, 0x8e, 0x96, 0x95] {
            for length in [1u64 << 63, u64::MAX, 1 << 40, 100] {
                let mut bytes = vec![operation];
                bytes.extend(length.to_le_bytes());
                cases.push(bytes);
            }
        }
        for operation in [b'X', b'B', b'T', 0x8b] {
            for length in [u32::MAX, 1 << 31, i32::MAX as u32, 100] {
                let mut bytes = vec![operation];
                bytes.extend(length.to_le_bytes());
                cases.push(bytes);
            }
        }
        for mut bytes in cases {
            bytes.extend(b"ab.");
            let message = error(&bytes);
            assert!(message.contains("left") || message.contains("negative"), "{message}");
        }
    }

    #[test]
    fn bombs() {
        // deep nesting by each way of nesting
        for (start, level, end) in
            [(&b")"[..], &b"\x85"[..], &b"."[..]), (b"N", b"Q", b"."), (b"cos\nsystem\n)", b"R)", b"0.")]
        {
            let mut bytes = start.to_vec();
            (0..100_000).for_each(|_| bytes.extend(level));
            bytes.extend(end);
            assert!(error(&bytes).contains("nested deeper"), "{}", level.escape_ascii());
        }
        let lists = [&b"]".repeat(100_000)[..], &b"a".repeat(99_999), b"."].concat();
        assert!(error(&lists).contains("nested deeper"));
        // a chain through the memo, built from the outside in: depth is never seen while it is read
        let mut chain = b"]q\0".to_vec();
        (0..100_000).for_each(|_| chain.extend(b"h\0]q\0a0"));
        chain.extend(b".");
        let _ = read(&chain);
        let mut chain = b"]q\x01q\0".to_vec();
        (0..100_000).for_each(|_| chain.extend(b"h\0]q\0a0"));
        chain.extend(b"h\x010.");
        assert!(error(&chain).contains("nested deeper"), "{}", error(&chain));
        // each list holds the one before twice: 2^300 elements for whoever would write them out
        let mut doubling = b"]q\0".to_vec();
        (0..300).for_each(|_| doubling.extend(b"](h\0h\0eq\0"));
        doubling.extend(b"q\x010(h\x01t.");
        let _ = read(&doubling).map(|value| format!("{value:?}"));
        // as many memo entries, marks or values as bytes
        for operation in [&b"\x94"[..], b"(", b"N", b"}", b"2"] {
            let mut bytes = b"N".to_vec();
            (0..MAX_OPERATIONS + 10).for_each(|_| bytes.extend(operation));
            bytes.extend(b".");
            assert!(error(&bytes).contains("operations"), "{}", operation.escape_ascii());
        }
    }
}
