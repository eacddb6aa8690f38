//! Whole data sets: rows in, three flat arrays of ids and a tally out. The result does not depend on the threads.

mod files;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;

use crate::error::{Error, Place, Result};
use crate::pair::{Options, Pair, Refusal, WARNINGS, encode};
use crate::read::json::{self, Findings};
use crate::read::row::{Bad, FIELDS, Row};
use crate::tokenize::Tokenizer;

pub use files::{FileEncoder, encode_files, scan_files};

/// Rows that one task works on.
const CHUNK: usize = 256;

/// Variable-length lists in one array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ragged {
    /// All items.
    pub values: Vec<i32>,
    /// List `i` is `values[offsets[i]..offsets[i + 1]]`.
    pub offsets: Vec<i64>,
}

impl Default for Ragged {
    fn default() -> Self {
        Self { values: Vec::new(), offsets: vec![0] }
    }
}

impl Ragged {
    /// Appends a list.
    pub fn push(&mut self, items: &[i32]) {
        self.values.extend_from_slice(items);
        self.offsets.push(self.values.len() as i64);
    }

    /// Appends all lists of `other`.
    pub fn append(&mut self, other: &Self) {
        let base = self.values.len() as i64;
        self.values.extend_from_slice(&other.values);
        self.offsets.extend(other.offsets.iter().skip(1).map(|end| base + end));
    }

    /// Number of lists.
    pub fn len(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// Whether there is no list.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// How often something happened, and where first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Count {
    /// How often.
    pub count: u64,
    /// Where first.
    pub first: Place,
    /// What was said there.
    pub message: String,
}

impl Count {
    fn add(&mut self, count: u64, first: impl FnOnce() -> (Place, String)) {
        if self.count == 0 && count > 0 {
            (self.first, self.message) = first();
        }
        self.count += count;
    }
}

/// What became of the rows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Rows seen; blank lines are none.
    pub read: u64,
    /// Rows that gave a pair.
    pub kept: u64,
    /// Dropped rows by reason, in the order of their first row.
    pub dropped: Vec<(&'static str, Count)>,
    /// Kept rows with something to know, in the order of [`WARNINGS`].
    pub warned: [Count; WARNINGS.len()],
}

impl Tally {
    fn drop_row(&mut self, bad: Bad, place: Place) {
        if !self.dropped.iter().any(|(reason, _)| *reason == bad.reason) {
            self.dropped.push((bad.reason, Count::default()));
        }
        if let Some((_, count)) = self.dropped.iter_mut().find(|(reason, _)| *reason == bad.reason)
        {
            count.add(1, || (place, bad.message));
        }
    }

    fn append(&mut self, other: Self) {
        self.read += other.read;
        self.kept += other.kept;
        for (reason, count) in other.dropped {
            match self.dropped.iter_mut().find(|(r, _)| *r == reason) {
                Some((_, mine)) => mine.count += count.count,
                None => self.dropped.push((reason, count)),
            }
        }
        for (mine, count) in self.warned.iter_mut().zip(other.warned) {
            mine.add(count.count, || (count.first, count.message));
        }
    }
}

/// The pairs of a data set.
#[derive(Debug, Default)]
pub struct Encoded {
    /// Prompts.
    pub prompt: Ragged,
    /// Preferred completions.
    pub chosen: Ragged,
    /// Other completions.
    pub rejected: Ragged,
    /// Log-probs under the reference, NaN where a row has none.
    pub ref_logps: Vec<f64>,
    /// Rows that have them.
    pub with_ref: u64,
    /// 0-based number of each pair's row among the rows read.
    pub rows: Vec<i64>,
    /// What became of the rows.
    pub tally: Tally,
    /// Bytes of text read.
    pub bytes: u64,
}

impl Encoded {
    fn push(&mut self, pair: &Pair) {
        self.prompt.push(&pair.prompt);
        self.chosen.push(&pair.chosen);
        self.rejected.push(&pair.rejected);
        self.ref_logps.extend(pair.ref_logps.unwrap_or([f64::NAN; 2]));
        self.with_ref += u64::from(pair.ref_logps.is_some());
    }

    fn append(&mut self, other: Self) {
        let before = self.tally.read as i64;
        self.prompt.append(&other.prompt);
        self.chosen.append(&other.chosen);
        self.rejected.append(&other.rejected);
        self.ref_logps.extend(other.ref_logps);
        self.with_ref += other.with_ref;
        self.rows.extend(other.rows.iter().map(|row| before + row));
        self.tally.append(other.tally);
    }
}

/// Shared by the working threads and the one that waits for them.
#[derive(Debug, Default)]
pub struct Progress {
    /// Set to stop the work.
    pub cancel: AtomicBool,
    /// Bytes of the files done so far.
    pub bytes: AtomicU64,
    /// Rows done so far.
    pub rows: AtomicU64,
}

impl Progress {
    fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// Where a row comes from.
struct Origin<'a> {
    path: Option<&'a Path>,
    line: u64,
    byte: Option<u64>,
}

impl Origin<'_> {
    fn place(&self, field: Option<String>, byte: Option<usize>) -> Place {
        Place {
            path: self.path.map(Path::to_owned),
            line: Some(self.line),
            byte: byte.map(|at| self.byte.unwrap_or(0) + at as u64),
            field,
        }
    }
}

/// What to do with a bad row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBad {
    /// Stop at the first one.
    Error,
    /// Drop and count it.
    Skip,
}

fn row_error(bad: Bad, place: Place) -> Error {
    if bad.reason == "limit" {
        Error::Limit { place, message: bad.message }
    } else {
        Error::Data { place, reason: bad.reason, message: bad.message }
    }
}

/// Adds what became of one row.
fn settle(
    out: &mut Encoded,
    result: Result<(), Refusal>,
    pair: &Pair,
    origin: &Origin<'_>,
    drops_long: bool,
    on_bad: OnBad,
) -> Result<()> {
    out.tally.read += 1;
    match result {
        Ok(()) => {
            out.tally.kept += 1;
            out.rows.push(out.tally.read as i64 - 1);
            for (i, count) in out.tally.warned.iter_mut().enumerate() {
                count.add(u64::from(pair.warned >> i & 1), || {
                    (origin.place(None, None), String::new())
                });
            }
            out.push(pair);
        }
        Err(Refusal::Call(error)) => return Err(error),
        Err(Refusal::Row(bad)) => {
            let place = origin.place(bad.field.clone(), bad.byte);
            // `truncation="drop"` is a wish, not a fault of the row.
            let wished = drops_long && bad.reason == "too_long";
            if on_bad == OnBad::Error && !wished {
                return Err(row_error(bad, place));
            }
            out.tally.drop_row(bad, place);
        }
    }
    Ok(())
}

/// One row from memory: its named values, or what was wrong with them.
pub type Fields = Result<(json::Fields<'static>, Findings), Bad>;

/// Encodes rows from memory, the first of which has the 0-based number `first`, and appends them to `all`.
///
/// # Errors
/// As [`encode_files`].
pub fn encode_rows(
    rows: Vec<Fields>,
    tokenizer: &Tokenizer,
    options: &Options,
    on_bad: OnBad,
    progress: &Progress,
    all: &mut Encoded,
) -> Result<()> {
    let vocab = tokenizer.vocab_size();
    let first = all.tally.read;
    let drops_long = options.truncation == crate::pair::Truncation::Drop;
    let mut rows: Vec<(u64, Option<Fields>)> =
        rows.into_iter().enumerate().map(|(i, row)| (first + i as u64 + 1, Some(row))).collect();
    let parts: Vec<Result<Encoded>> = rows
        .par_chunks_mut(CHUNK)
        .map(|rows| {
            let (mut out, mut pair) = (Encoded::default(), Pair::default());
            for (number, row) in rows {
                progress.check()?;
                let Some(row) = row.take() else { continue };
                let result = row
                    .and_then(|(fields, findings)| {
                        debug_assert_eq!(fields.len(), FIELDS);
                        Row::from_fields(fields, &findings, &options.keys, &options.limits, vocab)
                    })
                    .map_err(Refusal::from)
                    .and_then(|row| encode(row, tokenizer, options, &mut pair));
                let origin = Origin { path: None, line: *number, byte: None };
                settle(&mut out, result, &pair, &origin, drops_long, on_bad)?;
            }
            Ok(out)
        })
        .collect();
    for part in parts {
        all.append(part?);
    }
    Ok(())
}
