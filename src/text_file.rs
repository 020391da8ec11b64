//! Text that people and other programs wrote, as it is read from files and shown on terminals: UTF-8, with or without the byte order mark that Windows' programs put
//! before it.

use std::{fs, io, path::Path};

/// U+FEFF: says at the start of a file that it is Unicode, and is no letter of the text.
pub const BYTE_ORDER_MARK: char = '\u{feff}';

/// The text of a file.
///
/// # Errors
/// The disk's; bytes that are not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    let bytes = fs::read(path)?;
    let mut text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("it {}", not_utf8(error.as_bytes()))));
        }
    };
    if text.starts_with(BYTE_ORDER_MARK) {
        text.drain(..BYTE_ORDER_MARK.len_utf8());
    }
    Ok(text)
}

/// What there is to say of bytes that are not UTF-8.
pub fn not_utf8(bytes: &[u8]) -> &'static str {
    match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "is UTF-16, as some of Windows' programs write; save it as UTF-8",
        _ => "is not UTF-8",
    }
}

/// Without white space and byte order marks around it: one stands inside a file where several were joined.
pub fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == BYTE_ORDER_MARK)
}

/// For a terminal: names of files and other texts may hold characters that move its cursor or change its colours, and are
/// shown by their code. Line breaks stay, but a line after the first is indented, so that no name looks like a line of ours.
pub fn printable(text: &str) -> String {
    let one = |c: char| match c {
        '\n' => "\n    ".to_string(),
        '\t' => "\t".to_string(),
        c if c.is_control() => c.escape_unicode().to_string(),
        c => c.to_string(),
    };
    text.chars().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_by_their_code() {
        assert_eq!(printable("no \u{1b}[31mred\r\nerror: x\u{9b}2J"), "no \\u{1b}[31mred\\u{d}\n    error: x\\u{9b}2J");
        assert_eq!(printable("ein Café\t1"), "ein Café\t1");
    }

    #[test]
    fn a_byte_order_mark_is_no_letter() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "\u{feff}a ball").unwrap();
        assert_eq!(read_text(file.path()).unwrap(), "a ball");
        fs::write(file.path(), "\u{feff}").unwrap();
        assert_eq!(read_text(file.path()).unwrap(), "");
        for (bytes, word) in [(&b"\xff\xfea\0"[..], "UTF-16"), (b"\xfe\xff\0a", "UTF-16"), (b"caf\xe9", "not UTF-8")] {
            fs::write(file.path(), bytes).unwrap();
            assert!(read_text(file.path()).unwrap_err().to_string().contains(word));
        }
        assert_eq!((trim(" \u{feff} a b\t\n"), trim("\u{feff}")), ("a b", ""));
    }
}
