//! Tables of separated values (RFC 4180), read row by row and strictly: a row that does not fit is recognised, and costs
//! no other row. The crate csv reads an open quote to the end of the file and cannot go back to the rows behind it.

use std::{
    collections::VecDeque,
    io::{self, BufRead},
};

use crate::text_file::{BYTE_ORDER_MARK, not_utf8, trim};

/// Bytes of a line at most, and of the lines that a quote is looked for in: one that is never closed reaches no further.
const LONGEST_ROW: usize = 1 << 16;

/// One row.
#[derive(Debug, PartialEq, Eq)]
pub struct Row {
    /// On which it begins, from 1.
    pub line: usize,
    /// Its cells without quotes, or why it has none.
    pub cells: Result<Vec<String>, &'static str>,
    /// Its lines behind the first, which quotes hold together.
    more: Vec<Vec<u8>>,
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

    /// The next line, with its end; of one that is too long for a row the beginning.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        if let Some(line) = self.ahead.pop_front() {
            return Ok(Some(line));
        }
        let (mut line, mut last) = (Vec::new(), None);
        loop {
            let bytes = self.input.fill_buf()?;
            if bytes.is_empty() || last == Some(b'\r') {
                // LF behind CR belongs to the same end
                if bytes.first() == Some(&b'\n') {
                    line.push(b'\n');
                    self.input.consume(1);
                }
                break;
            }
            let end = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
            let count = end.map_or(bytes.len(), |end| end + 1);
            line.extend_from_slice(&bytes[..count.min((LONGEST_ROW + 1).saturating_sub(line.len()))]);
            last = Some(bytes[count - 1]);
            self.input.consume(count);
            if last == Some(b'\n') {
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
            let row = |cells, more| Ok(Some(Row { line, cells, more }));
            let mark = BYTE_ORDER_MARK.to_string();
            let first = first.strip_prefix(mark.as_bytes()).filter(|_| begins_file).unwrap_or(&first);
            if first.iter().all(|byte| matches!(byte, b'\n' | b'\r')) {
                continue;
            }
            if first.len() > LONGEST_ROW {
                return row(Err("is too long"), Vec::new());
            }
            let mut cells = Cells::new(self.separator);
            let (mut taken, mut length, mut more) = (cells.take(first), first.len(), Vec::new());
            let why = loop {
                match taken {
                    Taken::Whole => {
                        self.lines += more.len();
                        return row(cells.texts(), more);
                    }
                    Taken::Wrong => break "has something behind a closing quote",
                    Taken::Open => {}
                }
                let Some(line) = (if length < LONGEST_ROW { self.line()? } else { None }) else {
                    break "has a quote that is not closed";
                };
                length += line.len();
                if line.len() <= LONGEST_ROW {
                    taken = cells.take(&line);
                }
                more.push(line);
            };
            more.into_iter().rev().for_each(|line| self.ahead.push_front(line));
            return row(Err(why), Vec::new());
        }
    }

    /// The cells of each line behind the first of a row that stands on several, read as if the line were a row.
    pub fn inner<'a>(&self, row: &'a Row) -> impl Iterator<Item = Vec<String>> + use<'a, R> {
        let separator = self.separator;
        row.more.iter().filter_map(move |line| {
            let mut cells = Cells::new(separator);
            if let Taken::Whole = cells.take(line) { cells.texts().ok() } else { None }
        })
    }

    /// Takes back the lines behind the first of the row that came last: they are rows of their own.
    pub fn read_again(&mut self, row: Row) {
        self.lines -= row.more.len();
        row.more.into_iter().rev().for_each(|line| self.ahead.push_front(line));
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

    fn texts(self) -> Result<Vec<String>, &'static str> {
        let text = |cell| String::from_utf8(cell).map_err(|error| not_utf8(error.as_bytes()));
        self.done.into_iter().map(text).collect()
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
        assert!(rows(b"\xff\xfea\0,\0b\0\n\0")[0].1.as_ref().unwrap_err().starts_with("is UTF-16"));
    }

    /// A line without an end costs itself alone, and no more memory than a row may.
    #[test]
    fn a_line_without_an_end_is_not_held() {
        let long = "x".repeat(3 * LONGEST_ROW);
        let too_long = Err("is too long");
        for end in ["\n", "\r\n", "\r"] {
            let found = rows(format!("1,a{end}2,{long}{end}3,c").as_bytes());
            assert_eq!(found, [good(1, &["1", "a"]), (2, too_long.clone()), good(3, &["3", "c"])]);
        }
        let open = (1, Err("has a quote that is not closed"));
        assert_eq!(rows(format!("1,\"a\n{long}\"\n3,c").as_bytes()), [open, (2, too_long), good(3, &["3", "c"])]);
        assert_eq!(Rows::new(long.as_bytes(), b',').line().unwrap().unwrap().len(), LONGEST_ROW + 1);
    }
}
