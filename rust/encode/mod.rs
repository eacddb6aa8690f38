//! Whole data sets: rows in, three flat arrays of ids and a tally out. The result does not depend on the threads.

mod files;
mod outcome;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use crate::error::{Error, Place, Result};
use crate::pair::{Options, Pair, Refusal, Truncation, encode};
use crate::read::BAD_INPUT;
use crate::read::bad::Bad;
use crate::read::cell::Kind;
use crate::read::column::{Column, Fault, fields_at};
use crate::read::json::{self, Findings};
use crate::read::row::{Row, Rules};
use crate::tokenize::Tokenizer;

pub use files::{FileEncoder, encode_files, scan_files};
pub use outcome::{Count, Encoded, Ragged, Tally};

/// Rows that one task works on.
const CHUNK: usize = 256;

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
    job: &Job<'_>,
    out: &mut Encoded,
    pair: &mut Pair,
    row: Result<Row<'_>, Refusal>,
    origin: &Origin<'_>,
) -> Result<()> {
    out.tally.read += 1;
    let result = row.and_then(|mut row| {
        let extra = std::mem::take(&mut row.extra);
        for (i, cell) in extra.iter().enumerate() {
            if let Some(known) = out.kind(i).filter(|known| *known != cell.kind()) {
                let name = job.options.keys.extra.get(i).map_or("", String::as_str);
                let message =
                    format!("expected {known}, as in the rows before, found {}", cell.kind());
                return Err(Bad::new("wrong_type", name, message).into());
            }
        }
        encode(row, job.tokenizer, job.options, pair)?;
        Ok(extra)
    });
    match result {
        Ok(extra) => {
            out.tally.kept += 1;
            out.rows.push(out.tally.read as i64 - 1);
            for (i, count) in out.tally.warned.iter_mut().enumerate() {
                count.add(u64::from(pair.warned >> i & 1), || {
                    (origin.place(None, None), String::new())
                });
            }
            out.push(pair, extra);
        }
        Err(Refusal::Call(error)) => return Err(error),
        Err(Refusal::Row(bad)) => {
            let place = origin.place(bad.field.clone(), bad.byte);
            // `truncation="drop"` is a wish, not a fault of the row.
            let wished = job.options.truncation == Truncation::Drop && bad.reason == "too_long";
            if job.on_bad == OnBad::Error && !wished {
                return Err(row_error(bad, place));
            }
            out.tally.drop_row(bad, place);
        }
    }
    Ok(())
}

/// What every row is encoded with.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Gives the ids.
    pub tokenizer: &'a Tokenizer,
    /// How a pair is made.
    pub options: &'a Options,
    /// What to do with a bad row.
    pub on_bad: OnBad,
    /// Where the work reports, and is told to stop.
    pub progress: &'a Progress,
}

impl Job<'_> {
    fn rules(&self) -> Rules<'_> {
        let Options { keys, limits, .. } = self.options;
        Rules { keys, limits, vocab: self.tokenizer.vocab_size() }
    }
}

/// Encodes `n` rows in threads and appends them to `all` in order.
fn encode_chunks<'a>(
    job: &Job<'_>,
    n: usize,
    row: impl Fn(usize) -> (Origin<'a>, Result<Row<'a>, Refusal>) + Sync,
    all: &mut Encoded,
) -> Result<()> {
    let chunk = |c: usize, kinds: &[Option<Kind>]| -> Result<Encoded> {
        let (mut out, mut pair) = (Encoded::new(kinds.to_vec()), Pair::default());
        for i in c * CHUNK..n.min((c + 1) * CHUNK) {
            job.progress.check()?;
            let (origin, row) = row(i);
            settle(job, &mut out, &mut pair, row, &origin)?;
        }
        Ok(out)
    };
    let kinds = all.kinds();
    let parts: Vec<Result<Encoded>> = (0..n.div_ceil(CHUNK))
        .into_par_iter()
        .map(|c| {
            let out = chunk(c, &kinds);
            job.progress.rows.fetch_add(CHUNK.min(n - c * CHUNK) as u64, Ordering::Relaxed);
            out
        })
        .collect();
    for (c, part) in parts.into_iter().enumerate() {
        // The first pair says what an extra column holds. A chunk that did not know it yet may have chosen otherwise.
        let known = all.kinds();
        let agrees = known == kinds
            || part.as_ref().is_ok_and(|part| {
                part.kinds().iter().zip(&known).all(|(a, b)| a.is_none() || b.is_none() || a == b)
            });
        all.append(if agrees { part? } else { chunk(c, &known)? });
    }
    Ok(())
}

/// One row from memory: its named values, or what was wrong with them.
pub type Fields = Result<(json::Fields<'static>, Findings), Bad>;

/// Encodes rows from memory and appends them to `all`.
///
/// # Errors
/// As [`encode_files`].
pub fn encode_rows(rows: Vec<Fields>, job: &Job<'_>, all: &mut Encoded) -> Result<()> {
    let options = job.options;
    let rules = job.rules();
    let before = all.tally.read + 1;
    let rows: Vec<Mutex<Option<Fields>>> =
        rows.into_iter().map(|row| Mutex::new(Some(row))).collect();
    let row = |i: usize| {
        let mut slot = rows.get(i).map(|row| row.lock().unwrap_or_else(PoisonError::into_inner));
        let slot = slot.as_deref_mut();
        // A row with extra columns may be wanted twice.
        let once = options.keys.extra.is_empty();
        let fields = slot.and_then(|slot| if once { slot.take() } else { slot.clone() });
        let row = fields.unwrap_or_else(|| Err(Bad::new("not_an_object", "", "no row")));
        let row = row.and_then(|(fields, findings)| Row::from_fields(fields, &findings, &rules));
        let line = before + i as u64;
        let origin = Origin { path: None, line, byte: None };
        (origin, row.map_err(Refusal::from))
    };
    encode_chunks(job, rows.len(), row, all)
}

/// Encodes the rows `0..n` of Arrow columns, in the order of [`crate::read::keys::Keys::names`], and appends them.
///
/// `path` is the file they come from, and `first` the number of row 0 less 1; without a file rows are counted on.
///
/// # Errors
/// As [`encode_files`]; columns that contradict themselves are a bad input.
pub fn encode_columns<'a>(
    columns: &'a [Option<Column<'a>>],
    n: usize,
    path: Option<&'a Path>,
    first: u64,
    job: &Job<'_>,
    all: &mut Encoded,
) -> Result<()> {
    let rules = job.rules();
    let names = rules.keys.names();
    let before = 1 + if path.is_some() { first } else { all.tally.read };
    let row = |i: usize| {
        let origin = Origin { path, line: before + i as u64, byte: None };
        let row = fields_at(columns, &names, i, rules.limits).and_then(|(fields, findings)| {
            Row::from_fields(fields, &findings, &rules).map_err(Fault::Row)
        });
        let row = row.map_err(|fault| match fault {
            Fault::Row(bad) => Refusal::Row(bad),
            Fault::Input(field, message) => Refusal::Call(Error::Data {
                place: origin.place(Some(field), None),
                reason: BAD_INPUT,
                message,
            }),
        });
        (origin, row)
    };
    encode_chunks(job, n, row, all)
}
