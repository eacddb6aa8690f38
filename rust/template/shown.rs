//! What a render shows of the texts that went into it.

use std::cell::OnceCell;

use super::jinja::to_jinja;
use super::json::in_json;
use super::python::{trim_end, trim_start};
use crate::read::json::Value;

const END_OF_THOUGHT: &str = "</think>";

/// Python's `strip()`.
pub(crate) fn strip(text: &str) -> &str {
    trim_end(trim_start(text))
}

/// A render in which texts are looked for.
pub(crate) struct Shown<'r> {
    render: &'r str,
    /// Its letters and digits in lower case, for templates that change more than white space.
    letters: OnceCell<String>,
}

impl<'r> Shown<'r> {
    pub(crate) fn new(render: &'r str) -> Self {
        Self { render, letters: OnceCell::new() }
    }

    /// Whether the render has `text`: as it is, as JSON escapes it, or by its letters and digits. What a thought is
    /// before, templates drop on purpose.
    pub(crate) fn has(&self, text: &str) -> bool {
        let text = strip(text);
        let said = text.rsplit(END_OF_THOUGHT).next().map_or(text, strip);
        said.is_empty() || self.has_all(text) || self.has_all(said)
    }

    fn has_all(&self, text: &str) -> bool {
        if self.render.contains(text) {
            return true;
        }
        let escaped = [false, true].map(|ascii| in_json(text, ascii));
        if escaped.iter().any(|escaped| escaped != text && self.render.contains(escaped.as_str())) {
            return true;
        }
        let letters = letters(text);
        !letters.is_empty()
            && self.letters.get_or_init(|| self::letters(self.render)).contains(&letters)
    }

    /// Whether the render has this value as Python prints it.
    pub(crate) fn has_python(&self, value: &Value<'_>) -> bool {
        to_jinja(value).is_ok_and(|value| self.render.contains(&value.to_string()))
    }

    /// Whether the render has this text as a string of JSON, quotes and all.
    pub(crate) fn has_json_string(&self, text: &str) -> bool {
        let quoted = [false, true].map(|ascii| format!("\"{}\"", in_json(text, ascii)));
        quoted.iter().any(|quoted| self.render.contains(quoted.as_str()))
    }
}

fn letters(text: &str) -> String {
    text.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}
