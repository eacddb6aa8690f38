//! Rows of a text as they come from a file: a block of bytes, and where each row lies in it.

use crate::error::Error;

/// The text of one row: a line, or an element of an array.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line {
    /// Start inside the block's bytes.
    pub start: usize,
    /// End inside the block's bytes, without the line's end.
    pub end: usize,
    /// 1-based line of the unpacked text in which it begins.
    pub number: u64,
    /// Of an array: the 1-based number of the element.
    pub row: Option<u64>,
    /// Offset in the unpacked text.
    pub byte: u64,
    /// It passed `max_line_bytes` and is not here.
    pub too_long: bool,
}

/// Some rows of one file, in order; blank lines are left out.
#[derive(Debug, Default)]
pub struct Block {
    /// The bytes that the lines point into.
    pub bytes: Vec<u8>,
    /// The lines.
    pub lines: Vec<Line>,
    /// Lines of white space: how many, and the number of the first.
    pub blank: (u64, u64),
    /// What stopped the file after these lines.
    pub failure: Option<Error>,
}

/// How far the bytes of a block were read.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Cursor {
    /// Start of the row that is not whole yet.
    pub(super) start: usize,
    /// End of what was looked at.
    pub(super) seen: usize,
}
