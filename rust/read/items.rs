//! Text as one JSON array: its elements are the rows.
//!
//! Only the structure of the array is looked at here: where strings begin and end, and which brackets are open. Each
//! element is scanned as strictly as a line, so that both together take exactly the arrays that JSON knows.

use super::block::{Block, Cursor, Line};

/// Why the structure of an array is broken, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Broken {
    pub(super) line: u64,
    pub(super) byte: u64,
    pub(super) message: String,
}

/// What may come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The bracket that opens the array, behind a byte-order mark and white space.
    Before,
    /// The first element, or the end of an empty array.
    First,
    /// An element, behind a comma.
    Next,
    /// More of an element: outside of its strings, inside one, behind a backslash.
    Plain,
    Text,
    Escaped,
    /// Nothing but white space.
    Behind,
}

/// Cuts a text that is one array at the commas between its elements.
#[derive(Debug)]
pub(super) struct Items {
    /// Bytes of one element.
    most: usize,
    state: State,
    /// Brackets that are open inside the element.
    depth: usize,
    /// The element passed the limit and is thrown away.
    skipping: bool,
    /// Of the element: its number, its line and its offset.
    row: u64,
    row_line: u64,
    row_byte: u64,
    /// Of what was seen: the line, and the offset.
    line: u64,
    byte: u64,
}

impl Items {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            state: State::Before,
            depth: 0,
            skipping: false,
            row: 0,
            row_line: 1,
            row_byte: 0,
            line: 1,
            byte: 0,
        }
    }

    /// Notes the elements that end in the bytes not seen yet.
    ///
    /// # Errors
    /// [`Broken`] where no JSON goes on like this.
    pub(super) fn cut(&mut self, block: &mut Block, at: &mut Cursor) -> Result<(), Broken> {
        while let Some(&byte) = block.bytes.get(at.seen) {
            if self.state == State::Text {
                let rest = block.bytes.get(at.seen..).unwrap_or_default();
                // A raw newline in a string is a fault of the element, but a line nevertheless.
                let plain = memchr::memchr3(b'"', b'\\', b'\n', rest).unwrap_or(rest.len());
                at.seen += plain;
                self.byte += plain as u64;
                let Some(byte) = block.bytes.get(at.seen) else { break };
                match byte {
                    b'"' => self.state = State::Plain,
                    b'\\' => self.state = State::Escaped,
                    _ => self.line += 1,
                }
            } else {
                self.step(byte, block, at)?;
            }
            at.seen += 1;
            self.byte += 1;
        }
        match self.state {
            State::Plain | State::Text | State::Escaped => {
                if at.seen - at.start > self.most {
                    self.skipping = true;
                }
                if self.skipping {
                    // Nothing of an over-long element is kept.
                    block.bytes.truncate(at.start);
                    at.seen = at.start;
                }
            }
            _ => at.start = at.seen,
        }
        Ok(())
    }

    /// One byte outside of strings.
    fn step(&mut self, byte: u8, block: &mut Block, at: &mut Cursor) -> Result<(), Broken> {
        match (self.state, byte) {
            (State::Escaped, _) => {
                self.line += u64::from(byte == b'\n');
                self.state = State::Text;
            }
            (_, b'\n') => self.line += 1,
            (State::Before, b'[') => self.state = State::First,
            // Before the bracket stands a byte-order mark, or the text would not be read as an array.
            (State::Before, _)
            | (State::First | State::Next | State::Behind, b' ' | b'\t' | b'\r') => {}
            (State::First, b']') => self.state = State::Behind,
            (State::First | State::Next, b']' | b',') => {
                let expected =
                    if self.state == State::Next { "behind the comma" } else { "or `]`" };
                return Err(self.broken(format!(
                    "expected an element of the array {expected}, found `{}`",
                    char::from(byte)
                )));
            }
            (State::Behind, _) => {
                let rest = block.bytes.get(at.seen..).unwrap_or_default();
                let rest = rest.get(..4).unwrap_or(rest);
                let found = String::from_utf8_lossy(rest).chars().next().unwrap_or_default();
                return Err(self.broken(format!(
                    "expected the end of the file behind the array, found `{}`\nhint: rows are \
                     objects, one a line, or in one array a file",
                    found.escape_debug()
                )));
            }
            (State::First | State::Next, _) => {
                (self.depth, self.row, self.row_line, self.row_byte) =
                    (0, self.row + 1, self.line, self.byte);
                at.start = at.seen;
                self.state = State::Plain;
                return self.step(byte, block, at);
            }
            (_, b'"') => self.state = State::Text,
            (_, b'{' | b'[') => self.depth += 1,
            (_, b'}' | b']') if self.depth > 0 => self.depth -= 1,
            (_, b']') => {
                self.push(block, at);
                self.state = State::Behind;
            }
            (_, b',') if self.depth == 0 => {
                self.push(block, at);
                self.state = State::Next;
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes the element that ends before the current byte.
    fn push(&mut self, block: &mut Block, at: &mut Cursor) {
        let text = block.bytes.get(at.start..at.seen).unwrap_or_default();
        // A form feed is no white space of JSON.
        let blank = text.iter().rev().take_while(|byte| b" \t\r\n".contains(byte)).count();
        let length = text.len() - blank;
        let too_long = std::mem::take(&mut self.skipping) || length > self.most;
        block.lines.push(Line {
            start: at.start,
            end: at.start + if too_long { 0 } else { length },
            number: self.row_line,
            row: Some(self.row),
            byte: self.row_byte,
            too_long,
        });
        at.start = at.seen;
    }

    /// What is wrong if the text ends here.
    ///
    /// # Errors
    /// [`Broken`] unless the array is closed.
    pub(super) fn end(&self) -> Result<(), Broken> {
        if self.state == State::Behind {
            return Ok(());
        }
        let message = match self.state {
            State::Text | State::Escaped => {
                let (row, line) = (self.row, self.row_line);
                format!(
                    "expected `\"` at the end of a string in row {row}, which begins in line \
                     {line}, found the end of the file"
                )
            }
            _ => "expected `]` at the end of the array, found the end of the file".to_owned(),
        };
        Err(self
            .broken(format!("{message}\nhint: it may have been cut off: write or fetch it again")))
    }

    fn broken(&self, message: String) -> Broken {
        Broken { line: self.line, byte: self.byte, message }
    }
}
