//! Rows, text and ids: `Tokenizer`, whole data sets, the arrays of a batch.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use numpy::{IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple};

use super::detached;
use crate::encode::{
    Encoded, Fields, OnBad, Progress, Ragged, encode_files, encode_rows, scan_files,
};
use crate::error::{Error, Place, Result};
use crate::layout::{Lists, Pairs, order, pack, pad};
use crate::pair::{Boundary, Options, SpecialText, Truncation, WARNINGS};
use crate::pool;
use crate::read::json::{Findings, Value};
use crate::read::limits::Limits;
use crate::read::row::{Bad, Keys};
use crate::template::{Now, RenderError, message_to_jinja, to_jinja};
use crate::tokenize::{Added, Source, Tokenizer};

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenizer>()?;
    m.add_function(wrap_pyfunction!(data_from_files, m)?)?;
    m.add_function(wrap_pyfunction!(data_from_rows, m)?)?;
    m.add_function(wrap_pyfunction!(scan, m)?)?;
    m.add_function(wrap_pyfunction!(check_ids, m)?)?;
    m.add_function(wrap_pyfunction!(pad_batch, m)?)?;
    m.add_function(wrap_pyfunction!(pack_lengths, m)?)?;
    m.add_function(wrap_pyfunction!(pack_batch, m)?)?;
    m.add_function(wrap_pyfunction!(epoch_order, m)?)?;
    m.add_function(wrap_pyfunction!(batches_by_slots, m)?)
}

/// Waits for work on the pool without the GIL; attaches at least every 50 ms for signals and the progress callback.
fn waited<T: Send + 'static>(
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

#[pyclass(frozen, name = "Tokenizer", module = "dpo_ext._core")]
struct PyTokenizer {
    inner: Arc<Tokenizer>,
}

/// (content, lstrip, rstrip, single word, normalized, special)
type AddedTuple = (String, bool, bool, bool, bool, bool);
/// (year, month, day, hour, minute, second, weekday, day of the year)
type NowTuple = (i32, i32, i32, i32, i32, i32, usize, i32);

fn now((year, month, day, hour, minute, second, weekday, yearday): NowTuple) -> Now {
    Now { time: [year, month, day, hour, minute, second], weekday, yearday }
}

#[pymethods]
impl PyTokenizer {
    #[new]
    fn new(
        py: Python<'_>,
        json: String,
        named: Vec<(String, String)>,
        added: Vec<AddedTuple>,
        ids: (Option<u32>, Option<u32>, Option<u32>),
        template: Option<String>,
    ) -> PyResult<Self> {
        let added = added
            .into_iter()
            .map(|(content, lstrip, rstrip, single_word, normalized, special)| Added {
                content,
                lstrip,
                rstrip,
                single_word,
                normalized,
                special,
            })
            .collect();
        let ids = [ids.0, ids.1, ids.2];
        let source = Source { json, named, added, ids, template };
        let inner = detached(py, || Tokenizer::new(source))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }

    /// Why the engine is not `bpe`, None if it is.
    #[getter]
    fn refusal(&self) -> Option<&str> {
        self.inner.refusal()
    }

    #[getter]
    fn gaps(&self) -> usize {
        self.inner.gaps()
    }

    #[getter]
    fn bos_id(&self) -> Option<u32> {
        self.inner.bos()
    }

    #[getter]
    fn eos_id(&self) -> Option<u32> {
        self.inner.eos()
    }

    #[getter]
    fn pad_id(&self) -> Option<u32> {
        self.inner.pad()
    }

    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: &Bound<'py, PyString>,
        add_special_tokens: bool,
    ) -> PyResult<Bound<'py, PyArray1<i32>>> {
        let text = borrowed(text).map_err(|bad| as_data_error(bad, None))?;
        let ids = detached(py, || self.inner.encode(text, add_special_tokens))?;
        Ok(ids.into_pyarray(py))
    }

    fn decode(&self, py: Python<'_>, ids: Ids<'_>) -> PyResult<String> {
        let ids = ids.as_slice()?;
        detached(py, || self.inner.decode(ids))
    }

    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        add_special_tokens: bool,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let mut owned = Vec::new();
        for (i, text) in texts.try_iter()?.enumerate() {
            let text = text?;
            let text = text.cast::<PyString>().map_err(|_| {
                PyTypeError::new_err(format!(
                    "`texts` must be strings, found {} at {i}",
                    kind_of(&text)
                ))
            })?;
            let row = i as u64 + 1;
            owned.push(borrowed(text).map_err(|bad| as_data_error(bad, Some(row)))?.to_owned());
        }
        let tokenizer = Arc::clone(&self.inner);
        let progress = Arc::new(Progress::default());
        let ragged = waited(py, threads, &progress, None, move |progress| {
            use rayon::prelude::*;
            let parts: Vec<Result<Vec<i32>>> = owned
                .par_iter()
                .map(|text| {
                    if progress.cancel.load(Ordering::Relaxed) {
                        return Err(Error::Interrupted);
                    }
                    tokenizer.encode(text, add_special_tokens)
                })
                .collect();
            let mut out = Ragged::default();
            for part in parts {
                out.push(&part?);
            }
            Ok(out)
        })?;
        ragged_tuple(py, ragged)
    }

    fn apply_chat_template(
        &self,
        py: Python<'_>,
        messages: &Bound<'_, PyAny>,
        add_generation_prompt: bool,
        variables: &Bound<'_, PyDict>,
        time: NowTuple,
    ) -> PyResult<String> {
        let limits = Limits::default();
        let convert = |value: &Bound<'_, PyAny>, name: &str| -> PyResult<Value<'static>> {
            let mut findings = Findings::default();
            let value = to_value(value, &limits, 1, &mut findings).map_err(|mut bad| {
                bad.field = Some(name.to_owned());
                as_data_error(bad, None)
            })?;
            match findings.limit {
                Some((limit, message)) => {
                    Err(as_data_error(Bad::new("limit", limit, message), None))
                }
                None => Ok(value),
            }
        };
        let Value::List(messages) = convert(messages, "messages")? else {
            return Err(PyTypeError::new_err("`messages` must be a list of dicts"));
        };
        let mut context =
            vec![("tools".to_owned(), Value::Null), ("documents".to_owned(), Value::Null)];
        for (name, text) in self.inner.named() {
            context.push((name.clone(), Value::Str(text.clone().into())));
        }
        for (name, value) in variables {
            let name: String = name.extract()?;
            let value = convert(&value, &name)?;
            context.retain(|(n, _)| *n != name);
            context.push((name, value));
        }
        let tokenizer = Arc::clone(&self.inner);
        detached(py, move || {
            let failed = |message: String| Error::Tokenizer(format!("chat template: {message}"));
            let template = tokenizer.template()?;
            let count = messages.len();
            let bytes = messages.iter().map(size).sum();
            let rendered: std::result::Result<Vec<_>, String> =
                messages.iter().map(message_to_jinja).collect();
            let mut all = vec![
                ("messages", minijinja::Value::from(rendered.map_err(failed)?)),
                ("add_generation_prompt", minijinja::Value::from(add_generation_prompt)),
            ];
            for (name, value) in &context {
                all.push((name, to_jinja(value).map_err(failed)?));
            }
            let cap = limits.max_rendered_bytes;
            template.render(&all, now(time), count, bytes, cap).map_err(|e| match e {
                RenderError::Template(message) => failed(message),
                RenderError::TooLong => Error::Limit {
                    place: Place {
                        field: Some("max_rendered_bytes".to_owned()),
                        ..Place::default()
                    },
                    message: format!("the rendered conversation has more than {cap} bytes"),
                },
            })
        })
    }
}

/// Bytes of all strings inside a value.
fn size(value: &Value<'_>) -> usize {
    match value {
        Value::Str(text) => text.len(),
        Value::List(items) => items.iter().map(size).sum(),
        Value::Object(items) => items.iter().map(|(_, v)| size(v)).sum(),
        _ => 0,
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

fn kind_of(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}

/// The named values of one row.
fn fields(row: &Bound<'_, PyAny>, options: &Options) -> PyResult<Fields> {
    let Ok(row) = row.cast::<PyMapping>() else {
        let message = format!("expected a dict, found {}", kind_of(row));
        return Ok(Err(Bad::new("not_an_object", "", message)));
    };
    let mut out = Vec::new();
    let mut findings = Findings::default();
    for name in options.keys.names() {
        let value = match row.cast::<PyDict>() {
            Ok(dict) => dict.get_item(name)?,
            Err(_) => row.contains(name)?.then(|| row.get_item(name)).transpose()?,
        };
        match value.map(|value| to_value(&value, &options.limits, 1, &mut findings)).transpose() {
            Ok(value) => out.push(value),
            Err(mut bad) => {
                bad.field.get_or_insert_with(|| name.to_owned());
                return Ok(Err(bad));
            }
        }
    }
    Ok(Ok((out, findings)))
}

/// A string without lone surrogates.
fn borrowed<'a>(text: &'a Bound<'_, PyString>) -> Result<&'a str, Bad> {
    text.to_str()
        .map_err(|_| Bad::new("bad_json", "", "expected Unicode text, found a lone surrogate"))
}

fn as_data_error(bad: Bad, line: Option<u64>) -> PyErr {
    let place = Place { line, field: bad.field, ..Place::default() };
    if bad.reason == "limit" {
        Error::Limit { place, message: bad.message }.into()
    } else {
        Error::Data { place, reason: bad.reason, message: bad.message }.into()
    }
}

/// A Python value as JSON would hold it.
fn to_value(
    value: &Bound<'_, PyAny>,
    limits: &Limits,
    depth: usize,
    findings: &mut Findings,
) -> Result<Value<'static>, Bad> {
    let failed = |e: PyErr| Bad::new("wrong_type", "", format!("expected a plain value: {e}"));
    if depth > limits.max_depth {
        if findings.limit.is_none() {
            let message = format!("a value is nested more than {} deep", limits.max_depth);
            findings.limit = Some(("max_depth", message));
        }
        return Ok(Value::Null);
    }
    if value.is_none() {
        return Ok(Value::Null);
    }
    if let Ok(text) = value.cast::<PyString>() {
        return Ok(Value::Str(borrowed(text)?.to_owned().into()));
    }
    if let Ok(flag) = value.cast::<PyBool>() {
        return Ok(Value::Bool(flag.is_true()));
    }
    if let Ok(number) = value.cast::<PyInt>() {
        return Ok(match number.extract::<i128>() {
            Ok(number) => Value::Int(number),
            Err(_) => Value::Huge(String::new().into()),
        });
    }
    if let Ok(number) = value.cast::<PyFloat>() {
        return Ok(Value::Float(number.value()));
    }
    if let Ok(items) = value.cast::<PyList>() {
        return items
            .iter()
            .map(|item| to_value(&item, limits, depth + 1, findings))
            .collect::<Result<_, _>>()
            .map(Value::List);
    }
    if let Ok(items) = value.cast::<PyTuple>() {
        return items
            .iter()
            .map(|item| to_value(&item, limits, depth + 1, findings))
            .collect::<Result<_, _>>()
            .map(Value::List);
    }
    if let Ok(items) = value.cast::<PyMapping>() {
        if items.len().map_err(failed)? > limits.max_keys && findings.limit.is_none() {
            let message = format!("an object has more than {} keys", limits.max_keys);
            findings.limit = Some(("max_keys", message));
        }
        let mut out = Vec::new();
        for item in items.items().map_err(failed)?.iter().take(limits.max_keys) {
            let (key, value): (Bound<'_, PyAny>, Bound<'_, PyAny>) =
                item.extract().map_err(failed)?;
            let Ok(key) = key.cast::<PyString>() else {
                let message = format!("expected strings as keys, found {}", kind_of(&key));
                return Err(Bad::new("wrong_type", "", message));
            };
            out.push((
                borrowed(key)?.to_owned().into(),
                to_value(&value, limits, depth + 1, findings)?,
            ));
        }
        return Ok(Value::Object(out));
    }
    // NumPy arrays and scalars.
    if let Ok(method) = value.getattr(intern!(value.py(), "tolist")) {
        return to_value(&method.call0().map_err(failed)?, limits, depth + 1, findings);
    }
    Err(Bad::new(
        "wrong_type",
        "",
        format!("expected text, a list, a dict or a number, found {}", kind_of(value)),
    ))
}

fn ragged_tuple(py: Python<'_>, ragged: Ragged) -> PyResult<Bound<'_, PyTuple>> {
    (ragged.values.into_pyarray(py), ragged.offsets.into_pyarray(py)).into_pyobject(py)
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

type Ids<'py> = PyReadonlyArray1<'py, i32>;
type Offsets<'py> = PyReadonlyArray1<'py, i64>;

fn lists<'a>(values: &'a Ids<'_>, offsets: &'a Offsets<'_>) -> PyResult<Lists<'a>> {
    Ok(Lists::trusted(values.as_slice()?, offsets.as_slice()?))
}

/// Checks offsets and ids that came from outside; the message names the list that is bad.
#[pyfunction]
fn check_ids(
    py: Python<'_>,
    name: String,
    values: Ids<'_>,
    offsets: Offsets<'_>,
    vocab_size: Option<i64>,
) -> PyResult<()> {
    let (values, offsets) = (values.as_slice()?, offsets.as_slice()?);
    detached(py, || {
        Lists::new(values, offsets).map_err(|e| Error::Tensor(format!("`{name}`: {e}")))?;
        let most = vocab_size.unwrap_or(i64::from(i32::MAX) + 1);
        match values.iter().position(|id| *id < 0 || i64::from(*id) >= most) {
            None => Ok(()),
            Some(at) => {
                let row = offsets.partition_point(|start| *start <= at as i64);
                let found = values.get(at).copied().unwrap_or_default();
                Err(Error::Data {
                    place: Place { line: Some(row as u64), field: Some(name), ..Place::default() },
                    reason: "bad_ids",
                    message: format!("expected token ids in 0..{most}, found {found}"),
                })
            }
        }
    })
}

/// The padded batch of `index`: ids and two masks of shape (2N, T), then the table's three arrays.
#[pyfunction]
fn pad_batch<'py>(
    py: Python<'py>,
    prompt: (Ids<'py>, Offsets<'py>),
    chosen: (Ids<'py>, Offsets<'py>),
    rejected: (Ids<'py>, Offsets<'py>),
    index: PyReadonlyArray1<'py, i64>,
    pad_id: i64,
    multiple: usize,
) -> PyResult<Bound<'py, PyTuple>> {
    let pairs = Pairs {
        prompt: lists(&prompt.0, &prompt.1)?,
        chosen: lists(&chosen.0, &chosen.1)?,
        rejected: lists(&rejected.0, &rejected.1)?,
    };
    let rows = index.len() * 2;
    let index = index.as_slice()?;
    let batch = detached(py, || pad::pad(&pairs, index, pad_id, multiple))?;
    let width = batch.width;
    let shaped = |values: Vec<i64>| values.into_pyarray(py).reshape([rows, width]);
    let table = batch.table;
    (
        shaped(batch.input_ids)?,
        shaped(batch.attention_mask)?,
        shaped(batch.completion_mask)?,
        table.logit_rows.into_pyarray(py),
        table.targets.into_pyarray(py),
        table.offsets.into_pyarray(py),
    )
        .into_pyobject(py)
}

#[pyfunction]
fn pack_lengths<'py>(
    py: Python<'py>,
    lengths: PyReadonlyArray1<'py, i64>,
    capacity: usize,
    seed: u64,
) -> PyResult<Bound<'py, PyTuple>> {
    let lengths = lengths.as_slice()?;
    let (items, starts) = detached(py, || pack::pack_lengths(lengths, capacity, seed))?;
    (items.into_pyarray(py), starts.into_pyarray(py)).into_pyobject(py)
}

/// Packed rows: ids and positions of shape (R, T), segment offsets, the longest segment, then the table's three arrays.
#[pyfunction]
fn pack_batch<'py>(
    py: Python<'py>,
    prompt: (Ids<'py>, Offsets<'py>),
    chosen: (Ids<'py>, Offsets<'py>),
    rejected: (Ids<'py>, Offsets<'py>),
    index: PyReadonlyArray1<'py, i64>,
    bounds: PyReadonlyArray1<'py, i64>,
    width: usize,
    pad_id: i64,
    multiple: usize,
) -> PyResult<Bound<'py, PyTuple>> {
    let pairs = Pairs {
        prompt: lists(&prompt.0, &prompt.1)?,
        chosen: lists(&chosen.0, &chosen.1)?,
        rejected: lists(&rejected.0, &rejected.1)?,
    };
    let (index, bounds) = (index.as_slice()?, bounds.as_slice()?);
    let rows = bounds.len().saturating_sub(1);
    let batch = detached(py, || pack::pack(&pairs, index, bounds, width, pad_id, multiple))?;
    let width = batch.width;
    let shaped = |values: Vec<i64>| values.into_pyarray(py).reshape([rows, width]);
    let table = batch.table;
    (
        shaped(batch.input_ids)?,
        shaped(batch.position_ids)?,
        batch.cu_seq_lens.into_pyarray(py),
        batch.longest,
        table.logit_rows.into_pyarray(py),
        table.targets.into_pyarray(py),
        table.offsets.into_pyarray(py),
    )
        .into_pyobject(py)
}

#[pyfunction]
fn epoch_order(
    py: Python<'_>,
    n: u64,
    seed: u64,
    epoch: u64,
    shuffle: bool,
    start: u64,
    stop: u64,
) -> PyResult<Bound<'_, PyArray1<i64>>> {
    let order = detached(py, || Ok(order::order(n, seed, epoch, shuffle, start, stop)))?;
    Ok(order.into_pyarray(py))
}

#[pyfunction]
fn batches_by_slots<'py>(
    py: Python<'py>,
    longest: PyReadonlyArray1<'py, i64>,
    budget: u64,
    multiple: u64,
    seed: u64,
    epoch: u64,
    shuffle: bool,
) -> PyResult<Bound<'py, PyArray1<i64>>> {
    let longest = longest.as_slice()?;
    let bounds = detached(py, || {
        order::by_slots(longest, budget, multiple, seed, epoch, shuffle).map_err(|(pair, slots)| Error::Data {
            place: Place::default(),
            reason: "too_long",
            message: format!(
                "pair {pair} needs {slots} slots, more than `tokens_per_batch`={budget}\nhint: use tokens_per_batch={slots} or more, or a smaller max_length"
            ),
        })
    })?;
    Ok(bounds.into_pyarray(py))
}
