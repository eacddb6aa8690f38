//! The quotes of a table of text: pyarrow takes a field whose quote is never closed, and drops what is wrong behind one.

/// What is wrong with the quotes of a table, and in which of its rows; the header is row 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// 1-based among the rows behind the header.
    pub row: u64,
    /// Expected, then found.
    pub message: String,
    /// The row is longer than a limit, and nothing else is wrong.
    pub too_long: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// At the start of a row, or of a field.
    Row,
    Field,
    /// In a field without quotes, in which a quote is text.
    Bare,
    /// In a field with quotes; behind a quote in it, which may be the first of two.
    Quoted,
    Quote,
}

/// Follows the quotes of a table as RFC 4180 has them, and the length of its rows.
#[derive(Debug)]
pub struct Quotes {
    delimiter: u8,
    most: usize,
    state: State,
    row: u64,
    length: usize,
}

impl Quotes {
    /// For a table of this delimiter, with at most so many bytes a row.
    pub fn new(delimiter: u8, most: usize) -> Self {
        Self { delimiter, most, state: State::Row, row: 0, length: 0 }
    }

    /// Follows the next bytes of the table.
    ///
    /// # Errors
    /// The first [`Fault`].
    pub fn follow(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let mut rest = bytes;
        while let Some((&byte, tail)) = rest.split_first() {
            let plain = match self.state {
                State::Quoted => memchr::memchr(b'"', rest).unwrap_or(rest.len()),
                State::Bare => {
                    memchr::memchr3(self.delimiter, b'\n', b'\r', rest).unwrap_or(rest.len())
                }
                _ => 0,
            };
            if plain > 0 {
                self.add(plain)?;
                rest = rest.get(plain..).unwrap_or_default();
                continue;
            }
            rest = tail;
            self.state = match (self.state, byte) {
                (State::Quoted, _) => State::Quote,
                (State::Quote, b'"') => State::Quoted,
                // A row of white space is none, nor is the second half of a line's end.
                (State::Row, b'\n' | b'\r') => continue,
                (_, b'\n' | b'\r') => {
                    self.row += 1;
                    self.length = 0;
                    State::Row
                }
                (_, byte) if byte == self.delimiter => State::Field,
                (State::Row | State::Field, b'"') => State::Quoted,
                (State::Quote, byte) => {
                    return Err(self.fault(format!(
                        "expected the end of the field behind the closing quote, found `{}`",
                        byte.escape_ascii()
                    )));
                }
                _ => State::Bare,
            };
            if self.state != State::Row {
                self.add(1)?;
            }
        }
        Ok(())
    }

    /// Says that the table ends here.
    ///
    /// # Errors
    /// A [`Fault`] inside a field with quotes.
    pub fn end(&self) -> Result<(), Fault> {
        if self.state == State::Quoted {
            return Err(self.fault(
                "expected `\"` at the end of the field, found the end of the file\nhint: it may \
                 have been cut off, or a quote inside a field is not doubled"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn add(&mut self, bytes: usize) -> Result<(), Fault> {
        self.length += bytes;
        if self.length <= self.most {
            return Ok(());
        }
        let message =
            format!("the row has more than {} bytes\nhint: `limits` sets another limit", self.most);
        Err(Fault { row: self.row, message, too_long: true })
    }

    fn fault(&self, message: String) -> Fault {
        Fault { row: self.row, message, too_long: false }
    }
}
