//! A JSON value, or a Python value that looks like one.

use std::borrow::Cow;

/// A JSON value, or a Python value that looks like one.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i128),
    /// Any other number; `1e400` is infinite.
    Float(f64),
    /// A whole number that 128 bits do not hold, as it was spelt.
    Huge(Cow<'a, str>),
    /// A string.
    Str(Cow<'a, str>),
    /// An array.
    List(Vec<Value<'a>>),
    /// An object, in the order of the text.
    Object(Vec<(Cow<'a, str>, Value<'a>)>),
}

impl Value<'_> {
    /// The kind in words, for "expected ..., found ...".
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Int(_) | Self::Float(_) | Self::Huge(_) => "a number",
            Self::Str(_) => "a string",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    /// Bytes of all strings inside, without keys.
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Str(text) => text.len(),
            Self::List(items) => items.iter().map(Self::text_bytes).sum(),
            Self::Object(items) => items.iter().map(|(_, value)| value.text_bytes()).sum(),
            _ => 0,
        }
    }

    /// The same value, borrowing nothing.
    pub fn into_owned<'b>(self) -> Value<'b> {
        let text = |s: Cow<'_, str>| Cow::Owned(s.into_owned());
        match self {
            Self::Null => Value::Null,
            Self::Bool(b) => Value::Bool(b),
            Self::Int(n) => Value::Int(n),
            Self::Float(n) => Value::Float(n),
            Self::Huge(s) => Value::Huge(text(s)),
            Self::Str(s) => Value::Str(text(s)),
            Self::List(items) => Value::List(items.into_iter().map(Value::into_owned).collect()),
            Self::Object(items) => {
                Value::Object(items.into_iter().map(|(k, v)| (text(k), v.into_owned())).collect())
            }
        }
    }

    /// A message of one role and one text.
    pub fn turn<'a>(role: &'a str, text: Cow<'a, str>) -> Value<'a> {
        let role = Value::Str(role.into());
        Value::Object(vec![("role".into(), role), ("content".into(), Value::Str(text))])
    }

    /// A part of a content that is text.
    pub fn part(text: Cow<'_, str>) -> Value<'_> {
        let kind = Value::Str("text".into());
        Value::Object(vec![("type".into(), kind), ("text".into(), Value::Str(text))])
    }

    /// The role of a message, if that is a string.
    pub fn role(&self) -> Option<&str> {
        match self.get("role") {
            Some(Value::Str(role)) => Some(role),
            _ => None,
        }
    }

    /// Takes away the keys that hold null, at any depth.
    pub fn strip_nulls(&mut self) {
        match self {
            Self::List(items) => items.iter_mut().for_each(Self::strip_nulls),
            Self::Object(items) => {
                items.retain(|(_, value)| *value != Self::Null);
                for (_, value) in items {
                    value.strip_nulls();
                }
            }
            _ => {}
        }
    }

    /// Whether both say the same: whatever the order of keys, null or no key, 1 or 1.0.
    pub fn same(&self, other: &Value<'_>) -> bool {
        match (self, other) {
            (Self::Object(mine), Value::Object(theirs)) => {
                let in_other = |(key, value): &(Cow<'_, str>, Self)| match other.get(key) {
                    Some(found) => value.same(found),
                    None => *value == Self::Null,
                };
                let in_mine = |(key, value): &(Cow<'_, str>, Value<'_>)| {
                    *value == Value::Null || self.get(key).is_some()
                };
                mine.iter().all(in_other) && theirs.iter().all(in_mine)
            }
            (Self::List(mine), Value::List(theirs)) => {
                mine.len() == theirs.len() && mine.iter().zip(theirs).all(|(a, b)| a.same(b))
            }
            (Self::Int(whole), Value::Float(number)) | (Self::Float(number), Value::Int(whole)) => {
                (*whole as f64).total_cmp(number).is_eq()
            }
            _ => self == other,
        }
    }

    /// The value of `key`, if this is an object that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Object(items) => items.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }
}
