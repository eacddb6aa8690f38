//! Options as Python passes them: its frozen dataclasses, read by attribute.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::encode::OnBad;
use crate::pair::{Boundary, Options, SpecialText, Truncation};
use crate::read::keys::Keys;
use crate::read::limits::Limits;
use crate::template::Now;

/// What `Settings` of Python says.
pub(super) struct Settings {
    pub(super) options: Options,
    pub(super) on_bad: OnBad,
    pub(super) threads: Option<usize>,
}

impl Settings {
    pub(super) fn of(settings: &Bound<'_, PyAny>) -> PyResult<Self> {
        let get = |name: &str| settings.getattr(name);
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
            extra: get("columns")?.extract()?,
        };
        let options = Options {
            max_length: get("max_length")?.extract()?,
            truncation,
            boundary,
            special_text,
            keys,
            limits: limits(&get("limits")?)?,
            now: now(get("now")?.extract()?),
        };
        Ok(Self { options, on_bad, threads: get("threads")?.extract()? })
    }
}

pub(super) fn limits(limits: &Bound<'_, PyAny>) -> PyResult<Limits> {
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

/// (year, month, day, hour, minute, second, weekday, day of the year)
pub(super) type NowTuple = (i32, i32, i32, i32, i32, i32, usize, i32);

pub(super) fn now((year, month, day, hour, minute, second, weekday, yearday): NowTuple) -> Now {
    Now { time: [year, month, day, hour, minute, second], weekday, yearday }
}
