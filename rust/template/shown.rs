//! What a render shows of the texts that went into it.

use std::cell::OnceCell;

use memchr::memmem;

use super::jinja::to_jinja;
use super::json::{in_json, printed};
use super::python::{trim_end, trim_start};
use crate::read::json::Value;

/// So many bytes are looked for first, and so often.
const BEGIN: usize = 24;
const TRIES: usize = 16;
/// So many bytes are looked at before anything is made ready.
const NEAR: usize = 64;

/// Python's `strip()`.
pub(crate) fn strip(text: &str) -> &str {
    trim_end(trim_start(text))
}

/// Places of texts in a render, none of which overlap: texts with a place each are all there, however alike they are.
pub(crate) struct Places<'r> {
    render: &'r [u8],
    begin: usize,
    taken: Vec<[usize; 2]>,
    next: usize,
}

impl<'r> Places<'r> {
    /// Places from the byte `begin` on.
    pub(crate) fn new(render: &'r str, begin: usize) -> Self {
        Self { render: render.as_bytes(), begin, taken: Vec::with_capacity(16), next: begin }
    }

    /// Whether a place was found for one more text: behind the last one, or anywhere.
    pub(crate) fn take(&mut self, text: &str) -> bool {
        let text = strip(text).as_bytes();
        if text.is_empty() {
            return true;
        }
        let in_order = self.free(text, self.next);
        let Some(start) = in_order.or_else(|| self.free(text, self.begin)) else { return false };
        let end = start + text.len();
        self.taken.push([start, end]);
        if in_order.is_some() {
            self.next = end;
        }
        true
    }

    /// The first place from `from` on that no other text has.
    fn free(&self, text: &[u8], mut from: usize) -> Option<usize> {
        loop {
            let start = from + find(self.render.get(from..)?, text)?;
            let end = start + text.len();
            match self.taken.iter().find(|taken| taken[0] < end && start < taken[1]) {
                None => return Some(start),
                Some(taken) => from = taken[1],
            }
        }
    }
}

/// The first place of a text. To get ready for a long one costs more than to find its beginning, and most texts begin
/// just behind the name of a role.
fn find(render: &[u8], text: &[u8]) -> Option<usize> {
    let near = render.get(..NEAR).unwrap_or(render);
    let mut starts = memchr::memchr_iter(*text.first()?, near).take(TRIES);
    let is_here = |start: &usize| render.get(*start..).is_some_and(|rest| rest.starts_with(text));
    if let Some(start) = starts.find(is_here) {
        return Some(start);
    }
    let Some(begin) = text.get(..BEGIN).filter(|_| text.len() > BEGIN) else {
        return memmem::find(render, text);
    };
    let finder = memmem::Finder::new(begin);
    let mut from = 0;
    for _ in 0..TRIES {
        let start = from + finder.find(render.get(from..)?)?;
        if render.get(start..).is_some_and(|rest| rest.starts_with(text)) {
            return Some(start);
        }
        from = start + 1;
    }
    memmem::find(render.get(from..)?, text).map(|start| from + start)
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

    /// Whether the render has `text`: as it is, as JSON escapes it, or by its letters and digits.
    pub(crate) fn has(&self, text: &str) -> bool {
        let text = strip(text);
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

    /// Whether the render has this list or object as Python prints it, or an object in it.
    pub(crate) fn has_python(&self, value: &Value<'_>) -> bool {
        let is_there = |value: &Value<'_>| {
            to_jinja(value).is_ok_and(|value| {
                let text = printed(&value).unwrap_or_else(|| value.to_string());
                self.render.contains(&text)
            })
        };
        match value {
            Value::Object(items) => !items.is_empty() && is_there(value),
            Value::List(items) => {
                !items.is_empty()
                    && (is_there(value) || items.iter().any(|item| self.has_python(item)))
            }
            _ => false,
        }
    }

    /// Whether the render has this number or truth value, in Python's letters or JSON's.
    pub(crate) fn has_scalar(&self, value: &Value<'_>) -> bool {
        to_jinja(value).is_ok_and(|value| self.has(&value.to_string()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_found_where_they_begin_alike() {
        let near: Vec<String> = (0..40).map(|i| format!("{}{i};", "a".repeat(30))).collect();
        let near = near.concat();
        for text in
            ["a".repeat(30) + "39", "a".repeat(30) + "7", "a".repeat(29) + "3;", "b".repeat(30)]
        {
            let want = near.find(&text);
            assert_eq!(find(near.as_bytes(), text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn texts_nearby_are_found_first() {
        let render = "user: no, no, no and then yes";
        for text in ["no", "no and", "yes", "s", "n", "x"] {
            assert_eq!(find(render.as_bytes(), text.as_bytes()), render.find(text), "{text}");
        }
        let far = "a".repeat(30) + "ab" + &"a".repeat(90);
        assert_eq!(find(far.as_bytes(), b"ab"), far.find("ab"));
    }

    #[test]
    fn texts_have_places_of_their_own() {
        let mut places = Places::new("user: yes it is; assistant: yes it is; tool: late", 0);
        assert!(
            ["late", " yes it is ", "yes it is", "", "user"].map(|text| places.take(text))
                == [true; 5]
        );
        assert!(!places.take("yes it is"));
        assert!(!places.take("is; assistant"));
        let mut places = Places::new("user: yes it is; assistant: no", 16);
        assert_eq!(["no", "yes it is"].map(|text| places.take(text)), [true, false]);
    }
}
