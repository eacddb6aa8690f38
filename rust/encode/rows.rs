//! Rows from memory: values, or the columns of a table.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::job::{Job, Origin, encode_chunks};
use super::outcome::Encoded;
use crate::error::{Error, Reason, Result};
use crate::pair::Refusal;
use crate::read::bad::Bad;
use crate::read::column::{Column, Fault, fields_at};
use crate::read::json::{self, Findings};
use crate::read::row::Row;

/// One row from memory: its named values, or what was wrong with them.
pub type Fields = Result<(json::Fields<'static>, Findings), Bad>;

/// Encodes rows from memory and appends them to `all`.
///
/// # Errors
/// As [`encode_files`](super::encode_files).
pub fn encode_rows(rows: Vec<Fields>, job: &Job<'_>, all: &mut Encoded) -> Result<()> {
    let options = job.options;
    let rules = job.rules();
    let before = all.tally.read + 1;
    let names: Vec<Vec<String>> = rows
        .iter()
        .map(|row| row.as_ref().map(|(_, findings)| findings.others.clone()).unwrap_or_default())
        .collect();
    let rows: Vec<Mutex<Option<Fields>>> =
        rows.into_iter().map(|row| Mutex::new(Some(row))).collect();
    let row = |i: usize| {
        let mut slot = rows.get(i).map(|row| row.lock().unwrap_or_else(PoisonError::into_inner));
        let slot = slot.as_deref_mut();
        // A row with extra columns may be wanted twice.
        let once = options.keys.extra.is_empty();
        let fields = slot.and_then(|slot| if once { slot.take() } else { slot.clone() });
        let row = fields.unwrap_or_else(|| Err(Bad::new(Reason::NotAnObject, "", "no row")));
        let row = row.and_then(|(fields, findings)| Row::from_fields(fields, &findings, &rules));
        let origin = Origin { path: None, line: None, row: Some(before + i as u64), byte: None };
        (origin, row.map_err(Refusal::from))
    };
    let others = |i: usize| names.get(i).cloned().unwrap_or_default();
    encode_chunks(job, rows.len(), row, others, all)
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
    encode_chunks(job, rows, row, |_| others.to_vec(), all)?;
    if all.tally.kept > 0 {
        let is_read =
            |name: &&String| names.contains(&name.as_str()) || rules.keys.ignored.contains(name);
        all.tally.leave(others.iter().filter(|name| !is_read(name)).cloned());
    }
    Ok(())
}
