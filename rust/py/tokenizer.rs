//! `Tokenizer`.

// PyO3 extracts arguments as owned values.
#![allow(clippy::needless_pass_by_value, clippy::too_many_arguments)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyTuple};

use super::data::waited;
use super::detached;
use super::layout::{Ids, ragged_tuple};
use super::value::{as_data_error, borrowed, kind_of, to_value};
use crate::encode::{Progress, Ragged};
use crate::error::{Error, Place, Result};
use crate::read::json::{Findings, Value};
use crate::read::limits::Limits;
use crate::read::row::Bad;
use crate::template::{Answer, Conversation, Fallback, Now, RenderError};
use crate::tokenize::{Added, Source, Tokenizer};

pub(super) fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyTokenizer>()
}

#[pyclass(frozen, name = "Tokenizer", module = "dpo_ext._core")]
pub(super) struct PyTokenizer {
    pub(super) inner: Arc<Tokenizer>,
}

/// (content, lstrip, rstrip, single word, normalized, special)
type AddedTuple = (String, bool, bool, bool, bool, bool);
/// (year, month, day, hour, minute, second, weekday, day of the year)
pub(super) type NowTuple = (i32, i32, i32, i32, i32, i32, usize, i32);

pub(super) fn now((year, month, day, hour, minute, second, weekday, yearday): NowTuple) -> Now {
    Now { time: [year, month, day, hour, minute, second], weekday, yearday }
}

#[pymethods]
impl PyTokenizer {
    #[new]
    fn new(
        py: Python<'_>,
        json: &[u8],
        named: Vec<(String, String)>,
        added: Vec<AddedTuple>,
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
        let json = std::str::from_utf8(json)
            .map_err(|e| Error::Tokenizer(format!("tokenizer.json: expected UTF-8: {e}")))?
            .to_owned();
        let ids = [ids.0, ids.1, ids.2];
        let source = Source { json, named, added, ids, template, tool_template };
        let inner = detached(py, || Tokenizer::new(source))?;
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
        let mut context: Vec<(String, Value<'_>)> = Vec::new();
        for (name, value) in variables {
            let name: String = name.extract()?;
            context.push((name.clone(), convert(&value, &name)?));
        }
        let tokenizer = Arc::clone(&self.inner);
        detached(py, move || {
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
