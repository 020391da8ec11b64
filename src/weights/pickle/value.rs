//! What a pickle says: a tree of values.

use std::{borrow::Cow, fmt, rc::Rc};

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
