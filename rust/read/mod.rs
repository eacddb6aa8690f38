//! Files to lines: plain, gzip or zstd, in blocks of whole lines.

pub mod bad;
pub mod cell;
mod cells;
pub mod chat;
pub mod column;
pub mod json;
pub mod keys;
pub mod layouts;
pub mod limits;
mod packed;
pub mod row;
pub mod said;
mod text;
pub mod turns;

use std::fs::{File, Metadata};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use crate::error::{Error, Place, Reason, Result};
use limits::{EXPANSION_GRACE, Limits};
use packed::{Frames, Members};
pub use text::text;

/// One line of a block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Line {
    /// Start inside the block's bytes.
    pub start: usize,
    /// End inside the block's bytes, without the line's end.
    pub end: usize,
    /// 1-based line of the unpacked text.
    pub number: u64,
    /// Offset of the line in the unpacked text.
    pub byte: u64,
    /// The line passed `max_line_bytes` and is not here.
    pub too_long: bool,
}

/// Some lines of one file, in order; blank ones are left out.
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

/// Lines, or bytes, after which a block ends.
const BLOCK_LINES: usize = 2048;
const BLOCK_BYTES: usize = 4 << 20;
const READ_BYTES: usize = 256 << 10;

/// Reads the lines of one file.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    limits: Limits,
    before: Metadata,
    source: Source,
    /// The start of a line whose end is not read yet.
    rest: Vec<u8>,
    /// Where the current line began, if it passed the limit and is thrown away.
    skipping: Option<u64>,
    line: u64,
    byte: u64,
    unpacked: u64,
    done: bool,
}

#[derive(Debug)]
enum Source {
    Plain(BufReader<File>),
    Gzip(Members),
    Zstd(Frames),
}

impl Reader {
    /// Opens a regular file and looks at its first bytes.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses; [`Error::Data`] for anything but a regular file with lines, plain, gzip or zstd.
    pub fn open(path: &Path, limits: &Limits) -> Result<Self> {
        let io_error = |source| Error::Io { path: path.to_owned(), source };
        let bad = |message: &str| Error::Data {
            place: Place { path: Some(path.to_owned()), ..Place::default() },
            reason: Reason::BadInput,
            message: message.to_owned(),
        };
        // Before opening, since opening a FIFO waits for a writer.
        let metadata = std::fs::metadata(path).map_err(io_error)?;
        if metadata.is_dir() {
            return Err(io_error(io::Error::from_raw_os_error(IS_A_DIRECTORY)));
        }
        if !metadata.is_file() {
            return Err(bad("expected a regular file, found a pipe, a socket or a device"));
        }
        let file = File::open(path).map_err(io_error)?;
        let before = file.metadata().map_err(io_error)?;
        let mut inner = BufReader::with_capacity(READ_BYTES, file);
        let head = inner.fill_buf().map_err(io_error)?;
        let named = |what| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(what));
        let source = match head {
            [0x1f, 0x8b, ..] => Source::Gzip(Members::new(inner)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Source::Zstd(Frames::new(inner).map_err(io_error)?)
            }
            [_, ..] if named("gz") => {
                return Err(bad("expected gzip, as the name says, found other bytes"));
            }
            [_, ..] if named("zst") => {
                return Err(bad("expected zstd, as the name says, found other bytes"));
            }
            [b'P', b'A', b'R', b'1', ..] => {
                return Err(bad("expected JSONL, gzip or zstd, found Parquet"));
            }
            _ => Source::Plain(inner),
        };
        Ok(Self {
            path: path.to_owned(),
            limits: limits.clone(),
            before,
            source,
            rest: Vec::new(),
            skipping: None,
            line: 1,
            byte: 0,
            unpacked: 0,
            done: false,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size of the file as it lies on disk.
    pub fn packed_bytes(&self) -> u64 {
        self.before.len()
    }

    /// Bytes of text so far.
    pub fn unpacked_bytes(&self) -> u64 {
        self.unpacked
    }

    /// The next lines, or `None` at the end. A failure comes with the lines before it, and ends the file.
    pub fn next_block(&mut self) -> Option<Block> {
        if self.done {
            return None;
        }
        let mut block = Block { bytes: std::mem::take(&mut self.rest), ..Block::default() };
        // `bytes[start..]` is the current line, `bytes[seen..]` was not searched for its end yet.
        let (mut start, mut seen) = (0, block.bytes.len());
        loop {
            let old = block.bytes.len();
            block.bytes.resize(old + READ_BYTES, 0);
            let read = match &mut self.source {
                Source::Plain(inner) => inner.read(block.bytes.get_mut(old..).unwrap_or_default()),
                Source::Gzip(inner) => inner.read(block.bytes.get_mut(old..).unwrap_or_default()),
                Source::Zstd(inner) => inner.read(block.bytes.get_mut(old..).unwrap_or_default()),
            };
            let n = match read {
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    block.bytes.truncate(old);
                    continue;
                }
                Err(e) => {
                    self.done = true;
                    block.bytes.truncate(start);
                    block.failure = Some(self.read_error(e));
                    return Some(block);
                }
            };
            block.bytes.truncate(old + n);
            self.unpacked += n as u64;
            if n == 0 {
                self.done = true;
                if start < block.bytes.len() || self.skipping.is_some() {
                    let end = block.bytes.len();
                    self.push(&mut block, start, end, false);
                }
                block.failure = self.changed();
                return Some(block);
            }
            if let Some(failure) = self.expanded() {
                self.done = true;
                block.failure = Some(failure);
                return Some(block);
            }
            while let Some(step) =
                memchr::memchr(b'\n', block.bytes.get(seen..).unwrap_or_default())
            {
                let end = seen + step;
                self.push(&mut block, start, end, true);
                start = end + 1;
                seen = start;
            }
            seen = block.bytes.len();
            if self.skipping.is_none()
                && seen - start > self.limits.max_line_bytes.saturating_add(1)
            {
                self.skipping = Some(self.byte);
            }
            if self.skipping.is_some() {
                // Nothing of an over-long line is kept.
                self.byte += (seen - start) as u64;
                block.bytes.truncate(start);
                seen = start;
            }
            if block.lines.len() >= BLOCK_LINES || start >= BLOCK_BYTES {
                self.rest = block.bytes.split_off(start);
                return Some(block);
            }
        }
    }

    /// Notes the line `bytes[start..end]`, whose end is a newline unless it is the file's last.
    fn push(&mut self, block: &mut Block, start: usize, end: usize, newline: bool) {
        let number = self.line;
        let skipped = self.skipping.take();
        let byte = skipped.unwrap_or(self.byte);
        self.line += 1;
        self.byte += (end - start) as u64 + u64::from(newline);
        let text = block.bytes.get(start..end).unwrap_or_default();
        let mut end = if text.last() == Some(&b'\r') { end - 1 } else { end };
        let line_start = start;
        let mut start = start;
        if byte == 0 && text.starts_with(b"\xef\xbb\xbf") && skipped.is_none() {
            start = (start + 3).min(end);
        }
        let too_long = skipped.is_some() || end - start > self.limits.max_line_bytes;
        if too_long {
            end = start;
        } else if block
            .bytes
            .get(start..end)
            .is_some_and(|text| text.iter().all(|b| matches!(b, b' ' | b'\t' | b'\r')))
        {
            if block.blank.0 == 0 {
                block.blank.1 = number;
            }
            block.blank.0 += 1;
            return;
        }
        block.lines.push(Line {
            start,
            end,
            number,
            byte: byte + (start - line_start) as u64,
            too_long,
        });
    }

    fn place(&self) -> Place {
        Place { path: Some(self.path.clone()), ..Place::default() }
    }

    fn read_error(&self, error: io::Error) -> Error {
        let packing = match self.source {
            Source::Plain(_) => None,
            Source::Gzip(_) => Some(("gzip", "member")),
            Source::Zstd(_) => Some(("zstd", "frame")),
        };
        let Some((name, unit)) = packing.filter(|_| error.raw_os_error().is_none()) else {
            return Error::Io { path: self.path.clone(), source: error };
        };
        if packed::is_window_too_large(&error) {
            let message = format!(
                "a zstd frame asks for a window of more than 2^{} bytes",
                packed::MAX_WINDOW_LOG
            );
            let field = Some("zstd_window".to_owned());
            return Error::Limit { place: Place { field, ..self.place() }, message };
        }
        let message = match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                format!("expected a whole {name} {unit}, found the end of the file")
            }
            _ => format!("damaged {name}: {error}"),
        };
        Error::Data {
            place: Place { byte: Some(self.unpacked), ..self.place() },
            reason: Reason::BadInput,
            message,
        }
    }

    /// An error if the unpacked text passes a limit.
    fn expanded(&self) -> Option<Error> {
        let limit = |name: &str, message: String| {
            let place = Place { field: Some(name.to_owned()), ..self.place() };
            Some(Error::Limit { place, message })
        };
        if let Some(most) = self.limits.max_unpacked_bytes
            && self.unpacked > most
        {
            return limit("max_unpacked_bytes", format!("the text has more than {most} bytes"));
        }
        let packed = self.before.len().max(1);
        let most = self.limits.max_expansion;
        if self.unpacked > EXPANSION_GRACE && self.unpacked / packed >= most {
            return limit(
                "max_expansion",
                format!("the text has more than {most} times the bytes of the file"),
            );
        }
        None
    }

    /// An error if the file is not what it was when it was opened.
    fn changed(&self) -> Option<Error> {
        let (file, read) = match &self.source {
            Source::Plain(inner) => (Some(inner.get_ref()), Some(self.unpacked)),
            Source::Gzip(inner) => (inner.file(), None),
            Source::Zstd(inner) => (Some(inner.file()), None),
        };
        let after = match file?.metadata() {
            Ok(after) => after,
            Err(source) => return Some(Error::Io { path: self.path.clone(), source }),
        };
        let same = after.len() == self.before.len()
            && after.modified().ok() == self.before.modified().ok()
            && read.is_none_or(|read| read == after.len());
        (!same).then(|| Error::Data {
            place: self.place(),
            reason: Reason::BadInput,
            message: "the file changed while it was read".to_owned(),
        })
    }
}

const IS_A_DIRECTORY: i32 = 21;
