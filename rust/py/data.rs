//! Whole data sets: files and rows in, flat arrays and counts out.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use numpy::IntoPyArray;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use super::layout::ragged_tuple;
use super::tokenizer::{PyTokenizer, now};
use super::value::fields;
use crate::encode::{Encoded, FileEncoder, OnBad, Progress, encode_files, encode_rows, scan_files};
use crate::error::{Error, Place, Result};
use crate::pair::{Boundary, Options, SpecialText, Truncation, WARNINGS};
use crate::pool;
use crate::read::limits::Limits;
use crate::read::row::Keys;

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyFileEncoder>()?;
    m.add_function(wrap_pyfunction!(data_from_files, m)?)?;
    m.add_function(wrap_pyfunction!(data_from_rows, m)?)?;
    m.add_function(wrap_pyfunction!(scan, m)?)
}

/// Waits for work on the pool without the GIL; attaches at least every 50 ms for signals and the progress callback.
pub(super) fn waited<T: Send + 'static>(
    py: Python<'_>,
    threads: Option<usize>,
    progress: &Arc<Progress>,
    callback: Option<&Py<PyAny>>,
    work: impl FnOnce(&Progress) -> Result<T> + Send + 'static,
) -> PyResult<T> {
    let shared = Arc::clone(progress);
    let mut raised: Option<PyErr> = None;
    let result = py.detach(|| {
        pool::run(
            pool::threads(threads),
            move || work(&shared),
            || {
                Python::attach(|py| {
                    let called = py.check_signals().and_then(|()| match callback {
                        Some(f) => {
                            let done = progress.bytes.load(Ordering::Relaxed);
                            let rows = progress.rows.load(Ordering::Relaxed);
                            f.call1(py, (done, rows)).map(drop)
                        }
                        None => Ok(()),
                    });
                    called.map_err(|e| {
                        raised = Some(e);
                        progress.cancel.store(true, Ordering::Relaxed);
                        Error::Interrupted
                    })
                })
            },
        )
    });
    match raised {
        Some(e) => Err(e),
        None => Ok(result?),
    }
}
/// Options as Python passes them: its frozen dataclasses, read by attribute.
fn options(options: &Bound<'_, PyAny>) -> PyResult<(Options, OnBad, Option<usize>)> {
    let get = |name: &str| options.getattr(name);
    let word = |name: &str| -> PyResult<String> { get(name)?.extract() };
    let key = |name: &str, default: &str| -> PyResult<String> {
        Ok(get(name)?.extract::<Option<String>>()?.unwrap_or_else(|| default.to_owned()))
    };
    let unknown =
        |name: &str, found: &str| PyValueError::new_err(format!("unknown `{name}`: {found:?}"));
    let truncation = match word("truncation")?.as_str() {
        "keep_start" => Truncation::KeepStart,
        "keep_end" => Truncation::KeepEnd,
        "keep_completions" => Truncation::KeepCompletions,
        "drop" => Truncation::Drop,
        "error" => Truncation::Error,
        other => return Err(unknown("truncation", other)),
    };
    let boundary = match word("boundary")?.as_str() {
        "joint" => Boundary::Joint,
        "separate" => Boundary::Separate,
        "trl" => Boundary::Trl,
        other => return Err(unknown("boundary", other)),
    };
    let special_text = match word("special_tokens_in_text")?.as_str() {
        "special" => SpecialText::Special,
        "text" => SpecialText::Text,
        "error" => SpecialText::Error,
        other => return Err(unknown("special_tokens_in_text", other)),
    };
    let on_bad = match word("on_bad")?.as_str() {
        "error" => OnBad::Error,
        "skip" => OnBad::Skip,
        other => return Err(unknown("on_bad", other)),
    };
    let keys = Keys {
        prompt: key("prompt_key", "prompt")?,
        prompt_required: !get("prompt_key")?.is_none(),
        chosen: key("chosen_key", "chosen")?,
        rejected: key("rejected_key", "rejected")?,
    };
    let out = Options {
        max_length: get("max_length")?.extract()?,
        truncation,
        boundary,
        special_text,
        keys,
        limits: limits(&get("limits")?)?,
        now: now(get("now")?.extract()?),
    };
    Ok((out, on_bad, get("threads")?.extract()?))
}

fn limits(limits: &Bound<'_, PyAny>) -> PyResult<Limits> {
    let get = |name: &str| limits.getattr(name);
    Ok(Limits {
        max_line_bytes: get("max_line_bytes")?.extract()?,
        max_rendered_bytes: get("max_rendered_bytes")?.extract()?,
        max_depth: get("max_depth")?.extract()?,
        max_keys: get("max_keys")?.extract()?,
        max_messages: get("max_messages")?.extract()?,
        max_row_tokens: get("max_row_tokens")?.extract()?,
        max_expansion: get("max_expansion")?.extract()?,
        max_unpacked_bytes: get("max_unpacked_bytes")?.extract()?,
    })
}

#[pyfunction]
#[pyo3(signature = (paths, tokenizer, settings, callback=None))]
fn data_from_files<'py>(
    py: Python<'py>,
    paths: Vec<PathBuf>,
    tokenizer: Bound<'py, PyTokenizer>,
    settings: Bound<'py, PyAny>,
    callback: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (options, on_bad, threads) = options(&settings)?;
    let tokenizer = Arc::clone(&tokenizer.get().inner);
    let progress = Arc::new(Progress::default());
    let encoded = waited(py, threads, &progress, callback.as_ref(), move |progress| {
        encode_files(&paths, &tokenizer, &options, on_bad, progress)
    })?;
    encoded_dict(py, encoded)
}

/// The pairs of files, some at a time.
#[pyclass(frozen, name = "FileEncoder")]
pub(super) struct PyFileEncoder {
    /// `None` while a call works on it, and after one that failed.
    files: Mutex<Option<FileEncoder>>,
    tokenizer: Arc<crate::tokenize::Tokenizer>,
    options: Arc<Options>,
    on_bad: OnBad,
    threads: Option<usize>,
    progress: Arc<Progress>,
}

#[pymethods]
impl PyFileEncoder {
    #[new]
    fn new(
        paths: Vec<PathBuf>,
        tokenizer: Bound<'_, PyTokenizer>,
        settings: Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let (options, on_bad, threads) = options(&settings)?;
        Ok(Self {
            files: Mutex::new(Some(FileEncoder::new(paths, options.limits.clone()))),
            tokenizer: Arc::clone(&tokenizer.get().inner),
            options: Arc::new(options),
            on_bad,
            threads,
            progress: Arc::new(Progress::default()),
        })
    }

    /// At least `pairs` further pairs as `data_from_files` gives them; None behind the last row.
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
        let (tokenizer, options, on_bad) =
            (Arc::clone(&self.tokenizer), Arc::clone(&self.options), self.on_bad);
        let (files, encoded) =
            waited(py, self.threads, &self.progress, callback.as_ref(), move |progress| {
                let encoded = files.next(pairs, &tokenizer, &options, on_bad, progress)?;
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
    let (options, on_bad, threads) = options(&settings)?;
    let progress = Arc::new(Progress::default());
    waited(py, threads, &progress, None, move |progress| {
        scan_files(&paths, &options, on_bad, vocab_size, progress)
    })
}

/// Rows that are taken out of Python at a time.
const BATCH: usize = 2048;

#[pyfunction]
#[pyo3(signature = (rows, tokenizer, settings, callback=None))]
fn data_from_rows<'py>(
    py: Python<'py>,
    rows: Bound<'py, PyAny>,
    tokenizer: Bound<'py, PyTokenizer>,
    settings: Bound<'py, PyAny>,
    callback: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (options, on_bad, threads) = options(&settings)?;
    let options = Arc::new(options);
    let tokenizer = Arc::clone(&tokenizer.get().inner);
    let progress = Arc::new(Progress::default());
    let mut all = Encoded::default();
    let mut iterator = rows.try_iter()?;
    loop {
        let mut batch = Vec::with_capacity(BATCH);
        for row in iterator.by_ref().take(BATCH) {
            batch.push(fields(&row?, &options)?);
        }
        if batch.is_empty() {
            break;
        }
        let (tokenizer, options) = (Arc::clone(&tokenizer), Arc::clone(&options));
        let before = std::mem::take(&mut all);
        all = waited(py, threads, &progress, callback.as_ref(), move |progress| {
            let mut all = before;
            let count = batch.len() as u64;
            encode_rows(batch, &tokenizer, &options, on_bad, progress, &mut all)?;
            progress.rows.fetch_add(count, Ordering::Relaxed);
            Ok(all)
        })?;
    }
    encoded_dict(py, all)
}
fn first_tuple(py: Python<'_>, place: Place, message: String) -> PyResult<Bound<'_, PyTuple>> {
    (place.path, place.line, place.field, message).into_pyobject(py)
}

fn encoded_dict(py: Python<'_>, encoded: Encoded) -> PyResult<Bound<'_, PyDict>> {
    let out = PyDict::new(py);
    out.set_item("prompt", ragged_tuple(py, encoded.prompt)?)?;
    out.set_item("chosen", ragged_tuple(py, encoded.chosen)?)?;
    out.set_item("rejected", ragged_tuple(py, encoded.rejected)?)?;
    out.set_item("ref_logps", encoded.ref_logps.into_pyarray(py))?;
    out.set_item("with_ref", encoded.with_ref)?;
    out.set_item("rows", encoded.rows.into_pyarray(py))?;
    out.set_item("read", encoded.tally.read)?;
    out.set_item("kept", encoded.tally.kept)?;
    out.set_item("bytes", encoded.bytes)?;
    let first = PyDict::new(py);
    let dropped = PyDict::new(py);
    for (reason, count) in encoded.tally.dropped {
        dropped.set_item(reason, count.count)?;
        first.set_item(reason, first_tuple(py, count.first, count.message)?)?;
    }
    let warned = PyDict::new(py);
    for (name, count) in WARNINGS.iter().zip(encoded.tally.warned) {
        if count.count > 0 {
            warned.set_item(name, count.count)?;
            first.set_item(name, first_tuple(py, count.first, count.message)?)?;
        }
    }
    out.set_item("dropped", dropped)?;
    out.set_item("warned", warned)?;
    out.set_item("first", first)?;
    Ok(out)
}
