//! Text that people and other programs wrote: UTF-8, with or without the byte order mark that Windows' programs put
//! before it.

use std::{fs, io, path::Path};

/// U+FEFF: says at the start of a file that it is Unicode, and is no letter of the text.
pub const BYTE_ORDER_MARK: char = '\u{feff}';

/// The text of a file.
///
/// # Errors
/// The disk's; bytes that are not UTF-8.
pub fn read_text(path: &Path) -> io::Result<String> {
    let mut text = fs::read_to_string(path)?;
    if text.starts_with(BYTE_ORDER_MARK) {
        text.drain(..BYTE_ORDER_MARK.len_utf8());
    }
    Ok(text)
}

/// Without white space and byte order marks around it: one stands inside a file where several were joined.
pub fn trim(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || c == BYTE_ORDER_MARK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_no_letter() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "\u{feff}a ball").unwrap();
        assert_eq!(read_text(file.path()).unwrap(), "a ball");
        fs::write(file.path(), "\u{feff}").unwrap();
        assert_eq!(read_text(file.path()).unwrap(), "");
        assert_eq!((trim(" \u{feff} a b\t\n"), trim("\u{feff}")), ("a b", ""));
    }
}
