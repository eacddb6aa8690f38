//! The environment of `transformers` in minijinja.

use std::fmt::Write as _;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, ErrorKind, Value as Jinja};

use super::clock::strftime_now;
use super::json::{printed, tojson};
use super::python::{indent, method, trim};
use crate::read::json::Value;

pub(super) const NAME: &str = "chat_template";

/// The filter that marks what stands between training tags, and its marks.
const REGION: &str = "generation_region";
pub(super) const MARKS: [char; 2] = ['\u{f8fe}', '\u{f8ff}'];

/// Turns the training tags `{% generation %}` into a block that is always rendered.
pub(super) fn rewrite_generation(source: &str) -> String {
    rewrite_tags(source, ["if true", "endif"])
}

/// Turns them into a block whose text has a mark before and behind it; `None` for a template without them.
pub(super) fn mark_generation(source: &str) -> Option<String> {
    let marked = rewrite_tags(source, [&format!("filter {REGION}"), "endfilter"]);
    (marked != source).then_some(marked)
}

fn rewrite_tags(source: &str, [begin, end_tag]: [&str; 2]) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
        let name = inner.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'));
        match name {
            "generation" => out.push_str(&tag.replacen("generation", begin, 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", end_tag, 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

pub(super) fn syntax() -> SyntaxConfig {
    // Only delimiters can make `build` fail, and those are minijinja's own.
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default()
}

pub(super) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_syntax(syntax());
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_formatter(|out, state, value| match printed(value) {
        Some(text) => out.write_str(&text).map_err(minijinja::Error::from),
        None => minijinja::escape_formatter(out, state, value),
    });
    env.add_filter("string", |value: &Jinja| match printed(value) {
        Some(text) => Jinja::from(text),
        None if value.as_str().is_some() => value.clone(),
        None => Jinja::from(value.to_string()),
    });
    env.set_recursion_limit(100);
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_filter("trim", trim);
    let [open, close] = MARKS;
    env.add_filter(REGION, move |text: String| format!("{open}{text}{close}"));
    env.add_filter("indent", indent);
    env.add_function("raise_exception", |message: String| -> Result<Jinja, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", strftime_now);
    // jinja2: none is not iterable, a string is a sequence, and so is a mapping.
    env.add_test("iterable", |value: &Jinja| match value.kind() {
        ValueKind::None => false,
        ValueKind::String | ValueKind::Undefined => true,
        _ => value.try_iter().is_ok(),
    });
    env.add_test("sequence", |value: &Jinja| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    env
}

/// A template's view of a value.
///
/// # Errors
/// A number that 128 bits do not hold, and a float that is not finite.
pub(super) fn to_jinja(value: &Value<'_>) -> Result<Jinja, String> {
    Ok(match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Int(n) => i64::try_from(*n).map_or_else(|_| Jinja::from(*n), Jinja::from),
        Value::Float(x) if x.is_finite() => Jinja::from(*x),
        Value::Float(_) => return Err("a number is not finite".to_owned()),
        Value::Huge(_) => return Err("a number needs more than 128 bits".to_owned()),
        Value::Str(s) => Jinja::from(s.as_ref()),
        Value::List(items) => items.iter().map(to_jinja).collect::<Result<Vec<_>, _>>()?.into(),
        Value::Object(items) => {
            let pairs: Result<Vec<(&str, Jinja)>, String> =
                items.iter().map(|(k, v)| Ok((k.as_ref(), to_jinja(v)?))).collect();
            Jinja::from_pairs(pairs?)
        }
    })
}

pub(super) fn one_line(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        let _ = write!(text, ": {inner}");
        source = inner.source();
    }
    let text: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.replace(&format!(" (in {NAME}:"), " (line ")
}

/// Whether jinja2 could do what made minijinja fail. Methods that only fill up to a width are left out: no template
/// needs them, and there they have no bound.
pub(super) fn is_lacking(error: &minijinja::Error) -> bool {
    use minijinja::ErrorKind as Kind;
    let detail = error.detail().unwrap_or_default();
    match error.kind() {
        Kind::UnknownMethod => !["center", "ljust", "rjust", "zfill", "expandtabs", "encode", "__"]
            .iter()
            .any(|name| detail.contains(name)),
        Kind::UnknownFilter | Kind::UnknownTest | Kind::UnknownFunction => true,
        Kind::InvalidOperation => {
            (detail.starts_with("tried to use % operator on unsupported types string"))
                || detail.starts_with("cannot perform a containment check")
        }
        _ => false,
    }
}
