//! The stack machine whose program a pickle is.

use std::collections::HashMap;

use anyhow::{Result, anyhow, bail};

use super::{
    arena::{Arena, Growing, Item, Node, pairs},
    input::{Escapes, Input, integer, old_string, shorten, unescape},
    value::Value,
};

pub(super) enum Step {
    On,
    Stop(Item),
}

#[derive(Default)]
pub(super) struct Machine<'a> {
    pub(super) input: Input<'a>,
    pub(super) stack: Vec<Item>,
    /// Heights of the stack at which a mark lies.
    pub(super) marks: Vec<usize>,
    pub(super) memo: HashMap<u32, Item>,
    pub(super) arena: Arena,
}

impl Machine<'_> {
    pub(super) fn step(&mut self) -> Result<Step> {
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
