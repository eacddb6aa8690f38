//! Options as Python passes them: its frozen dataclasses, read by attribute.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::value::{Unusable, to_value};
use crate::encode::OnBad;
use crate::pair::{
    Boundary, EmptyThink, Images, Options, SpecialText, TrainOn, Truncation, Useless,
};
use crate::read::json::{Findings, Value};
use crate::read::keys::Keys;
use crate::read::layouts::Layout;
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
        let images = match word("images")?.as_str() {
            "error" => Images::Error,
            "ignore" => Images::Ignore,
            other => return Err(unknown("images", other)),
        };
        let useless = match word("on_useless")?.as_str() {
            "drop" => Useless::Drop,
            "keep" => Useless::Keep,
            other => return Err(unknown("on_useless", other)),
        };
        let train_on = match word("train_on")?.as_str() {
            "completion" => TrainOn::Completion,
            "last" => TrainOn::Last,
            "assistant" => TrainOn::Assistant,
            other => return Err(unknown("train_on", other)),
        };
        let empty_think = match word("empty_think")?.as_str() {
            "completion" => EmptyThink::Completion,
            "prompt" => EmptyThink::Prompt,
            other => return Err(unknown("empty_think", other)),
        };
        let layout = match get("layout_of_rows")?.extract::<Option<String>>()? {
            None => None,
            Some(name) => Some(Layout::of(&name).ok_or_else(|| unknown("layout_of_rows", &name))?),
        };
        let limits = limits(&get("limits")?)?;
        let kwargs = kwargs(&get("chat_template_kwargs")?, &limits)?;
        let keys = Keys {
            ignored: get("ignore_columns")?.extract()?,
            prompt: key("prompt_key", "prompt")?,
            prompt_required: !get("prompt_key")?.is_none(),
            chosen: key("chosen_key", "chosen")?,
            rejected: key("rejected_key", "rejected")?,
            label: get("label_key")?.extract()?,
            extra: get("columns")?.extract()?,
        };
        let options = Options {
            max_length: get("max_length")?.extract()?,
            truncation,
            boundary,
            special_text,
            images,
            useless,
            train_on,
            empty_think,
            kwargs,
            layout,
            keep_nulls: get("keep_nulls")?.extract()?,
            keys,
            limits,
            now: now(get("now")?.extract()?),
        };
        Ok(Self { options, on_bad, threads: get("threads")?.extract()? })
    }
}

/// The variables of a template for all rows.
fn kwargs(given: &Bound<'_, PyAny>, limits: &Limits) -> PyResult<Vec<(String, Value<'static>)>> {
    let mut findings = Findings::default();
    let wrong = |message: &str| PyValueError::new_err(format!("`chat_template_kwargs`: {message}"));
    let value = to_value(given, limits, 1, &mut findings).map_err(|why| match why {
        Unusable::Raised(error) => error,
        Unusable::Bad(bad) => wrong(&bad.message),
    })?;
    if let Some((_, message)) = findings.limit {
        return Err(wrong(&message));
    }
    let Value::Object(items) = value else { return Err(wrong("expected a dict")) };
    Ok(items.into_iter().map(|(name, value)| (name.into_owned(), value)).collect())
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
