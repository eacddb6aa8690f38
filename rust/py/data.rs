//! Whole data sets: files and rows in, flat arrays and counts out.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use numpy::{IntoPyArray, PyReadonlyArray1};
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::arrays::ragged_tuple;
use super::column::column;
use super::options::Settings;
use super::tokenizer::PyTokenizer;
use super::value::fields;
use super::wait::{awaited, report, waited, waited_scoped};
use crate::encode::{
    Columns, Encoded, Feed, Fields, FileEncoder, Job, Offer, OnBad, PIECE_ROWS, Progress,
    encode_columns, encode_fed, encode_files, scan_files,
};
use crate::error::{Error, Place, Result};
use crate::pair::Options;
use crate::pool;
use crate::read::cell::Cell;
use crate::read::chat::RESERVED;
use crate::read::json::Value;
use crate::tokenize::Tokenizer;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PairEncoder>()?;
    m.add_class::<PyFileEncoder>()?;
    m.add_function(wrap_pyfunction!(scan, m)?)
}

/// What every call of an encoder works with.
struct Encoding {
    tokenizer: Arc<Tokenizer>,
    options: Options,
    on_bad: OnBad,
    threads: Option<usize>,
    progress: Progress,
}

impl Encoding {
    fn new(tokenizer: &Bound<'_, PyTokenizer>, given: &Bound<'_, PyAny>) -> PyResult<Self> {
        let Settings { options, on_bad, threads } = Settings::of(given)?;
        let tokenizer = Arc::clone(&tokenizer.get().inner);
        for (name, _) in &options.kwargs {
            if RESERVED.contains(&name.as_str()) {
                let message = format!(
                    "`chat_template_kwargs`: `{name}` belongs to the template's own variables"
                );
                return Err(PyValueError::new_err(message));
            }
            if !tokenizer.reads(name) {
                let known = tokenizer.variables().join(", ");
                let message = format!(
                    "`chat_template_kwargs`: no chat template reads `{name}`\nhint: it reads {known}"
                );
                return Err(PyValueError::new_err(message));
            }
        }
        Ok(Self { tokenizer, options, on_bad, threads, progress: Progress::default() })
    }

    fn job(&self) -> Job<'_> {
        let Self { tokenizer, options, on_bad, progress, .. } = self;
        Job { tokenizer, options, on_bad: *on_bad, progress }
    }

    /// Waits for work that owns what it needs, which an interrupt does not wait for.
    fn wait<T: Send + 'static>(
        self: &Arc<Self>,
        py: Python<'_>,
        callback: Option<&Py<PyAny>>,
        work: impl FnOnce(&Job<'_>) -> Result<T> + Send + 'static,
    ) -> PyResult<T> {
        let shared = Arc::clone(self);
        waited(py, self.threads, &self.progress, callback, move || work(&shared.job()))
    }
}

/// The pairs of files, some at a time.
#[pyclass(frozen, name = "FileEncoder")]
pub(super) struct PyFileEncoder {
    /// `None` while a call works on it, and after one that failed.
    files: Mutex<Option<FileEncoder>>,
    encoding: Arc<Encoding>,
}

#[pymethods]
impl PyFileEncoder {
    #[new]
    fn new(
        paths: Vec<PathBuf>,
        tokenizer: Bound<'_, PyTokenizer>,
        settings: Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let encoding = Arc::new(Encoding::new(&tokenizer, &settings)?);
        let files = Mutex::new(Some(FileEncoder::new(paths, &encoding.options)));
        Ok(Self { files, encoding })
    }

    /// At least `pairs` further pairs as `PairEncoder.finish` gives them; None behind the last row.
    #[pyo3(signature = (pairs, callback=None))]
    fn next<'py>(
        &self,
        py: Python<'py>,
        pairs: u64,
        callback: Option<Py<PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyDict>>> {
        let taken = self.files.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut files) = taken else {
            return Err(PyValueError::new_err("an earlier call failed or has not returned"));
        };
        let (files, encoded) = self.encoding.wait(py, callback.as_ref(), move |job| {
            let encoded = files.next(pairs, job)?;
            Ok((files, encoded))
        })?;
        *self.files.lock().unwrap_or_else(PoisonError::into_inner) = Some(files);
        encoded.map(|encoded| encoded_dict(py, encoded)).transpose()
    }
}

#[pyfunction]
fn scan(
    py: Python<'_>,
    paths: Vec<PathBuf>,
    vocab_size: usize,
    settings: Bound<'_, PyAny>,
) -> PyResult<(u64, u64)> {
    let Settings { options, on_bad, threads } = Settings::of(&settings)?;
    let progress = Arc::new(Progress::default());
    let shared = Arc::clone(&progress);
    waited(py, threads, &progress, None, move || {
        scan_files(&paths, &options, on_bad, vocab_size, &shared)
    })
}

/// Encodes rows of any source, one source after the other, into one data set.
#[pyclass(frozen, module = "dpo_ext._core")]
pub(super) struct PairEncoder {
    encoding: Arc<Encoding>,
    callback: Option<Py<PyAny>>,
    /// When the callback was called last between two batches, which may all be too short to be waited for.
    told: Mutex<Instant>,
    /// What came out so far; gone while a source is read, and after a failure.
    encoded: Mutex<Option<Encoded>>,
}

/// Why no further rows come out of Python.
enum Ceased {
    /// A signal or the progress callback raised.
    Told(PyErr),
    /// The rows themselves raised.
    Raised(PyErr),
}

impl PairEncoder {
    fn take(&self) -> PyResult<Encoded> {
        let mut encoded = self.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        encoded.take().ok_or_else(|| {
            Error::Internal("this encoder failed before, or is in use".to_owned()).into()
        })
    }

    fn put(&self, encoded: Encoded) {
        *self.encoded.lock().unwrap_or_else(PoisonError::into_inner) = Some(encoded);
    }

    fn tell(&self, py: Python<'_>) -> PyResult<()> {
        let Some(callback) = &self.callback else { return Ok(()) };
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.elapsed() < pool::TICK {
            return Ok(());
        }
        *told = Instant::now();
        drop(told);
        report(py, &self.encoding.progress, callback)
    }

    /// Hands rows to the threads that encode them, a piece at a time, until there are no more or somebody has failed.
    fn feed(
        &self,
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        strip_nulls: bool,
        feed: &Feed<Vec<Fields>>,
    ) -> Result<(), Ceased> {
        let options = &self.encoding.options;
        let mut iterator = rows.try_iter().map_err(Ceased::Raised)?;
        loop {
            let (mut piece, mut raised) = (Vec::with_capacity(PIECE_ROWS), None);
            for row in iterator.by_ref().take(PIECE_ROWS) {
                match row.and_then(|row| fields(&row, options)) {
                    Ok(mut row) => {
                        if let (Ok((values, _)), true) = (&mut row, strip_nulls) {
                            values.iter_mut().flatten().for_each(Value::strip_nulls);
                        }
                        piece.push(row);
                    }
                    Err(error) => {
                        raised = Some(error);
                        break;
                    }
                }
            }
            let is_last = piece.len() < PIECE_ROWS;
            while !piece.is_empty() {
                py.check_signals().and_then(|()| self.tell(py)).map_err(Ceased::Told)?;
                match feed.give(std::mem::take(&mut piece)) {
                    Offer::Taken => {}
                    Offer::Left => return Ok(()),
                    Offer::Full(back) => {
                        piece = back;
                        py.detach(|| feed.wait());
                    }
                }
            }
            match raised {
                Some(error) if error.is_instance_of::<PyException>(py) => {
                    return Err(Ceased::Raised(error));
                }
                Some(error) => return Err(Ceased::Told(error)),
                None if is_last => return Ok(()),
                None => {}
            }
        }
    }

    fn add(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&Job<'_>, &mut Encoded) -> Result<()> + Send + 'static,
    ) -> PyResult<()> {
        let mut all = self.take()?;
        let all = self.encoding.wait(py, self.callback.as_ref(), move |job| {
            work(job, &mut all)?;
            Ok(all)
        })?;
        self.put(all);
        Ok(())
    }
}

#[pymethods]
impl PairEncoder {
    #[new]
    #[pyo3(signature = (tokenizer, settings, callback=None))]
    fn new(
        tokenizer: Bound<'_, PyTokenizer>,
        settings: Bound<'_, PyAny>,
        callback: Option<Py<PyAny>>,
    ) -> PyResult<Self> {
        let encoding = Arc::new(Encoding::new(&tokenizer, &settings)?);
        let extra = encoding.options.keys.extra.len();
        let encoded = Mutex::new(Some(Encoded::new(vec![None; extra])));
        Ok(Self { encoding, callback, told: Mutex::new(Instant::now()), encoded })
    }

    /// The fields that rows are asked for, in order.
    #[getter]
    fn names(&self) -> Vec<&str> {
        self.encoding.options.keys.names()
    }

    /// JSONL files.
    fn add_files(&self, py: Python<'_>, paths: Vec<PathBuf>) -> PyResult<()> {
        self.add(py, move |job, all| encode_files(&paths, job, all))
    }

    /// Any iterable of dicts; those of tables have keys that are null because other rows have them.
    fn add_rows(&self, py: Python<'_>, rows: Bound<'_, PyAny>, strip_nulls: bool) -> PyResult<()> {
        let mut all = self.take()?;
        let threads = pool::threads(self.encoding.threads);
        let feed = Arc::new(Feed::new(4 * threads));
        let (encoding, fed) = (Arc::clone(&self.encoding), Arc::clone(&feed));
        let running = pool::start(threads, move || {
            let done = encode_fed(&fed, &encoding.job(), &mut all);
            fed.leave();
            done.map(|()| all)
        })?;
        let ceased = self.feed(py, &rows, strip_nulls, &feed).err();
        let progress = &self.encoding.progress;
        if let Some(Ceased::Told(error)) = ceased {
            progress.cancel.store(true, Ordering::Relaxed);
            return Err(error);
        }
        feed.close();
        // What is wrong with a row before is raised first.
        let all = awaited(py, running, progress, self.callback.as_ref())?;
        match ceased {
            Some(Ceased::Raised(error)) => return Err(error),
            _ => self.put(all),
        }
        self.tell(py)
    }

    /// Arrow columns of `rows` rows, described over `buffers`, in the order of `names`. `first` counts the rows of
    /// the file `path` before them, and `done` the bytes of files done with them; `others` are further columns of
    /// text.
    fn add_columns(
        &self,
        py: Python<'_>,
        rows: usize,
        columns: Vec<Option<Bound<'_, PyTuple>>>,
        buffers: Vec<PyReadonlyArray1<'_, u8>>,
        path: Option<PathBuf>,
        first: u64,
        done: u64,
        others: Vec<String>,
    ) -> PyResult<()> {
        let slices = buffers.iter().map(|b| Ok(b.as_slice()?)).collect::<PyResult<Vec<_>>>()?;
        let columns = columns
            .iter()
            .map(|c| c.as_ref().map(|c| column(c, &slices)).transpose())
            .collect::<PyResult<Vec<_>>>()?;
        let mut all = self.take()?;
        let (path, others) = (path.as_deref(), &others);
        let table = Columns { columns: &columns, rows, path, first, others };
        let job = self.encoding.job();
        let work = move || {
            encode_columns(table, &job, &mut all)?;
            job.progress.bytes.fetch_add(done, Ordering::Relaxed);
            Ok(all)
        };
        let Encoding { threads, progress, .. } = &*self.encoding;
        let all = waited_scoped(py, *threads, progress, self.callback.as_ref(), work)?;
        self.put(all);
        self.tell(py)
    }

    /// Pairs since the last `finish`.
    #[getter]
    fn kept(&self) -> u64 {
        let encoded = self.encoded.lock().unwrap_or_else(PoisonError::into_inner);
        encoded.as_ref().map_or(0, |encoded| encoded.tally.kept)
    }

    /// What was encoded; the encoder starts anew, but for what the extra columns hold.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let encoded = self.take()?;
        self.put(Encoded::new(encoded.kinds()));
        encoded_dict(py, encoded)
    }
}

fn first_tuple(py: Python<'_>, place: Place, message: String) -> PyResult<Bound<'_, PyTuple>> {
    let line = place.line_or_row();
    (place.path, line, place.field, message, place.row.map(NonZeroU64::get)).into_pyobject(py)
}

/// An extra column as an array of booleans, whole numbers or numbers, or as a list of strings.
fn extra_column(py: Python<'_>, cells: Vec<Cell>) -> PyResult<Bound<'_, PyAny>> {
    if cells.iter().all(|cell| matches!(cell, Cell::Int(_))) {
        let whole = cells.iter().map(|c| if let Cell::Int(n) = c { *n } else { 0 });
        return Ok(whole.collect::<Vec<i64>>().into_pyarray(py).into_any());
    }
    Ok(match cells.first() {
        Some(Cell::Bool(_)) => {
            let flags = cells.iter().map(|c| matches!(c, Cell::Bool(true)));
            flags.collect::<Vec<bool>>().into_pyarray(py).into_any()
        }
        Some(Cell::Str(_)) => {
            let texts =
                cells.into_iter().map(|c| if let Cell::Str(s) = c { s } else { String::new() });
            texts.collect::<Vec<String>>().into_pyobject(py)?.into_any()
        }
        _ => {
            let numbers = cells.iter().map(|c| match c {
                Cell::Int(n) => *n as f64,
                Cell::Float(x) => *x,
                Cell::Bool(_) | Cell::Str(_) => f64::NAN,
            });
            numbers.collect::<Vec<f64>>().into_pyarray(py).into_any()
        }
    })
}

fn encoded_dict(py: Python<'_>, encoded: Encoded) -> PyResult<Bound<'_, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("prompt", ragged_tuple(py, encoded.prompt)?)?;
    out.set_item("chosen", ragged_tuple(py, encoded.chosen)?)?;
    out.set_item("rejected", ragged_tuple(py, encoded.rejected)?)?;
    let weights = encoded.weights.map(|sides| sides.map(|side| side.into_pyarray(py)));
    out.set_item("weights", weights.map(|[chosen, rejected]| (chosen, rejected)))?;
    out.set_item("ref_logps", encoded.ref_logps.into_pyarray(py))?;
    out.set_item("with_ref", encoded.with_ref)?;
    out.set_item("rows", encoded.rows.into_pyarray(py))?;
    let extra = encoded.extra.into_iter().map(|cells| extra_column(py, cells));
    out.set_item("columns", extra.collect::<PyResult<Vec<_>>>()?)?;
    out.set_item("read", encoded.tally.read)?;
    out.set_item("kept", encoded.tally.kept)?;
    out.set_item("bytes", encoded.bytes)?;
    let layouts = PyDict::new(py);
    for (layout, count) in encoded.tally.layouts {
        layouts.set_item(layout.name(), count)?;
    }
    out.set_item("layouts", layouts)?;
    out.set_item("unread", encoded.tally.unread.into_iter().collect::<Vec<_>>())?;
    let first = PyDict::new(py);
    let dropped = PyDict::new(py);
    for (reason, count) in encoded.tally.dropped {
        dropped.set_item(reason.name(), count.count)?;
        first.set_item(reason.name(), first_tuple(py, count.first, count.message)?)?;
    }
    let warned = PyDict::new(py);
    for (warning, count) in encoded.tally.warned {
        warned.set_item(warning.name(), count.count)?;
        first.set_item(warning.name(), first_tuple(py, count.first, count.message)?)?;
    }
    out.set_item("dropped", dropped)?;
    out.set_item("warned", warned)?;
    out.set_item("first", first)?;
    Ok(out)
}
