//! Rows from memory: values, or the columns of a table.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::desk::{Desk, Piece, Source};
use super::feed::Feed;
use super::job::{Job, Origin, Progress, encode_there};
use super::outcome::Encoded;
use crate::error::{Error, Reason, Result};
use crate::pair::Refusal;
use crate::read::bad::Bad;
use crate::read::column::{Column, Fault, fields_at};
use crate::read::json::{self, Findings};
use crate::read::row::{Row, Rules};

/// One row from memory: its named values, or what was wrong with them.
pub type Fields = Result<(json::Fields<'static>, Findings), Bad>;

/// Encodes rows from memory, as they are fed, and appends them to `all`.
///
/// # Errors
/// As [`encode_files`](super::encode_files).
pub fn encode_fed(feed: &Feed<Vec<Fields>>, job: &Job<'_>, all: &mut Encoded) -> Result<()> {
    let is_read_once = job.options.keys.extra.is_empty();
    let source = Fed { feed, first: all.tally.read + 1, is_read_once };
    Desk::new(source).run(job, all, u64::MAX).map(drop)
}

struct Fed<'a> {
    feed: &'a Feed<Vec<Fields>>,
    /// The number of the next row.
    first: u64,
    is_read_once: bool,
}

impl Source for Fed<'_> {
    type Piece = Given;

    fn next(&mut self, progress: &Progress) -> Result<Option<Vec<Given>>> {
        let Some(fed) = self.feed.take(|| progress.check())? else { return Ok(None) };
        let piece = |rows: Vec<Fields>| {
            let first = self.first;
            self.first += rows.len() as u64;
            let others = |row: &Fields| {
                row.as_ref().map(|(_, found)| found.others.clone()).unwrap_or_default()
            };
            Given {
                first,
                others: rows.iter().map(others).collect(),
                rows: rows.into_iter().map(|row| Mutex::new(Some(row))).collect(),
                is_read_once: self.is_read_once,
            }
        };
        Ok(Some(fed.into_iter().map(piece).collect()))
    }
}

/// Rows from memory.
struct Given {
    first: u64,
    rows: Vec<Mutex<Option<Fields>>>,
    others: Vec<Vec<String>>,
    is_read_once: bool,
}

impl Piece for Given {
    fn rows(&self) -> usize {
        self.rows.len()
    }

    fn row(
        &self,
        i: usize,
        _: &[&str],
        rules: &Rules<'_>,
    ) -> (Origin<'_>, Result<Row<'_>, Refusal>) {
        let slot = self.rows.get(i).map(|row| row.lock().unwrap_or_else(PoisonError::into_inner));
        // A row with extra columns may be wanted twice.
        let fields =
            slot.and_then(|mut slot| if self.is_read_once { slot.take() } else { slot.clone() });
        let row = fields.unwrap_or_else(|| Err(Bad::new(Reason::NotAnObject, "", "no row")));
        let row = row.and_then(|(fields, findings)| Row::from_fields(fields, &findings, rules));
        let row_number = Some(self.first + i as u64);
        let origin = Origin { path: None, line: None, row: row_number, byte: None };
        (origin, row.map_err(Refusal::from))
    }

    fn others(&self, i: usize, _: &[&str], _: &Rules<'_>) -> Vec<String> {
        self.others.get(i).cloned().unwrap_or_default()
    }

    fn count(&self, _: &mut Encoded) {}
}

/// A part of a table, in the order of [`crate::read::keys::Keys::names`].
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// One column a name.
    pub columns: &'a [Option<Column<'a>>],
    /// Rows of each.
    pub rows: usize,
    /// The file that they come from. Without one rows are counted on.
    pub path: Option<&'a Path>,
    /// Rows of the file before these.
    pub first: u64,
    /// Further columns of text, which nobody reads.
    pub others: &'a [String],
}

/// Encodes the rows of Arrow columns and appends them to `all`.
///
/// # Errors
/// As [`encode_files`](super::encode_files); columns that contradict themselves are a bad input.
pub fn encode_columns(table: Columns<'_>, job: &Job<'_>, all: &mut Encoded) -> Result<()> {
    let Columns { columns, rows, path, first, others } = table;
    let rules = job.rules();
    let names = rules.keys.names();
    let before = 1 + if path.is_some() { first } else { all.tally.read };
    let row = |i: usize| {
        let origin = Origin { path, line: None, row: Some(before + i as u64), byte: None };
        let row = fields_at(columns, &names, i, &rules).and_then(|(fields, findings)| {
            Row::from_fields(fields, &findings, &rules).map_err(Fault::Row)
        });
        let row = row.map_err(|fault| match fault {
            Fault::Row(bad) => Refusal::Row(bad),
            Fault::Input(field, message) => Refusal::Call(Error::Data {
                place: origin.place(Some(field), None),
                reason: Reason::BadInput,
                message,
            }),
        });
        (origin, row)
    };
    encode_there(job, rows, row, |_| others.to_vec(), all)?;
    if all.tally.kept > 0 {
        let is_read =
            |name: &&String| names.contains(&name.as_str()) || rules.keys.ignored.contains(name);
        all.tally.leave(others.iter().filter(|name| !is_read(name)).cloned());
    }
    Ok(())
}
