//! Rows of files, all at once or some at a time.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rayon::prelude::*;

use super::desk::{Desk, PIECE_BYTES, PIECE_ROWS, Piece, Source};
use super::job::{CHUNK, Job, OnBad, Origin, Progress};
use super::outcome::Encoded;
use crate::error::{Error, Reason, Result, Warning};
use crate::pair::{Options, Refusal};
use crate::read::bad::Bad;
use crate::read::cell::Kind;
use crate::read::json::other_texts;
use crate::read::keys::TRLS;
use crate::read::limits::Limits;
use crate::read::row::{Row, Rules};
use crate::read::{Block, Line, Reader, text};

impl<'a> Origin<'a> {
    fn of(line: &Line, path: &'a Path) -> Self {
        Self { path: Some(path), line: Some(line.number), row: line.row, byte: Some(line.byte) }
    }
}

fn line_result<'b>(
    bytes: &'b [u8],
    line: &Line,
    names: &[&str],
    rules: &Rules<'_>,
) -> Result<Row<'b>, Bad> {
    if line.too_long {
        let most = rules.limits.max_line_bytes;
        let what = if line.row.is_some() { "row" } else { "line" };
        return Err(Bad::new(
            Reason::Limit,
            "max_line_bytes",
            format!("the {what} has more than {most} bytes"),
        ));
    }
    let text = text(bytes.get(line.start..line.end).unwrap_or_default())?;
    Row::from_line(text, names, rules)
}

/// Encodes the rows of files and appends them to `all`.
///
/// # Errors
/// The first bad row unless `on_bad` skips, anything wrong with a file as a whole, [`Error::Interrupted`].
///
/// [`Error::Interrupted`]: crate::Error::Interrupted
pub fn encode_files(paths: &[PathBuf], job: &Job<'_>, all: &mut Encoded) -> Result<()> {
    let mut files = FileEncoder::new(paths.to_vec(), job.options);
    files.desk.source_mut().before = job.progress.bytes.load(Ordering::Relaxed);
    files.desk.run(job, all, u64::MAX).map(drop)
}

/// The pairs of files, some at a time, so that they need not fit in memory.
#[derive(Debug)]
pub struct FileEncoder {
    desk: Desk<Blocks>,
    /// Rows read by the calls so far.
    read: u64,
    /// What the extra columns hold.
    kinds: Vec<Option<Kind>>,
}

impl FileEncoder {
    /// Files that are opened when their turn comes.
    pub fn new(paths: Vec<PathBuf>, options: &Options) -> Self {
        let kinds = vec![None; options.keys.extra.len()];
        Self { desk: Desk::new(Blocks::new(paths, options.limits.clone())), read: 0, kinds }
    }

    /// At least `pairs` further pairs, with what became of the rows that gave them; `None` behind the last row.
    ///
    /// All parts together are what [`encode_files`] gives at once: `rows` counts from the first file on.
    ///
    /// # Errors
    /// As [`encode_files`]; after one there is nothing to go on with.
    pub fn next(&mut self, pairs: u64, job: &Job<'_>) -> Result<Option<Encoded>> {
        let mut all = Encoded::new(self.kinds.clone());
        let found = self.desk.run(job, &mut all, pairs)?;
        for row in &mut all.rows {
            *row += self.read as i64;
        }
        self.read += all.tally.read;
        self.kinds = all.kinds();
        Ok(found.then_some(all))
    }
}

/// Some lines of a block.
#[derive(Debug)]
struct Lines {
    block: Arc<Block>,
    path: Arc<Path>,
    range: Range<usize>,
}

impl Lines {
    fn line(&self, i: usize) -> Line {
        self.block.lines.get(self.range.start + i).cloned().unwrap_or_default()
    }

    /// A block in pieces, one at least.
    fn of(block: Block, path: &Arc<Path>) -> Vec<Self> {
        let (block, mut pieces) = (Arc::new(block), Vec::new());
        let (mut start, mut bytes) = (0, 0);
        let mut cut = |range| {
            pieces.push(Self { block: Arc::clone(&block), path: Arc::clone(path), range });
        };
        for (i, line) in block.lines.iter().enumerate() {
            bytes += line.end - line.start;
            if bytes >= PIECE_BYTES || i + 1 - start == PIECE_ROWS {
                cut(start..i + 1);
                (start, bytes) = (i + 1, 0);
            }
        }
        if start < block.lines.len() || start == 0 {
            cut(start..block.lines.len());
        }
        pieces
    }
}

impl Piece for Lines {
    fn rows(&self) -> usize {
        self.range.len()
    }

    fn row(
        &self,
        i: usize,
        names: &[&str],
        rules: &Rules<'_>,
    ) -> (Origin<'_>, Result<Row<'_>, Refusal>) {
        let line = self.line(i);
        let row = line_result(&self.block.bytes, &line, names, rules);
        (Origin::of(&line, &self.path), row.map_err(Refusal::from))
    }

    fn others(&self, i: usize, names: &[&str], rules: &Rules<'_>) -> Vec<String> {
        let line = self.line(i);
        let bytes = self.block.bytes.get(line.start..line.end).unwrap_or_default();
        let text = text(bytes).unwrap_or_default();
        other_texts(text, names.get(..TRLS).unwrap_or_default(), rules.limits)
    }

    fn count(&self, out: &mut Encoded) {
        // What is said of a block, its last piece says.
        if self.range.end < self.block.lines.len() {
            return;
        }
        let (count, first) = self.block.blank;
        if count > 0 {
            out.tally.warn(Warning::BlankLine, count, || {
                let line = Some(first);
                let origin = Origin { path: Some(&self.path), line, row: None, byte: None };
                (origin.place(None, None), String::new())
            });
        }
        out.bytes += self.block.bytes.len() as u64;
    }
}

/// The blocks of several files, in order.
#[derive(Debug)]
struct Blocks {
    paths: std::vec::IntoIter<PathBuf>,
    limits: Limits,
    open: Option<(Arc<Path>, Reader)>,
    /// Bytes of the files done with.
    before: u64,
    /// What stopped a file, behind the rows that came before.
    failure: Option<Error>,
}

impl Blocks {
    fn new(paths: Vec<PathBuf>, limits: Limits) -> Self {
        Self { paths: paths.into_iter(), limits, open: None, before: 0, failure: None }
    }

    /// The next block and its file; `None` at the end.
    fn block(&mut self, progress: &Progress) -> Result<Option<(Block, Arc<Path>)>> {
        if let Some(failure) = self.failure.take() {
            return Err(failure);
        }
        loop {
            progress.check()?;
            let (path, reader) = match &mut self.open {
                Some((path, reader)) => (path, reader),
                none => {
                    let Some(path) = self.paths.next() else { return Ok(None) };
                    let reader = Reader::open(&path, &self.limits)?;
                    let (path, reader) = none.insert((Arc::from(path), reader));
                    (path, reader)
                }
            };
            let next = reader.next_block();
            let packed = reader.packed_bytes();
            let Some(mut block) = next else {
                self.before += packed;
                progress.bytes.store(self.before, Ordering::Relaxed);
                self.open = None;
                continue;
            };
            self.failure = block.failure.take();
            // Of a packed file only the unpacked position is known; it is at least a bound.
            let read = self.before + packed.min(reader.unpacked_bytes());
            progress.bytes.store(read, Ordering::Relaxed);
            return Ok(Some((block, Arc::clone(path))));
        }
    }
}

impl Source for Blocks {
    type Piece = Lines;

    fn next(&mut self, progress: &Progress) -> Result<Option<Vec<Lines>>> {
        Ok(self.block(progress)?.map(|(block, path)| Lines::of(block, &path)))
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
    let names = options.keys.names();
    let rules = options.rules(vocab);
    let mut rows = 0;
    let mut bytes = 0;
    let mut blocks = Blocks::new(paths.to_vec(), options.limits.clone());
    let mut next = blocks.block(progress)?;
    while let Some((block, path)) = next {
        let work = || {
            let parts: Vec<Result<()>> = block
                .lines
                .par_chunks(CHUNK)
                .map(|lines| {
                    for line in lines {
                        progress.check()?;
                        if let Err(bad) = line_result(&block.bytes, line, &names, &rules)
                            && on_bad == OnBad::Error
                        {
                            let place = Origin::of(line, &path).place(bad.field.clone(), bad.byte);
                            return Err(bad.at(place));
                        }
                    }
                    Ok(())
                })
                .collect();
            parts.into_iter().collect::<Result<()>>()
        };
        // Another thread, if there is one, reads the next block.
        let (done, read) = rayon::join(work, || blocks.block(progress));
        done?;
        rows += block.lines.len() as u64;
        bytes += block.bytes.len() as u64;
        next = read?;
    }
    Ok((rows, bytes))
}
