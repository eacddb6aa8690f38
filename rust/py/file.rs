//! The text of one file for pyarrow's readers, which know less of gzip, of limits and of quotes.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value)]

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::options;
use super::wait::detached;
use crate::error::{Error, Place, Reason, Result};
use crate::read::quotes::{Fault, Quotes};
use crate::read::source::Source;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<FileText>()
}

/// Bytes by which a text is judged.
const HEAD_BYTES: usize = 16 << 10;

struct Open {
    source: Source,
    /// What was read for its sake and is still to be given.
    head: Vec<u8>,
    quotes: Option<Quotes>,
}

impl Open {
    /// As many bytes as were asked for, unless the text ends: pyarrow takes what it gets for a block, and a row may lie
    /// in two of them at most.
    fn read(&mut self, most: usize) -> Result<Vec<u8>> {
        let mut found = std::mem::take(&mut self.head);
        if most < found.len() {
            self.head = found.split_off(most);
        }
        let found = self.source.read_all(found, most)?;
        if let Some(quotes) = &mut self.quotes {
            let followed =
                if found.is_empty() && most > 0 { quotes.end() } else { quotes.follow(&found) };
            followed.map_err(|fault| at(&self.source, fault))?;
        }
        Ok(found)
    }
}

fn at(source: &Source, Fault { row, message, too_long }: Fault) -> Error {
    let place = Place { row: NonZeroU64::new(row), ..source.place() };
    if too_long {
        let field = Some("max_line_bytes".to_owned());
        return Error::Limit { place: Place { field, ..place }, message };
    }
    Error::Data { place, reason: Reason::BadInput, message }
}

/// The unpacked text of a file as something to read from.
#[pyclass(frozen, module = "dpo_ext._core")]
struct FileText {
    open: Mutex<Option<Open>>,
}

impl FileText {
    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl FileText {
    /// With a delimiter the text must be a table whose quotes are in order.
    #[new]
    #[pyo3(signature = (path, limits, delimiter=None))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        limits: Bound<'_, PyAny>,
        delimiter: Option<u8>,
    ) -> PyResult<Self> {
        let limits = options::limits(&limits)?;
        let open = detached(py, || {
            let mut source = Source::open(&path, &limits)?;
            let mut head = source.head(HEAD_BYTES)?;
            if delimiter.is_some() && head.starts_with(b"\xef\xbb\xbf") {
                head.drain(..3);
            }
            let quotes = delimiter.map(|byte| Quotes::new(byte, limits.max_line_bytes));
            Ok(Open { source, head, quotes })
        })?;
        Ok(Self { open: Mutex::new(Some(open)) })
    }

    /// The start of the text, before anything was read.
    fn head<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.lock().as_ref().map_or(&[], |open| &open.head))
    }

    /// The next bytes; none at the end.
    fn read<'py>(&self, py: Python<'py>, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        let found = detached(py, || self.lock().as_mut().map(|open| open.read(size)).transpose())?;
        match found {
            Some(bytes) => Ok(PyBytes::new(py, &bytes)),
            None => Err(PyValueError::new_err("the file is closed")),
        }
    }

    /// Bytes of text so far.
    #[getter]
    fn unpacked(&self) -> u64 {
        self.lock().as_ref().map_or(0, |open| open.source.unpacked_bytes())
    }

    #[getter]
    fn closed(&self) -> bool {
        self.lock().is_none()
    }

    fn close(&self) {
        *self.lock() = None;
    }
}
