//! Rows encoded in threads and put together in order.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;

use super::outcome::Encoded;
use crate::error::{Error, Place, Reason, Result, Warning};
use crate::pair::{Options, Pair, Refusal, Truncation, encode};
use crate::read::bad::Bad;
use crate::read::cell::Kind;
use crate::read::layouts::Layout;
use crate::read::row::{Row, Rules};
use crate::tokenize::Tokenizer;

/// Rows of a table that one task works on.
pub(super) const CHUNK: usize = 32;

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
    /// Whether to go on.
    ///
    /// # Errors
    /// [`Error::Interrupted`] after `cancel`.
    pub fn check(&self) -> Result<()> {
        if self.cancel.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// Where a row comes from.
pub(super) struct Origin<'a> {
    pub(super) path: Option<&'a Path>,
    /// The line of the text, unless there are only rows.
    pub(super) line: Option<u64>,
    /// The row of a table, of an array, or of rows from memory.
    pub(super) row: Option<u64>,
    pub(super) byte: Option<u64>,
}

impl Origin<'_> {
    pub(super) fn place(&self, field: Option<String>, byte: Option<usize>) -> Place {
        Place {
            path: self.path.map(Path::to_owned),
            line: self.line,
            row: self.row.and_then(NonZeroU64::new),
            // An array may be one line: there the line says nothing.
            byte: byte
                .or((self.line.is_some() && self.row.is_some()).then_some(0))
                .map(|at| self.byte.unwrap_or(0) + at as u64),
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
    pub(super) fn rules(&self) -> Rules<'_> {
        self.options.rules(self.tokenizer.vocab_size())
    }
}

/// Adds what became of one row.
pub(super) fn settle(
    job: &Job<'_>,
    out: &mut Encoded,
    pair: &mut Pair,
    row: Result<Row<'_>, Refusal>,
    origin: &Origin<'_>,
    others: impl Fn() -> Vec<String>,
) -> Result<()> {
    out.tally.read += 1;
    let layout = row.as_ref().ok().map(|row| row.layout);
    let result = row.and_then(|mut row| {
        let extra = std::mem::take(&mut row.extra);
        for (i, cell) in extra.iter().enumerate() {
            if let Some(known) = out.kind(i).filter(|known| *known != cell.kind()) {
                let name = job.options.keys.extra.get(i).map_or("", String::as_str);
                let message =
                    format!("expected {known}, as in the rows before, found {}", cell.kind());
                return Err(Bad::new(Reason::WrongType, name, message).into());
            }
        }
        let noted = (row.non_finite.take(), std::mem::take(&mut row.unread));
        encode(row, job.tokenizer, job.options, pair)?;
        Ok((extra, noted))
    });
    match result {
        Ok((extra, (non_finite, unread))) => {
            out.tally.kept += 1;
            out.tally.leave(unread);
            if let Some(layout) = layout {
                *out.tally.layouts.entry(layout).or_default() += 1;
            }
            out.rows.push(out.tally.read as i64 - 1);
            let guessed = job.options.layout.is_none() && !job.options.keys.prompt_required;
            for warning in &pair.warned {
                out.tally.warn(*warning, 1, || {
                    // Where the prompt may be instead, if the caller did not say that it is this.
                    let is_guess = *warning == Warning::EmptyPrompt
                        && layout == Some(Layout::Explicit)
                        // A prompt of which no token is left is no empty field.
                        && !pair.has(Warning::BoundaryMerge)
                        && guessed;
                    let message = if is_guess { named(&others()) } else { String::new() };
                    (origin.place(None, None), message)
                });
            }
            if non_finite.is_some() {
                let first = || (origin.place(non_finite, None), String::new());
                out.tally.warn(Warning::NonFinite, 1, first);
            }
            out.push(pair, extra);
        }
        Err(Refusal::Call(error)) => return Err(error),
        Err(Refusal::Row(mut bad)) => {
            if matches!(bad.reason, Reason::MissingField | Reason::MissingPrompt) {
                bad.message += &elsewhere(bad.reason, &others());
            }
            let place = origin.place(bad.field.clone(), bad.byte);
            // `truncation="drop"` is a wish, not a fault of the row.
            let wished =
                job.options.truncation == Truncation::Drop && bad.reason == Reason::TooLong;
            if job.on_bad == OnBad::Error && !wished {
                return Err(bad.at(place));
            }
            out.tally.drop_row(bad, place);
        }
    }
    Ok(())
}

/// Some names of fields.
fn named(names: &[String]) -> String {
    let names = names.iter().take(8).map(|name| format!("`{}`", name.escape_debug()));
    names.collect::<Vec<_>>().join(", ")
}

/// Where a prompt or a side may be that was not found.
fn elsewhere(reason: Reason, others: &[String]) -> String {
    let names = named(others);
    match (reason, names.is_empty()) {
        (Reason::MissingPrompt, true) => {
            "\nhint: layout_of_rows=\"completions\" keeps pairs without any prompt".to_owned()
        }
        (Reason::MissingPrompt, false) => format!(
            "\nhint: if the prompt is in {names}, name it by `prompt_key`; if there is none, \
             layout_of_rows=\"completions\" keeps such pairs"
        ),
        (_, true) => String::new(),
        (_, false) => format!("\nhint: other fields with text are {names}"),
    }
}

/// Encodes `n` rows that are there already, in threads, and appends them to `all` in order.
pub(super) fn encode_there<'a>(
    job: &Job<'_>,
    n: usize,
    row: impl Fn(usize) -> (Origin<'a>, Result<Row<'a>, Refusal>) + Sync,
    others: impl Fn(usize) -> Vec<String> + Sync,
    all: &mut Encoded,
) -> Result<()> {
    let chunk = |c: usize, kinds: &[Option<Kind>]| -> Result<Encoded> {
        let (mut out, mut pair) = (Encoded::new(kinds.to_vec()), Pair::default());
        for i in c * CHUNK..n.min((c + 1) * CHUNK) {
            job.progress.check()?;
            let (origin, row) = row(i);
            settle(job, &mut out, &mut pair, row, &origin, || others(i))?;
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
        let agrees = known == kinds || part.as_ref().is_ok_and(|part| part.agrees(&known));
        all.append(if agrees { part? } else { chunk(c, &known)? });
    }
    Ok(())
}
