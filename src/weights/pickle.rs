//! Python's pickle format, read as data.
//!
//! A pickle is a program for a small stack machine that may name any function and ask for it to be
//! called. Here the names and the arguments are kept and nothing is ever called: what a checkpoint
//! means is decided by whoever looks at the [`Value`].
//!
//! The machine runs over an arena of nodes, so that neither deep nesting nor a value that holds
//! itself can exhaust the stack; at the end the arena becomes an immutable tree of bounded depth.

use anyhow::{Context, Result, bail};

mod arena;
mod input;
mod machine;
mod value;

use input::Input;
use machine::{Machine, Step};
pub use value::{Object, Value};

/// More operations than a checkpoint of ten thousand tensors needs; bounds memory against files that
/// ask for much with little.
const MAX_OPERATIONS: usize = 1 << 22;

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

#[cfg(test)]
mod tests {
    use std::rc::Rc;

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
