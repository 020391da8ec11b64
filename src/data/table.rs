//! Tables of separated values (RFC 4180), read row by row and strictly: a row that does not fit is told apart, and costs
//! no other row.

use std::{
    collections::VecDeque,
    io::{self, BufRead},
};

use crate::text_file::{BYTE_ORDER_MARK, trim};

/// Bytes of one row at most: a quote that is never closed reaches no further.
const LONGEST_ROW: usize = 1 << 16;

/// One row.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// On which it begins, from 1.
    pub line: usize,
    /// Its cells without quotes, or why it has none.
    pub cells: Result<Vec<String>, &'static str>,
}

/// The rows of a text, the header among them. Lines end in LF, CRLF or CR; empty ones are no rows.
pub struct Rows<R> {
    input: R,
    separator: u8,
    /// Lines that a row in quotes was looked for in, and which are read again after it.
    ahead: VecDeque<Vec<u8>>,
    /// Lines that were handed out.
    lines: usize,
}

impl<R: BufRead> Rows<R> {
    /// What is between two cells is `separator`, outside of quotes.
    pub fn new(input: R, separator: u8) -> Self {
        Rows { input, separator, ahead: VecDeque::new(), lines: 0 }
    }

    /// The next line, with its end.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        if let Some(line) = self.ahead.pop_front() {
            return Ok(Some(line));
        }
        let mut line = Vec::new();
        loop {
            let bytes = self.input.fill_buf()?;
            if bytes.is_empty() || line.last() == Some(&b'\r') {
                // LF behind CR belongs to the same end
                if bytes.first() == Some(&b'\n') {
                    line.push(b'\n');
                    self.input.consume(1);
                }
                break;
            }
            let end = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let count = end.map_or(bytes.len(), |end| end + 1);
            line.extend_from_slice(&bytes[..count]);
            self.input.consume(count);
            if line.last() == Some(&b'\n') {
                break;
            }
        }
        Ok((!line.is_empty()).then_some(line))
    }

    /// The next row; none behind the last one.
    ///
    /// # Errors
    /// The disk's.
    pub fn next_row(&mut self) -> io::Result<Option<Row>> {
        loop {
            let Some(first) = self.line()? else { return Ok(None) };
            self.lines += 1;
            let begins_file = self.lines == 1;
            let line = self.lines;
            let row = |cells| Ok(Some(Row { line, cells }));
            let mark = BYTE_ORDER_MARK.to_string();
            let first = first.strip_prefix(mark.as_bytes()).filter(|_| begins_file).unwrap_or(&first);
            if first.iter().all(|byte| matches!(byte, b'\n' | b'\r')) {
                continue;
            }
            let mut cells = Cells::new(self.separator);
            let (mut taken, mut length, mut more) = (cells.take(first), first.len(), Vec::new());
            let why = loop {
                match taken {
                    Taken::Whole => {
                        self.lines += more.len();
                        let texts: Result<_, _> = cells.done.into_iter().map(String::from_utf8).collect();
                        return row(texts.map_err(|_| "is not UTF-8"));
                    }
                    Taken::Wrong => break "has something behind a closing quote",
                    Taken::Open => {}
                }
                let Some(line) = (if length < LONGEST_ROW { self.line()? } else { None }) else {
                    break "has a quote that is not closed";
                };
                (taken, length) = (cells.take(&line), length + line.len());
                more.push(line);
            };
            more.into_iter().rev().for_each(|line| self.ahead.push_front(line));
            return row(Err(why));
        }
    }
}

/// The cells of a row as far as its lines are read.
struct Cells {
    separator: u8,
    done: Vec<Vec<u8>>,
    /// The one that is being read, and whether in quotes.
    cell: Vec<u8>,
    in_quotes: bool,
}

/// How a row stands behind one of its lines.
enum Taken {
    Whole,
    /// In quotes.
    Open,
    /// A closing quote is followed by something else than a separator.
    Wrong,
}

impl Cells {
    fn new(separator: u8) -> Self {
        Cells { separator, done: Vec::new(), cell: Vec::new(), in_quotes: false }
    }

    fn take(&mut self, line: &[u8]) -> Taken {
        let end = line.iter().rposition(|byte| !matches!(byte, b'\n' | b'\r')).map_or(0, |last| last + 1);
        let mut at = 0;
        loop {
            if !self.in_quotes && line[at..end].first() == Some(&b'"') {
                self.in_quotes = true;
                at += 1;
            }
            if self.in_quotes {
                loop {
                    match (line.get(at), line.get(at + 1)) {
                        (None, _) => return Taken::Open,
                        (Some(b'"'), Some(b'"')) => {
                            self.cell.push(b'"');
                            at += 2;
                        }
                        (Some(b'"'), _) => break,
                        (Some(&byte), _) => {
                            self.cell.push(byte);
                            at += 1;
                        }
                    }
                }
                self.in_quotes = false;
                at += 1;
                if at < end && line[at] != self.separator {
                    return Taken::Wrong;
                }
            } else {
                let length = line[at..end].iter().position(|byte| *byte == self.separator).unwrap_or(end - at);
                self.cell.extend_from_slice(&line[at..at + length]);
                at += length;
            }
            self.done.push(std::mem::take(&mut self.cell));
            if at >= end {
                return Taken::Whole;
            }
            at += 1;
        }
    }
}

/// A header's names as they are compared: without white space around them.
pub fn names(header: &[String]) -> Vec<&str> {
    header.iter().map(|name| trim(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &[u8]) -> Vec<(usize, Result<Vec<String>, &'static str>)> {
        let mut rows = Rows::new(text, b',');
        std::iter::from_fn(|| rows.next_row().unwrap()).map(|row| (row.line, row.cells)).collect()
    }

    fn good(line: usize, cells: &[&str]) -> (usize, Result<Vec<String>, &'static str>) {
        (line, Ok(cells.iter().map(|cell| cell.to_string()).collect()))
    }

    #[test]
    fn quotes_hold_separators_line_ends_and_quotes() {
        let text =
            b"\xef\xbb\xbf\"a\",b\r\n1,\"x, \"\"y\"\"\r\nz\"\r\n\r\n2,\r3, 5\" pipe \n\"\",\"\"\n,\n\"last\",one";
        let expected = [
            good(1, &["a", "b"]),
            good(2, &["1", "x, \"y\"\r\nz"]),
            good(5, &["2", ""]),
            good(6, &["3", " 5\" pipe "]),
            good(7, &["", ""]),
            good(8, &["", ""]),
            good(9, &["last", "one"]),
        ];
        assert_eq!(rows(text), expected);
        assert_eq!(rows(b""), []);
        assert_eq!(rows(b"\n\n"), []);
        assert_eq!(rows(b"\"a\nb\"\n"), [good(1, &["a\nb"])]);
    }

    /// A quote that is open, in the middle or at the end, costs the row that it stands in and none behind it.
    #[test]
    fn an_open_quote_costs_its_own_row() {
        let open = Err("has a quote that is not closed");
        assert_eq!(
            rows(b"1,a\n2,\"b\n3,c\n4,d"),
            [good(1, &["1", "a"]), (2, open.clone()), good(3, &["3", "c"]), good(4, &["4", "d"])]
        );
        let behind = Err("has something behind a closing quote");
        assert_eq!(
            rows(b"1,\"a\n2,b\n3,\"c\"\n4,d"),
            [(1, behind), good(2, &["2", "b"]), good(3, &["3", "c"]), good(4, &["4", "d"])]
        );
        // however long the text is
        let mut long = b"1,\"a\n".to_vec();
        (0..100_000).for_each(|_| long.extend_from_slice(b"2,b\n"));
        let found = rows(&long);
        assert_eq!((found.len(), &found[0], &found[99_999]), (100_001, &(1, open), &good(100_000, &["2", "b"])));
        assert_eq!(rows(b"a\xff,b\nc,d\n"), [(1, Err("is not UTF-8")), good(2, &["c", "d"])]);
    }
}
