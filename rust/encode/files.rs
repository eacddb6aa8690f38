//! Rows of files, all at once or some at a time.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rayon::prelude::*;

use super::{CHUNK, Encoded, OnBad, Origin, Progress, row_error, settle};
use crate::error::Result;
use crate::pair::{Options, Pair, encode};
use crate::read::limits::Limits;
use crate::read::row::{Bad, Row};
use crate::read::{Block, Line, Reader, text};
use crate::tokenize::Tokenizer;

fn line_result<'b>(
    bytes: &'b [u8],
    line: &Line,
    options: &Options,
    vocab: usize,
) -> Result<Row<'b>, Bad> {
    if line.too_long {
        let most = options.limits.max_line_bytes;
        return Err(Bad::new(
            "limit",
            "max_line_bytes",
            format!("the line has more than {most} bytes"),
        ));
    }
    let text = text(bytes.get(line.start..line.end).unwrap_or_default())?;
    Row::from_line(text, &options.keys, &options.limits, vocab)
}

/// Encodes the rows of files.
///
/// # Errors
/// The first bad row unless `on_bad` skips, anything wrong with a file as a whole, [`Error::Interrupted`].
pub fn encode_files(
    paths: &[PathBuf],
    tokenizer: &Tokenizer,
    options: &Options,
    on_bad: OnBad,
    progress: &Progress,
) -> Result<Encoded> {
    let mut files = FileEncoder::new(paths.to_vec(), options.limits.clone());
    Ok(files.next(u64::MAX, tokenizer, options, on_bad, progress)?.unwrap_or_default())
}

/// The pairs of files, some at a time, so that they need not fit in memory.
#[derive(Debug)]
pub struct FileEncoder {
    blocks: Blocks,
    /// Rows read by the calls so far.
    read: u64,
}

impl FileEncoder {
    /// Files that are opened when their turn comes.
    pub fn new(paths: Vec<PathBuf>, limits: Limits) -> Self {
        Self { blocks: Blocks::new(paths, limits), read: 0 }
    }

    /// At least `pairs` further pairs, with what became of the rows that gave them; `None` behind the last row.
    ///
    /// All parts together are what [`encode_files`] gives at once: `rows` counts from the first file on.
    ///
    /// # Errors
    /// As [`encode_files`]; after one there is nothing to go on with.
    pub fn next(
        &mut self,
        pairs: u64,
        tokenizer: &Tokenizer,
        options: &Options,
        on_bad: OnBad,
        progress: &Progress,
    ) -> Result<Option<Encoded>> {
        let vocab = tokenizer.vocab_size();
        let drops_long = options.truncation == crate::pair::Truncation::Drop;
        let one = |block: &Block, lines: &[Line], path: &Path| -> Result<Encoded> {
            let (mut out, mut pair) = (Encoded::default(), Pair::default());
            for line in lines {
                progress.check()?;
                let result = match line_result(&block.bytes, line, options, vocab) {
                    Ok(row) => encode(row, tokenizer, options, &mut pair),
                    Err(bad) => Err(bad.into()),
                };
                let origin = Origin { path: Some(path), line: line.number, byte: Some(line.byte) };
                settle(&mut out, result, &pair, &origin, drops_long, on_bad)?;
            }
            progress.rows.fetch_add(lines.len() as u64, Ordering::Relaxed);
            Ok(out)
        };
        let mut all = Encoded::default();
        let mut is_end = true;
        while all.tally.kept < pairs
            && self.blocks.step(progress, |block, path| {
                let parts: Vec<Result<Encoded>> =
                    block.lines.par_chunks(CHUNK).map(|lines| one(block, lines, path)).collect();
                for part in parts {
                    all.append(part?);
                }
                let (count, first) = block.blank;
                if let Some(blank) = all.tally.warned.last_mut() {
                    blank.add(count, || {
                        let origin = Origin { path: Some(path), line: first, byte: None };
                        (origin.place(None, None), String::new())
                    });
                }
                all.bytes += block.bytes.len() as u64;
                Ok(())
            })?
        {
            is_end = false;
        }
        for row in &mut all.rows {
            *row += self.read as i64;
        }
        self.read += all.tally.read;
        Ok((!is_end).then_some(all))
    }
}

/// A file that is being read, and its next block.
#[derive(Debug)]
struct Open {
    path: PathBuf,
    reader: Reader,
    block: Option<Block>,
}

/// The blocks of several files, in order.
#[derive(Debug)]
struct Blocks {
    paths: std::vec::IntoIter<PathBuf>,
    limits: Limits,
    open: Option<Open>,
    /// Bytes of the files done with.
    before: u64,
}

impl Blocks {
    fn new(paths: Vec<PathBuf>, limits: Limits) -> Self {
        Self { paths: paths.into_iter(), limits, open: None, before: 0 }
    }

    /// Calls `work` with the next block, while another thread, if there is one, reads the one after; false at the end.
    fn step(
        &mut self,
        progress: &Progress,
        work: impl FnOnce(&Block, &Path) -> Result<()> + Send,
    ) -> Result<bool> {
        loop {
            progress.check()?;
            let mut open = match self.open.take() {
                Some(open) => open,
                None => match self.paths.next() {
                    Some(path) => {
                        let mut reader = Reader::open(&path, &self.limits)?;
                        let block = reader.next_block();
                        Open { path, reader, block }
                    }
                    None => return Ok(false),
                },
            };
            let packed = open.reader.packed_bytes();
            let Some(block) = open.block.take() else {
                self.before += packed;
                progress.bytes.store(self.before, Ordering::Relaxed);
                continue;
            };
            let (reader, path) = (&mut open.reader, &open.path);
            let (done, next) = rayon::join(
                || work(&block, path),
                || block.failure.is_none().then(|| reader.next_block()).flatten(),
            );
            done?;
            if let Some(failure) = block.failure {
                return Err(failure);
            }
            // Of a packed file only the unpacked position is known; it is at least a bound.
            let read = self.before + packed.min(open.reader.unpacked_bytes());
            progress.bytes.store(read, Ordering::Relaxed);
            open.block = next;
            self.open = Some(open);
            return Ok(true);
        }
    }
}

/// Reads and parses files without encoding: how many rows, and bytes of text. A step of `encode_files`, to time alone.
///
/// # Errors
/// As [`encode_files`], for what parsing can find.
pub fn scan_files(
    paths: &[PathBuf],
    options: &Options,
    on_bad: OnBad,
    vocab: usize,
    progress: &Progress,
) -> Result<(u64, u64)> {
    let mut rows = 0;
    let mut bytes = 0;
    let mut blocks = Blocks::new(paths.to_vec(), options.limits.clone());
    while blocks.step(progress, |block, path| {
        let parts: Vec<Result<()>> = block
            .lines
            .par_chunks(CHUNK)
            .map(|lines| {
                for line in lines {
                    progress.check()?;
                    if let Err(bad) = line_result(&block.bytes, line, options, vocab)
                        && on_bad == OnBad::Error
                    {
                        let origin =
                            Origin { path: Some(path), line: line.number, byte: Some(line.byte) };
                        let place = origin.place(bad.field.clone(), bad.byte);
                        return Err(row_error(bad, place));
                    }
                }
                Ok(())
            })
            .collect();
        parts.into_iter().collect::<Result<()>>()?;
        rows += block.lines.len() as u64;
        bytes += block.bytes.len() as u64;
        Ok(())
    })? {}
    Ok((rows, bytes))
}
