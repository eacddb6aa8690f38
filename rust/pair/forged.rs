//! Control tokens that a row would make of its own words: they are text, or the row is refused, wherever the words stand
//! and however the template puts them together.
//!
//! The proof is by counting. A row is rendered once more with marks in all its strings where a control token could be
//! made of them. What has a mark inside is none; so the control tokens of that render are those of the same row with
//! neutral strings. The ids of the row must have the same ones, in the same order.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use super::options::SpecialText;
use super::outcome::Refusal;
use super::render::{Renderer, failed};
use crate::bpe::Found;
use crate::error::{Reason, Result};
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::turns::is_asked;
use crate::tokenize::{Control, Tokenizer};

/// Roles that templates know, which may name a control token; others are words of the row.
const ANSWERING: [&str; 2] = ["assistant", "model"];
/// Keys that templates ask for, and values of the key `type`: they are no words of a row.
const KNOWN: [&str; 28] = [
    "role",
    "content",
    "type",
    "text",
    "name",
    "tool_calls",
    "tool_call_id",
    "id",
    "function",
    "function_call",
    "arguments",
    "parameters",
    "properties",
    "description",
    "required",
    "items",
    "enum",
    "return",
    "reasoning",
    "reasoning_content",
    "thinking",
    "object",
    "array",
    "string",
    "number",
    "integer",
    "boolean",
    "null",
];

/// What a row says.
#[derive(Clone, Copy)]
pub(super) enum Word<'v> {
    Text(&'v str),
    Key(&'v str),
    Number(&'v Value<'v>),
}

impl Word<'_> {
    /// Whether a control token may be made of it.
    pub(super) fn is_suspect(self, control: &Control) -> bool {
        match self {
            Self::Key(key) if KNOWN.contains(&key) => false,
            Self::Text(text) | Self::Key(text) => {
                control.is_telling(text)
                    || control.is_made()
                    || control.is_part(text)
                    || control.has_part(text)
            }
            Self::Number(number) => spelt(number).is_some_and(|text| control.is_part(&text)),
        }
    }
}

/// A number as a template prints it, or nearly so.
fn spelt(number: &Value<'_>) -> Option<String> {
    match number {
        Value::Int(n) => Some(n.to_string()),
        Value::Float(x) => Some(format!("{x:?}")),
        Value::Huge(text) => Some(text.to_string()),
        _ => None,
    }
}

fn is_role(value: &Value<'_>, message: &Value<'_>) -> bool {
    matches!(value, Value::Str(role) if ANSWERING.contains(&role.as_ref())) || is_asked(message)
}

/// Calls `see` with all that a value says.
pub(super) fn words<'v>(value: &'v Value<'_>, see: &mut dyn FnMut(Word<'v>)) {
    match value {
        Value::Str(text) => see(Word::Text(text)),
        Value::List(items) => items.iter().for_each(|item| words(item, see)),
        Value::Object(items) => {
            for (key, item) in items {
                see(Word::Key(key));
                if !is_known(key, item) {
                    words(item, see);
                }
            }
        }
        Value::Int(_) | Value::Float(_) | Value::Huge(_) => see(Word::Number(value)),
        Value::Null | Value::Bool(_) => {}
    }
}

/// Whether a field says the kind of something by a word that templates compare.
fn is_known(key: &str, value: &Value<'_>) -> bool {
    key == "type" && matches!(value, Value::Str(kind) if KNOWN.contains(&kind.as_ref()))
}

/// [`words`] of a message, without a role that templates know.
pub(super) fn words_of<'v>(message: &'v Value<'_>, see: &mut dyn FnMut(Word<'v>)) {
    let Value::Object(items) = message else { return words(message, see) };
    for (key, item) in items {
        see(Word::Key(key));
        let is_role = key == "role" && is_role(item, message);
        if !is_role && !is_known(key, item) {
            words(item, see);
        }
    }
}

/// How the words of a row are changed.
#[derive(Clone, Copy)]
enum Change {
    /// A mark inside each control token that one word spells, so that few templates see it.
    Marked(char),
    /// Marks wherever a control token could be made of a word.
    Broken(char),
}

impl Change {
    fn text(self, text: &str, control: &Control) -> String {
        match self {
            Self::Marked(mark) => control.marked(text, mark),
            Self::Broken(mark) => control.broken(text, mark),
        }
    }

    fn key(self, key: &str, control: &Control) -> String {
        if KNOWN.contains(&key) { key.to_owned() } else { self.text(key, control) }
    }

    fn of(self, value: &Value<'_>, control: &Control) -> Value<'static> {
        match value {
            Value::Str(text) => Value::Str(self.text(text, control).into()),
            Value::List(items) => {
                Value::List(items.iter().map(|item| self.of(item, control)).collect())
            }
            Value::Object(items) => {
                let field = |(key, item): &(Cow<'_, str>, _)| self.field(key, item, false, control);
                Value::Object(items.iter().map(field).collect())
            }
            Value::Int(n)
                if matches!(self, Self::Broken(_)) && Word::Number(value).is_suspect(control) =>
            {
                Value::Int(n.wrapping_add(OTHER))
            }
            Value::Float(x)
                if matches!(self, Self::Broken(_)) && Word::Number(value).is_suspect(control) =>
            {
                Value::Float(x + OTHER as f64)
            }
            other => other.clone().into_owned(),
        }
    }

    fn field<'v>(
        self,
        key: &str,
        item: &Value<'_>,
        is_role: bool,
        control: &Control,
    ) -> (Cow<'v, str>, Value<'v>) {
        let key_of = self.key(key, control);
        let same = is_role || is_known(key, item);
        let item = if same { item.clone().into_owned() } else { self.of(item, control) };
        (key_of.into(), item)
    }

    fn message(self, message: &Value<'_>, control: &Control) -> Value<'static> {
        let Value::Object(items) = message else { return self.of(message, control) };
        let field = |(key, item): &(Cow<'_, str>, Value<'_>)| {
            self.field(key, item, key == "role" && is_role(item, message), control)
        };
        Value::Object(items.iter().map(field).collect())
    }
}

/// What another number is made of one that stands in a control token.
const OTHER: i128 = 79_190_001;

/// A conversation of a row, and its render.
pub(super) struct Conversation<'c> {
    pub(super) renderer: &'c Renderer<'c>,
    /// How many of the renderer's variables are the row's.
    pub(super) of_row: usize,
    pub(super) messages: Vec<&'c Value<'c>>,
    /// The field to blame.
    pub(super) key: &'c str,
    pub(super) text: &'c str,
}

impl Conversation<'_> {
    fn control(&self) -> &Control {
        self.renderer.tokenizer.control()
    }

    /// Its render with changed words, if the template takes them.
    fn changed(&self, change: Change) -> Option<String> {
        let Renderer { template, tokenizer, options, .. } = *self.renderer;
        let control = self.control();
        let messages: Vec<_> =
            self.messages.iter().map(|message| change.message(message, control)).collect();
        let (own, others) = self.renderer.variables.split_at_checked(self.of_row)?;
        let own: Vec<(&str, Value<'_>)> =
            own.iter().map(|(name, value)| (*name, change.of(value, control))).collect();
        let mut variables: Vec<(&str, &Value<'_>)> =
            own.iter().map(|(name, value)| (*name, value)).collect();
        variables.extend(others.iter().copied());
        let renderer = Renderer { template, tokenizer, variables, options };
        renderer.try_render(&messages.iter().collect::<Vec<_>>())
    }

    /// Where the render has the control tokens that may stand, `None` if all that it has may.
    ///
    /// # Errors
    /// A bad row where words make one and cannot be kept as text, or where the options refuse them.
    pub(super) fn kept(&self, rule: SpecialText) -> Result<Option<Vec<Range<usize>>>, Refusal> {
        let (tokenizer, control) = (self.renderer.tokenizer, self.control());
        let lost = || {
            let message = "the template changes contents that spell a control token, so they cannot be kept as text";
            Refusal::from(failed(self.key, message.to_owned()))
        };
        let mark = control.mark(self.text).ok_or_else(|| {
            let message = "expected text in which a control token can be told from others like it, found none that the \
                           tokenizer's normaliser leaves alone";
            Bad::new(Reason::TemplateError, self.key, message)
        })?;
        let neutral = self.changed(Change::Broken(mark));
        let count = |text: &str| match control.spelt(text) {
            Some(ids) => Ok(ids),
            None => tokenizer.encode_plain(text).map(|ids| control.of(&ids)),
        };
        let wanted = neutral.as_deref().map(count).transpose()?;
        if wanted.is_some() && wanted == Some(count(self.text)?) {
            return Ok(None);
        }
        if rule == SpecialText::Error {
            let message =
                "expected plain text, found words of which the chat template makes a control token";
            return Err(Bad::new(Reason::SpecialTokenInText, self.key, message).into());
        }
        let wanted = wanted.ok_or_else(lost)?;
        let marked = std::iter::once_with(|| self.changed(Change::Marked(mark)));
        for render in std::iter::once(neutral).chain(marked).flatten() {
            let Some(marks) = self.places(&render, mark) else { continue };
            let kept = self.unmarked(&marks)?;
            let (ids, _) =
                tokenizer.encode_as_text(self.text, &|found| is_kept(found, 0, &kept, control))?;
            if control.of(&ids) == wanted {
                return Ok(Some(kept));
            }
        }
        Err(lost())
    }

    /// Where a render with marks has them in this one, if it is the same without.
    fn places(&self, render: &str, mark: char) -> Option<Vec<usize>> {
        let mut at = Vec::new();
        let mut bare = String::with_capacity(self.text.len());
        for c in render.chars() {
            if c == mark {
                at.push(bare.len());
            } else {
                bare.push(c);
            }
        }
        (bare == self.text).then_some(at)
    }

    /// The control tokens that have no mark inside.
    fn unmarked(&self, marks: &[usize]) -> Result<Vec<Range<usize>>> {
        let mut kept = all_kept(self.text, self.renderer.tokenizer)?;
        kept.retain(|token| {
            let first = marks.partition_point(|mark| *mark <= token.start);
            marks.get(first).is_none_or(|mark| *mark >= token.end)
        });
        Ok(kept)
    }
}

/// Where a text has control tokens.
///
/// # Errors
/// Only the engine `bpe` says it.
pub(super) fn all_kept(text: &str, tokenizer: &Tokenizer) -> Result<Vec<Range<usize>>> {
    let (control, all) = (tokenizer.control(), RefCell::new(Vec::new()));
    tokenizer.encode_as_text(text, &|found: &Found| {
        if control.has(found.id) {
            all.borrow_mut().push(found.start..found.end);
        }
        true
    })?;
    let mut all = all.into_inner();
    all.sort_by_key(|token| token.start);
    Ok(all)
}

/// Whether an added token that a text spells from the byte `start` of a render on counts as such: control tokens do where
/// they are kept.
pub(super) fn is_kept(
    found: &Found,
    start: usize,
    kept: &[Range<usize>],
    control: &Control,
) -> bool {
    let place = start + found.start..start + found.end;
    !control.has(found.id)
        || kept
            .binary_search_by_key(&place.start, |token| token.start)
            .is_ok_and(|at| kept.get(at) == Some(&place))
}
