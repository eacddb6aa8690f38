//! The only place that knows Python: converts, releases the GIL for the whole call, maps the error, hands back arrays.

mod arrays;
mod column;
mod data;
mod file;
mod fork;
mod keys;
mod layout;
mod logps;
mod loss;
mod options;
mod tokenizer;
mod value;
mod wait;

use numpy::PyArrayMethods;
use pyo3::prelude::*;

use crate::error::{Error, Reason};

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        Python::attach(|py| to_python(py, error).unwrap_or_else(|e| e))
    }
}

fn to_python(py: Python<'_>, error: Error) -> PyResult<PyErr> {
    use pyo3::exceptions as builtin;
    let text = error.to_string();
    let ours = |name: &str, args: Bound<'_, pyo3::types::PyTuple>| -> PyResult<PyErr> {
        let class = py.import("dpo_ext.errors")?.getattr(name)?;
        Ok(PyErr::from_value(class.call1(args)?))
    };
    let one = |name: &str, text: String| ours(name, pyo3::types::PyTuple::new(py, [text])?);
    Ok(match error {
        Error::Data { place, reason, .. } => ours(
            "DataError",
            (text, &place.path, place.line_or_row(), place.byte, &place.field, reason.name())
                .into_pyobject(py)?,
        )?,
        Error::Limit { place, .. } => ours(
            "LimitExceeded",
            (
                text,
                &place.path,
                place.line_or_row(),
                place.byte,
                &place.field,
                Reason::Limit.name(),
            )
                .into_pyobject(py)?,
        )?,
        Error::Io { path, source } => match source.raw_os_error() {
            // OSError(errno, strerror, filename) picks the subclass by itself.
            Some(code) => {
                let strerror = py.import("os")?.call_method1("strerror", (code,))?.unbind();
                builtin::PyOSError::new_err((code, strerror, path))
            }
            None => builtin::PyOSError::new_err(text),
        },
        Error::Tokenizer(_) => one("TokenizerError", text)?,
        Error::Tensor(_) => one("TensorError", text)?,
        Error::Value(_) => builtin::PyValueError::new_err(text),
        Error::Interrupted => builtin::PyKeyboardInterrupt::new_err(()),
        Error::Internal(_) => one("DpoExtError", text)?,
    })
}

/// Finds the functions of `numpy` while the module is loaded: where a signal comes in the middle of that, the `numpy` crate
/// panics.
fn lend_arrays(py: Python<'_>) -> PyResult<()> {
    let found = crate::pool::caught(|| {
        let array = numpy::PyArray1::<i32>::zeros(py, 0, false);
        drop(array.try_readonly());
        Ok(())
    });
    if found.is_err() {
        py.check_signals()?;
    }
    Ok(found?)
}

#[pymodule]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    lend_arrays(m.py())?;
    fork::register(m)?;
    tokenizer::register(m)?;
    data::register(m)?;
    file::register(m)?;
    layout::register(m)?;
    keys::register(m)?;
    loss::register(m)?;
    logps::register(m)?;
    Ok(())
}
