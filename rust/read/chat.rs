//! A row of messages.

use std::borrow::Cow;

use super::bad::{Bad, check_limit, wrong};
use super::json::{Findings, Value, parse};
use super::keys::Keys;
use super::limits::Limits;
use super::said::Turns;
use crate::error::Reason;

/// The messages of one row, and what its template sees beside them.
#[derive(Debug, Clone)]
pub struct Chat<'a> {
    /// The messages.
    pub turns: Turns<'a>,
    /// Functions that the template may describe.
    pub tools: Option<Value<'a>>,
    /// Further variables of the template.
    pub kwargs: Vec<(Cow<'a, str>, Value<'a>)>,
}

/// Roles whose contents are what a tool gave.
const ANSWERS_OF_TOOLS: [&str; 5] = ["tool", "function", "ipython", "observation", "tool_response"];

/// Names that the template already has: a row must not override them.
pub const RESERVED: [&str; 14] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "raise_exception",
    "strftime_now",
    "chat_template",
];

impl<'a> Chat<'a> {
    /// The variables that a row brings for its template.
    pub(super) fn kwargs(value: Option<Value<'a>>) -> Result<Vec<(Cow<'a, str>, Value<'a>)>, Bad> {
        match value {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Object(items)) => Ok(items),
            Some(other) => Err(wrong("chat_template_kwargs", "an object", &other)),
        }
    }

    /// The same messages, if nothing is wrong with them.
    ///
    /// The prompt may be empty where the layout `allows` that.
    pub(super) fn checked(
        mut self,
        findings: &Findings,
        keys: &Keys,
        limits: &Limits,
        allows: bool,
    ) -> Result<Self, Bad> {
        let Turns { prompt, chosen, rejected, fields, .. } = &self.turns;
        let names = fields.map(|field| keys.name(field));
        let parts = [prompt.as_deref(), Some(chosen.as_slice()), Some(rejected.as_slice())];
        for (i, (messages, key)) in parts.into_iter().zip(names).enumerate() {
            // A prompt may be empty where its layout says that there is none.
            if let Some(messages) = messages.filter(|found| i > 0 || !found.is_empty() || !allows) {
                check_messages(messages, key)?;
            }
        }
        self.tools = check_tools(self.tools, limits)?;
        if let Some((name, _)) =
            self.kwargs.iter().find(|(name, _)| RESERVED.contains(&name.as_ref()))
        {
            let message = format!(
                "`{name}` belongs to the template's own variables and cannot be overridden by a row"
            );
            return Err(Bad::new(Reason::BadMessages, "chat_template_kwargs", message));
        }
        check_limit(findings)?;
        let Turns { prompt, chosen, rejected, fields, .. } = &self.turns;
        let names = fields.map(|field| keys.name(field));
        let counts = [prompt.as_ref().map_or(0, Vec::len), chosen.len(), rejected.len()];
        for (found, key) in counts.into_iter().zip(names) {
            if found > limits.max_messages {
                let most = limits.max_messages;
                let message = format!("`{key}` has {found} messages, more than {most}");
                return Err(Bad::new(Reason::Limit, "max_messages", message));
            }
        }
        Ok(self)
    }
}

fn check_messages(messages: &[Value<'_>], key: &str) -> Result<(), Bad> {
    let bad = |message: String| Err(Bad::new(Reason::BadMessages, key, message));
    if messages.is_empty() {
        return bad("expected at least one message, found an empty list".to_owned());
    }
    for (i, message) in messages.iter().enumerate() {
        let i = i + 1;
        if !matches!(message, Value::Object(_)) {
            return bad(format!(
                "message {i}: expected an object with `role` and `content`, found {}",
                message.kind()
            ));
        }
        match message.get("role") {
            Some(Value::Str(_)) => {}
            None => return bad(format!("message {i}: expected a `role`, found none")),
            Some(other) => {
                return bad(format!(
                    "message {i}: expected a string as `role`, found {}",
                    other.kind()
                ));
            }
        }
        let has_calls =
            matches!(message.get("tool_calls"), Some(Value::List(calls)) if !calls.is_empty());
        match message.get("content") {
            Some(Value::Str(_)) => {}
            Some(Value::List(parts))
                if parts.iter().all(|p| matches!(p, Value::Object(_) | Value::Str(_))) => {}
            // What a tool answers may be any value, which templates print or branch on.
            Some(Value::Object(_) | Value::Int(_) | Value::Float(_) | Value::Bool(_))
                if message.role().is_some_and(|role| ANSWERS_OF_TOOLS.contains(&role)) => {}
            Some(Value::Null) | None if has_calls => {}
            None => return bad(format!("message {i}: expected `content`, found none")),
            Some(other) => {
                return bad(format!(
                    "message {i}: expected text or a list of parts as `content`, found {}",
                    other.kind()
                ));
            }
        }
    }
    Ok(())
}

/// `tools` is a list of objects, or that list, or each of them, as a JSON string (data sets store it so).
fn check_tools<'a>(tools: Option<Value<'a>>, limits: &Limits) -> Result<Option<Value<'a>>, Bad> {
    let bad = |message: String| Err(Bad::new(Reason::BadMessages, "tools", message));
    let tools = match tools {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Str(text)) => json_text(&text, limits)?,
        Some(other) => other,
    };
    let items = match tools {
        Value::Null => return Ok(None),
        Value::List(items) => items,
        other => return bad(format!("expected a list of objects, found {}", other.kind())),
    };
    let mut out = Vec::with_capacity(items.len());
    for item in items {
        let item = match item {
            Value::Str(text) => json_text(&text, limits)?,
            other => other,
        };
        if !matches!(item, Value::Object(_)) {
            return bad(format!("expected a list of objects, found {} in it", item.kind()));
        }
        out.push(item);
    }
    Ok(Some(Value::List(out)))
}

/// The value of JSON in a string.
fn json_text(text: &str, limits: &Limits) -> Result<Value<'static>, Bad> {
    let bad = |message: String| Bad::new(Reason::BadMessages, "tools", message);
    let (value, findings) =
        parse(text, limits).map_err(|fault| bad(format!("expected JSON: {}", fault.message)))?;
    if let Some(key) = findings.duplicate {
        return Err(bad(format!("expected every key once, found `{key}` twice")));
    }
    check_limit(&findings)?;
    Ok(value.into_owned())
}
