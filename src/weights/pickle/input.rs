//! The bytes of a pickle, and the texts in them.

use anyhow::{Result, anyhow, bail};

use super::{arena::Item, value::Value};

/// The bytes still to be read.
#[derive(Default)]
pub(super) struct Input<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

impl<'a> Input<'a> {
    pub(super) fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let count = usize::try_from(count).ok().filter(|n| *n <= rest.len()).ok_or_else(|| {
            anyhow!("{count} bytes are asked for and {} are left: the file is cut short or damaged", rest.len())
        })?;
        self.at += count;
        Ok(&rest[..count])
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N as u64)?.try_into().expect("take gives what was asked for"))
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A length of 4 bytes that Python reads with a sign.
    pub(super) fn signed_length(&mut self) -> Result<u64> {
        let length = i32::from_le_bytes(self.array()?);
        u64::try_from(length).map_err(|_| anyhow!("the length {length} is negative"))
    }

    /// Up to the next line feed, which is consumed and left out.
    pub(super) fn line(&mut self) -> Result<&'a str> {
        let rest = &self.bytes[self.at..];
        let length = rest.iter().position(|b| *b == b'\n').ok_or_else(|| anyhow!("a line does not end"))?;
        self.at += length + 1;
        std::str::from_utf8(&rest[..length]).map_err(|_| anyhow!("a line is not text"))
    }

    pub(super) fn text(&mut self, length: u64) -> Result<Item> {
        let text = std::str::from_utf8(self.take(length)?).map_err(|_| anyhow!("a string is not UTF-8"))?;
        Ok(Item::Plain(Value::String(text.into())))
    }

    pub(super) fn blob(&mut self, length: u64) -> Result<Item> {
        Ok(Item::Plain(Value::Bytes(self.take(length)?.into())))
    }

    /// A string of Python 2, which is text or bytes.
    pub(super) fn old_string(&mut self, length: u64) -> Result<Item> {
        Ok(Item::Plain(old_string(self.take(length)?)))
    }

    pub(super) fn long(&mut self, length: u64) -> Result<Item> {
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

pub(super) fn integer(text: &str) -> Result<Value> {
    let text = text.trim();
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        bail!("`{}` is no integer", shorten(text));
    }
    Ok(text.parse().map_or_else(|_| Value::BigInt(text.as_bytes().into()), Value::Int))
}

pub(super) fn old_string(bytes: &[u8]) -> Value {
    match std::str::from_utf8(bytes) {
        Ok(text) if bytes.is_ascii() => Value::String(text.into()),
        _ => Value::Bytes(bytes.into()),
    }
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Escapes {
    /// `\u0041` and `\U00000041` only.
    Unicode,
    /// As in a byte string's source: `\x41`, `\101`, `\n`, …
    Bytes,
}

pub(super) fn unescape(text: &str, escapes: Escapes) -> Result<Vec<char>> {
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

pub(super) fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}
