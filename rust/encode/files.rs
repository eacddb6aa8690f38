//! Rows of files, all at once or some at a time.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use rayon::prelude::*;

use super::job::{CHUNK, Job, OnBad, Origin, Progress, encode_chunks};
use super::outcome::Encoded;
use crate::error::{Reason, Result, Warning};
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
    files.blocks.before = job.progress.bytes.load(Ordering::Relaxed);
    files.fill(u64::MAX, job, all).map(drop)
}

/// The pairs of files, some at a time, so that they need not fit in memory.
#[derive(Debug)]
pub struct FileEncoder {
    blocks: Blocks,
    /// Rows read by the calls so far.
    read: u64,
    /// What the extra columns hold.
    kinds: Vec<Option<Kind>>,
}

impl FileEncoder {
    /// Files that are opened when their turn comes.
    pub fn new(paths: Vec<PathBuf>, options: &Options) -> Self {
        let kinds = vec![None; options.keys.extra.len()];
        Self { blocks: Blocks::new(paths, options.limits.clone()), read: 0, kinds }
    }

    /// At least `pairs` further pairs, with what became of the rows that gave them; `None` behind the last row.
    ///
    /// All parts together are what [`encode_files`] gives at once: `rows` counts from the first file on.
    ///
    /// # Errors
    /// As [`encode_files`]; after one there is nothing to go on with.
    pub fn next(&mut self, pairs: u64, job: &Job<'_>) -> Result<Option<Encoded>> {
        let mut all = Encoded::new(self.kinds.clone());
        let found = self.fill(pairs, job, &mut all)?;
        for row in &mut all.rows {
            *row += self.read as i64;
        }
        self.read += all.tally.read;
        self.kinds = all.kinds();
        Ok(found.then_some(all))
    }

    /// Appends to `all` until it has `pairs`; whether there was anything to read.
    fn fill(&mut self, pairs: u64, job: &Job<'_>, all: &mut Encoded) -> Result<bool> {
        let rules = job.rules();
        let names = rules.keys.names();
        let mut found = false;
        while all.tally.kept < pairs
            && self.blocks.step(job.progress, |block, path| {
                let row = |i: usize| {
                    let line = block.lines.get(i).cloned().unwrap_or_default();
                    let row = line_result(&block.bytes, &line, &names, &rules);
                    (Origin::of(&line, path), row.map_err(Refusal::from))
                };
                let others = |i: usize| {
                    let line = block.lines.get(i).cloned().unwrap_or_default();
                    let bytes = block.bytes.get(line.start..line.end).unwrap_or_default();
                    let text = text(bytes).unwrap_or_default();
                    other_texts(text, names.get(..TRLS).unwrap_or_default(), rules.limits)
                };
                encode_chunks(job, block.lines.len(), row, others, all)?;
                let (count, first) = block.blank;
                if count > 0 {
                    all.tally.warn(Warning::BlankLine, count, || {
                        let line = Some(first);
                        let origin = Origin { path: Some(path), line, row: None, byte: None };
                        (origin.place(None, None), String::new())
                    });
                }
                all.bytes += block.bytes.len() as u64;
                Ok(())
            })?
        {
            found = true;
        }
        Ok(found)
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
    let names = options.keys.names();
    let rules = options.rules(vocab);
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
                    if let Err(bad) = line_result(&block.bytes, line, &names, &rules)
                        && on_bad == OnBad::Error
                    {
                        let place = Origin::of(line, path).place(bad.field.clone(), bad.byte);
                        return Err(bad.at(place));
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
