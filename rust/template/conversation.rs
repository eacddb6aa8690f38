//! What is rendered, and what comes of it.

use std::borrow::Cow;

use super::clock::NOW;
use super::jinja::{one_line, to_jinja};
use super::json;
use crate::read::json::Value;

/// Local time, taken once for a whole data set so that every row sees the same date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Year, month 1..=12, day, hour, minute, second.
    pub time: [i32; 6],
    /// 0 is Monday.
    pub weekday: usize,
    /// 1..=366.
    pub yearday: i32,
}

/// A conversation and what a template sees beside it.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    /// Objects with a role.
    pub messages: &'a [&'a Value<'a>],
    /// `bos_token` and its like.
    pub named: &'a [(String, String)],
    /// `tools`, `documents` and the caller's own; they win over `named`.
    pub variables: &'a [(&'a str, &'a Value<'a>)],
    /// Whether to begin an answer.
    pub generation: bool,
    /// The time that the template sees.
    pub now: Now,
    /// Bounds the output, in bytes.
    pub cap: usize,
}

/// A render.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Whether it was rendered elsewhere.
    pub fallback: bool,
    /// It was joined from all contents, so that none is missing.
    pub complete: bool,
}

/// Why a conversation was not rendered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RenderError {
    /// The template refused it or ran out of fuel.
    Template(String),
    /// The output would pass the cap.
    TooLong,
    /// The template needs what minijinja lacks, and there is no other renderer, or it cannot do it either.
    Lacks(String),
    /// This variable has a value that no template can be given.
    Value(String, String),
}

impl Conversation<'_> {
    /// All variables as one JSON object, for a renderer elsewhere.
    pub(super) fn to_json(self) -> Result<String, RenderError> {
        let mut all: Vec<(&str, Value<'_>)> = self
            .named
            .iter()
            .map(|(name, text)| (name.as_str(), Value::Str(text.as_str().into())))
            .collect();
        for (name, value) in self.variables {
            all.retain(|(known, _)| known != name);
            all.push((name, Value::clone(value)));
        }
        let messages = self.messages.iter().map(|message| as_seen(message).into_owned()).collect();
        all.push(("messages", Value::List(messages)));
        all.push(("add_generation_prompt", Value::Bool(self.generation)));
        let time = self.now.time.iter().map(|part| Value::Int((*part).into())).collect();
        all.push((NOW, Value::List(time)));
        let all = all.into_iter().map(|(name, value)| (name.into(), value)).collect();
        let value = to_jinja(&Value::Object(all))
            .map_err(|e| RenderError::Value("messages".to_owned(), e))?;
        json::dumps(&value).map_err(|e| RenderError::Template(one_line(&e)))
    }
}

const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message as `transformers` shows it to a template: without keys that hold nothing, and with the usual names for its
/// reasoning filled in.
pub(super) fn as_seen<'v>(message: &'v Value<'v>) -> Cow<'v, Value<'v>> {
    let Value::Object(items) = message else { return Cow::Borrowed(message) };
    let reasoning =
        REASONING.iter().find_map(|name| message.get(name).filter(|v| **v != Value::Null)).cloned();
    if reasoning.is_none() && items.iter().all(|(_, value)| *value != Value::Null) {
        return Cow::Borrowed(message);
    }
    let mut all: Vec<_> =
        items.iter().filter(|(_, value)| *value != Value::Null).cloned().collect();
    if let Some(reasoning) = reasoning {
        if !all.iter().any(|(k, _)| k == "thinking") {
            all.insert(0, ("thinking".into(), reasoning.clone()));
        }
        match all.iter_mut().find(|(k, _)| k == "reasoning_content") {
            Some((_, value)) => *value = reasoning,
            None => all.push(("reasoning_content".into(), reasoning)),
        }
    }
    Cow::Owned(Value::Object(all))
}
