//! Python values as JSON would hold them.

use std::num::NonZeroU64;

use pyo3::exceptions::PyException;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyMapping, PyString, PyTuple};

use crate::encode::Fields;
use crate::error::{Place, Reason, Result};
use crate::pair::Options;
use crate::read::bad::Bad;
use crate::read::json::{Findings, MOST_UNREAD, Value};
use crate::read::keys::{FIELDS, MEDIA, TRLS};
use crate::read::limits::Limits;

pub(super) fn kind_of(value: &Bound<'_, PyAny>) -> String {
    value.get_type().name().map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}

/// Why a value cannot be used.
pub(super) enum Unusable {
    /// It is none that JSON would hold.
    Bad(Bad),
    /// What is no error of the value was raised meanwhile, such as `KeyboardInterrupt`.
    Raised(PyErr),
}

impl From<Bad> for Unusable {
    fn from(bad: Bad) -> Self {
        Self::Bad(bad)
    }
}

impl Unusable {
    fn of(py: Python<'_>, error: PyErr) -> Self {
        if !error.is_instance_of::<PyException>(py) {
            return Self::Raised(error);
        }
        Self::Bad(Bad::new(Reason::WrongType, "", format!("expected a plain value: {error}")))
    }
}

/// The named values of one row.
pub(super) fn fields(row: &Bound<'_, PyAny>, options: &Options) -> PyResult<Fields> {
    let Ok(row) = row.cast::<PyMapping>() else {
        let message = format!("expected a dict, found {}", kind_of(row));
        return Ok(Err(Bad::new(Reason::NotAnObject, "", message)));
    };
    let mut out = Vec::new();
    let mut findings = Findings::default();
    for (slot, name) in options.keys.names().into_iter().enumerate() {
        let value = match row.cast::<PyDict>() {
            Ok(dict) => dict.get_item(name)?,
            Err(_) => row.contains(name)?.then(|| row.get_item(name)).transpose()?,
        };
        if slot < FIELDS && MEDIA.contains(&name) {
            // That something is there is enough.
            let holds = |value: &Bound<'_, PyAny>| match value.cast::<PyList>() {
                Ok(items) => items.iter().any(|item| !item.is_none()),
                Err(_) => !value.is_none() && !matches!(value.len(), Ok(0)),
            };
            out.push(value.map(|value| Value::Bool(holds(&value))));
            continue;
        }
        match value.map(|value| to_value(&value, &options.limits, 1, &mut findings)).transpose() {
            Ok(value) => out.push(value),
            Err(Unusable::Raised(error)) => return Err(error),
            Err(Unusable::Bad(mut bad)) => {
                bad.field.get_or_insert_with(|| name.to_owned());
                return Ok(Err(bad));
            }
        }
    }
    if let Ok(dict) = row.cast::<PyDict>() {
        let names = options.keys.names();
        let trls = names.get(..TRLS).unwrap_or_default();
        for (key, value) in dict {
            if let (Ok(key), true) = (key.extract::<&str>(), value.is_instance_of::<PyString>()) {
                if !trls.contains(&key) {
                    findings.others.push(key.to_owned());
                }
                let says = value.len().is_ok_and(|len| len > 0);
                if says && !names.contains(&key) && findings.unread.len() < MOST_UNREAD {
                    findings.unread.push(key.to_owned());
                }
            }
        }
    }
    Ok(Ok((out, findings)))
}

/// A string without lone surrogates.
pub(super) fn borrowed<'a>(text: &'a Bound<'_, PyString>) -> Result<&'a str, Bad> {
    text.to_str()
        .map_err(|_| Bad::new(Reason::BadJson, "", "expected Unicode text, found a lone surrogate"))
}

pub(super) fn as_data_error(bad: Bad, line: Option<u64>) -> PyErr {
    let place =
        Place { row: line.and_then(NonZeroU64::new), field: bad.field.clone(), ..Place::default() };
    bad.at(place).into()
}

/// A Python value as JSON would hold it.
pub(super) fn to_value(
    value: &Bound<'_, PyAny>,
    limits: &Limits,
    depth: usize,
    findings: &mut Findings,
) -> Result<Value<'static>, Unusable> {
    let failed = |error: PyErr| Unusable::of(value.py(), error);
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
                return Err(Bad::new(Reason::WrongType, "", message).into());
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
        Reason::WrongType,
        "",
        format!("expected text, a list, a dict or a number, found {}", kind_of(value)),
    )
    .into())
}
