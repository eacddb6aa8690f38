//! `Tokenizer`.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]

use std::num::NonZeroU64;
use std::sync::Arc;

use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};
use rayon::prelude::*;

use super::arrays::{Ids, Offsets, ragged_tuple};
use super::options::{NowTuple, now};
use super::value::{Unusable, as_data_error, borrowed, kind_of, to_value};
use super::wait::{detached, left, waited};
use crate::encode::{Progress, Ragged};
use crate::error::{Error, Place, Reason, Result};
use crate::fork;
use crate::read::bad::Bad;
use crate::read::json::{Findings, Value};
use crate::read::limits::Limits;
use crate::template::{Answer, Conversation, Fallback, RenderError};
use crate::tokenize::{Added, Source, Tokenizer, outline};

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(tokenizer_outline, m)?)?;
    m.add_class::<PyTokenizer>()
}

fn utf8(json: &[u8]) -> Result<&str> {
    std::str::from_utf8(json)
        .map_err(|e| Error::Tokenizer(format!("tokenizer.json: expected UTF-8: {e}")))
}

/// `tokenizer.json` without its vocabulary.
#[pyfunction]
fn tokenizer_outline(py: Python<'_>, json: &[u8]) -> PyResult<String> {
    detached(py, || outline(utf8(json)?))
}

#[pyclass(frozen, name = "Tokenizer", module = "dpo_ext._core")]
pub(super) struct PyTokenizer {
    pub(super) inner: Arc<Tokenizer>,
}

/// (content, lstrip, rstrip, single word, normalized, special)
type AddedTuple = (String, bool, bool, bool, bool, bool);
#[pymethods]
impl PyTokenizer {
    #[new]
    fn new(
        py: Python<'_>,
        json: &[u8],
        named: Vec<(String, String)>,
        added: Vec<AddedTuple>,
        split_special: bool,
        ids: (Option<u32>, Option<u32>, Option<u32>),
        template: Option<String>,
        tool_template: Option<String>,
        fallback: Option<Py<PyAny>>,
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
        let json = utf8(json)?.to_owned();
        let ids = [ids.0, ids.1, ids.2];
        let source = Source { json, named, added, split_special, ids, template, tool_template };
        let inner = left(py, true, move || {
            // What is made once for all tokenizers is whole before a fork comes.
            let _whole = fork::section()?;
            crate::pair::make_tables();
            Tokenizer::new(source)
        })?;
        let inner = match fallback {
            Some(fallback) => inner.with_fallback(|source| elsewhere(&fallback, source)),
            None => inner,
        };
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

    /// Why chat rows are rendered one by one and not joined, None if they are joined or there is no template.
    #[getter]
    fn template_refusal(&self) -> Option<&str> {
        self.inner.template(false).ok().and_then(|template| template.refusal())
    }

    /// Whether a chat template reads the variable, as far as that is known.
    fn reads(&self, name: &str) -> bool {
        self.inner.reads(name)
    }

    /// The variables that the chat templates read beside those of every template.
    #[getter]
    fn variables(&self) -> Vec<&str> {
        self.inner.variables()
    }

    /// Control tokens whose spelling gives their id even where it stays text.
    #[getter]
    fn merged(&self) -> Vec<String> {
        self.inner.control().merged().to_vec()
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
        let ids = if self.takes_long(text.len()) {
            let (inner, text) = (Arc::clone(&self.inner), text.to_owned());
            left(py, true, move || inner.encode(&text, add_special_tokens))?
        } else {
            detached(py, || self.inner.encode(text, add_special_tokens))?
        };
        Ok(ids.into_pyarray(py))
    }

    fn decode(&self, py: Python<'_>, ids: Ids<'_>) -> PyResult<String> {
        let ids = ids.as_slice()?;
        if self.takes_long(ids.len()) {
            let (inner, ids) = (Arc::clone(&self.inner), ids.to_owned());
            return left(py, true, move || inner.decode(&ids));
        }
        detached(py, || self.inner.decode(ids))
    }

    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        add_special_tokens: bool,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let mut all = Texts::default();
        for (i, text) in texts.try_iter()?.enumerate() {
            let text = text?;
            let text = text.cast::<PyString>().map_err(|_| {
                PyTypeError::new_err(format!(
                    "`texts` must be strings, found {} at {i}",
                    kind_of(&text)
                ))
            })?;
            let row = i as u64 + 1;
            if row.is_multiple_of(CHUNK as u64) {
                py.check_signals()?;
            }
            all.push(borrowed(text).map_err(|bad| as_data_error(bad, Some(row)))?);
        }
        self.encode_texts(py, all, add_special_tokens, threads)
    }

    /// Texts in the buffers of Arrow arrays: (bytes, offsets) of each chunk.
    fn encode_arrow<'py>(
        &self,
        py: Python<'py>,
        chunks: Vec<(PyReadonlyArray1<'py, u8>, Offsets<'py>)>,
        add_special_tokens: bool,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let mut all = Texts::default();
        for (bytes, offsets) in &chunks {
            all.append(bytes.as_slice()?, offsets.as_slice()?)?;
        }
        self.encode_texts(py, all, add_special_tokens, threads)
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
            let value = to_value(value, &limits, 1, &mut findings).map_err(|why| match why {
                Unusable::Raised(error) => error,
                Unusable::Bad(mut bad) => {
                    bad.field = Some(name.to_owned());
                    as_data_error(bad, None)
                }
            })?;
            match findings.limit {
                Some((limit, message)) => {
                    Err(as_data_error(Bad::new(Reason::Limit, limit, message), None))
                }
                None => Ok(value),
            }
        };
        let Value::List(messages) = convert(messages, "messages")? else {
            return Err(PyTypeError::new_err("`messages` must be a list of dicts"));
        };
        let mut context: Vec<(String, Value<'_>)> = Vec::new();
        for (name, value) in variables {
            let name: String = name.extract()?;
            context.push((name.clone(), convert(&value, &name)?));
        }
        let tokenizer = Arc::clone(&self.inner);
        // Another renderer is Python, and what a signal raises there would be its error.
        let is_long =
            !tokenizer.renders_here() || messages.iter().map(bytes_of).sum::<usize>() > LONG;
        left(py, is_long, move || {
            let failed = |message: String| Error::Tokenizer(format!("chat template: {message}"));
            let tools = context.iter().find(|(name, _)| name == "tools");
            let template =
                tokenizer.template(tools.is_some_and(|(_, tools)| *tools != Value::Null))?;
            let cap = limits.max_rendered_bytes;
            let messages: Vec<&Value<'_>> = messages.iter().collect();
            let variables: Vec<_> =
                context.iter().map(|(name, value)| (name.as_str(), value)).collect();
            let conversation = Conversation {
                messages: &messages,
                named: tokenizer.named(),
                variables: &variables,
                generation: add_generation_prompt,
                now: now(time),
                cap,
            };
            match template.render(&conversation) {
                Ok(rendered) => Ok(rendered.text),
                Err(RenderError::Template(message)) => Err(failed(message)),
                Err(RenderError::Lacks(construct)) => Err(failed(construct)),
                Err(RenderError::Value(name, message)) => {
                    Err(failed(format!("`{name}`: {message}")))
                }
                Err(RenderError::TooLong) => Err(Error::Limit {
                    place: Place {
                        field: Some("max_rendered_bytes".to_owned()),
                        ..Place::default()
                    },
                    message: format!("the rendered conversation has more than {cap} bytes"),
                }),
            }
        })
    }
}

/// Bytes of text, or ids, that take so long that a signal would have to wait; fewer where the crate encodes.
const LONG: usize = 1 << 20;
const LONG_ELSEWHERE: usize = 1 << 16;

/// Bytes of text in a value.
fn bytes_of(value: &Value<'_>) -> usize {
    match value {
        Value::Str(text) => text.len(),
        Value::List(items) => items.iter().map(bytes_of).sum(),
        Value::Object(fields) => fields.iter().map(|(_, value)| bytes_of(value)).sum(),
        _ => 0,
    }
}

impl PyTokenizer {
    fn takes_long(&self, size: usize) -> bool {
        size > if self.inner.refusal().is_none() { LONG } else { LONG_ELSEWHERE }
    }

    fn encode_texts<'py>(
        &self,
        py: Python<'py>,
        texts: Texts,
        add_special_tokens: bool,
        threads: Option<usize>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let tokenizer = Arc::clone(&self.inner);
        let progress = Arc::new(Progress::default());
        let shared = Arc::clone(&progress);
        let ragged = waited(py, threads, &progress, None, move || {
            let count = texts.offsets.len() - 1;
            let parts: Vec<Result<Ragged>> = (0..count.div_ceil(CHUNK))
                .into_par_iter()
                .map(|chunk| {
                    let mut out = Ragged::default();
                    for i in chunk * CHUNK..count.min((chunk + 1) * CHUNK) {
                        shared.check()?;
                        let text = texts.get(i)?;
                        tokenizer.encode_onto(text, add_special_tokens, &mut out.values)?;
                        out.offsets.push(out.values.len() as i64);
                    }
                    Ok(out)
                })
                .collect();
            let mut parts = parts.into_iter();
            let mut out = parts.next().transpose()?.unwrap_or_default();
            for part in parts {
                out.append(&part?);
            }
            Ok(out)
        })?;
        ragged_tuple(py, ragged)
    }
}

/// Texts that one task encodes.
const CHUNK: usize = 64;

/// Texts in one buffer: a copy, because Python may change or free its own while threads still read.
struct Texts {
    bytes: Vec<u8>,
    offsets: Vec<i64>,
}

impl Default for Texts {
    fn default() -> Self {
        Self { bytes: Vec::new(), offsets: vec![0] }
    }
}

impl Texts {
    fn push(&mut self, text: &str) {
        self.bytes.extend_from_slice(text.as_bytes());
        self.offsets.push(self.bytes.len() as i64);
    }

    /// Adds the texts of an Arrow array, whose offsets may begin anywhere in its bytes.
    fn append(&mut self, bytes: &[u8], offsets: &[i64]) -> PyResult<()> {
        let (Some(&first), Some(&last)) = (offsets.first(), offsets.last()) else { return Ok(()) };
        let range = usize::try_from(first).ok().zip(usize::try_from(last).ok());
        let Some(part) = range.and_then(|(first, last)| bytes.get(first..last)) else {
            let message = format!("`texts`: offsets {first}..{last} of {} bytes", bytes.len());
            return Err(PyValueError::new_err(message));
        };
        let base = self.bytes.len() as i64;
        self.bytes.extend_from_slice(part);
        self.offsets.extend(offsets.iter().skip(1).map(|end| base + (end - first)));
        Ok(())
    }

    fn get(&self, i: usize) -> Result<&str> {
        let bad = |message: String| Error::Data {
            place: Place { row: NonZeroU64::new(i as u64 + 1), ..Place::default() },
            reason: Reason::BadUtf8,
            message,
        };
        let place = |i: usize| self.offsets.get(i).and_then(|at| usize::try_from(*at).ok());
        let bytes = place(i).zip(place(i + 1)).and_then(|(from, to)| self.bytes.get(from..to));
        let bytes = bytes.ok_or_else(|| bad("its offsets decrease or lie outside".to_owned()))?;
        std::str::from_utf8(bytes).map_err(|e| bad(format!("expected UTF-8: {e}")))
    }
}

/// Calls Python's renderer: `fallback(source, json, construct)` gives the text, None if transformers is not there, or
/// raises what the template raised. The caller waits without the GIL, so a thread of the pool may take it.
fn elsewhere(fallback: &Py<PyAny>, source: &str) -> Fallback {
    let (fallback, source) = (Python::attach(|py| fallback.clone_ref(py)), source.to_owned());
    Box::new(move |json, construct| {
        Python::attach(|py| {
            let answer = fallback
                .call1(py, (&source, json, construct))
                .and_then(|answer| answer.extract::<Option<String>>(py));
            match answer {
                Ok(Some(text)) => Answer::Text(text),
                Ok(None) => Answer::Missing,
                Err(error) => Answer::Refused(error.value(py).to_string()),
            }
        })
    })
}
