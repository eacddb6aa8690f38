//! Files to rows: plain, gzip or zstd, lines or one array, in blocks of whole rows.

pub mod bad;
mod block;
pub mod cell;
mod cells;
pub mod chat;
pub mod column;
mod foreign;
mod items;
pub mod json;
pub mod keys;
pub mod layouts;
pub mod limits;
mod lines;
mod packed;
pub mod quotes;
pub mod row;
pub mod said;
mod shape;
mod single;
pub mod source;
mod text;
pub mod turns;
pub mod weights;

use std::path::Path;

use crate::error::{Error, Place, Reason, Result};
use block::Cursor;
pub use block::{Block, Line};
use items::{Broken, Items};
use limits::Limits;
use lines::Lines;
use shape::{Shape, shape};
use source::{READ_BYTES, Source};
pub use text::text;

/// Rows, or bytes, after which a block ends.
const BLOCK_LINES: usize = 2048;
const BLOCK_BYTES: usize = 4 << 20;

/// Reads the rows of one file: lines, or the elements of the array that it is.
#[derive(Debug)]
pub struct Reader {
    source: Source,
    limits: Limits,
    /// `None` before the first block.
    cut: Option<Cut>,
    /// The start of a row whose end is not read yet.
    rest: Vec<u8>,
    done: bool,
}

#[derive(Debug)]
enum Cut {
    Lines(Lines),
    Items(Items),
}

impl Reader {
    /// Opens a regular file and looks at its first bytes.
    ///
    /// # Errors
    /// As [`Source::open`].
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let source = Source::open(path, limits)?;
        Ok(Self { source, limits: limits.clone(), cut: None, rest: Vec::new(), done: false })
    }

    /// Size of the file as it lies on disk.
    pub fn packed_bytes(&self) -> u64 {
        self.source.packed_bytes()
    }

    /// Bytes of text so far.
    pub fn unpacked_bytes(&self) -> u64 {
        self.source.unpacked_bytes()
    }

    /// The next rows, or `None` at the end. A failure comes with the rows before it, and ends the file.
    pub fn next_block(&mut self) -> Option<Block> {
        if self.done {
            return None;
        }
        let mut block = Block { bytes: std::mem::take(&mut self.rest), ..Block::default() };
        if self.cut.is_some() {
            // A file of several reads may well fill the block.
            block.bytes.reserve_exact(BLOCK_BYTES + READ_BYTES);
        }
        let mut at = Cursor { start: 0, seen: block.bytes.len() };
        match self.fill(&mut block, &mut at) {
            Ok(true) => self.rest = block.bytes.split_off(at.start),
            Ok(false) => self.done = true,
            Err(failure) => {
                self.done = true;
                block.failure = Some(failure);
            }
        }
        Some(block)
    }

    /// Reads rows into a block until it is full; false at the end of the file.
    fn fill(&mut self, block: &mut Block, at: &mut Cursor) -> Result<bool> {
        let cut = match &mut self.cut {
            Some(cut) => cut,
            empty => {
                block.bytes = self.source.head(READ_BYTES)?;
                *at = Cursor::default();
                let most = self.limits.max_line_bytes;
                empty.insert(match shape(&block.bytes, &self.limits) {
                    Ok(Shape::Lines) => Cut::Lines(Lines::new(most)),
                    Ok(Shape::Items) => Cut::Items(Items::new(most)),
                    Err((line, message)) => {
                        let place = Place { line: Some(line), ..self.source.place() };
                        return Err(Error::Data { place, reason: Reason::BadInput, message });
                    }
                })
            }
        };
        let broken = |source: &Source, Broken { line, byte, message }| Error::Data {
            place: Place { line: Some(line), byte: Some(byte), ..source.place() },
            reason: Reason::BadInput,
            message,
        };
        loop {
            match cut {
                Cut::Lines(lines) => lines.cut(block, at),
                Cut::Items(items) => items.cut(block, at).map_err(|e| broken(&self.source, e))?,
            }
            if block.lines.len() >= BLOCK_LINES || at.start >= BLOCK_BYTES {
                return Ok(true);
            }
            if self.source.read_onto(&mut block.bytes, READ_BYTES)? == 0 {
                match cut {
                    Cut::Lines(lines) => lines.end(block, *at),
                    Cut::Items(items) => items.end().map_err(|e| broken(&self.source, e))?,
                }
                return Ok(false);
            }
        }
    }
}
