//! A row of messages.

use std::borrow::Cow;

use super::bad::{Bad, check_limit, wrong};
use super::json::{Findings, Value, parse};
use super::keys::Keys;
use super::limits::Limits;
use crate::error::Reason;

/// The messages of one row.
#[derive(Debug, Clone)]
pub struct Chat<'a> {
    /// The messages before the completions, `None` for the common leading messages.
    pub prompt: Option<Vec<Value<'a>>>,
    /// The preferred messages.
    pub chosen: Vec<Value<'a>>,
    /// The other messages.
    pub rejected: Vec<Value<'a>>,
    /// Functions that the template may describe.
    pub tools: Option<Value<'a>>,
    /// Further variables of the template.
    pub kwargs: Vec<(Cow<'a, str>, Value<'a>)>,
}

/// Names that the template already has: a row must not override them.
const RESERVED: [&str; 14] = [
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
    pub(super) fn checked(
        mut self,
        findings: &Findings,
        keys: &Keys,
        limits: &Limits,
    ) -> Result<Self, Bad> {
        if let Some(messages) = &self.prompt {
            check_messages(messages, &keys.prompt)?;
        }
        check_messages(&self.chosen, &keys.chosen)?;
        check_messages(&self.rejected, &keys.rejected)?;
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
        for (messages, key) in [
            (self.prompt.as_ref(), &keys.prompt),
            (Some(&self.chosen), &keys.chosen),
            (Some(&self.rejected), &keys.rejected),
        ] {
            let found = messages.map_or(0, Vec::len);
            if found > limits.max_messages {
                let most = limits.max_messages;
                return Err(Bad::new(
                    Reason::Limit,
                    "max_messages",
                    format!("`{key}` has {found} messages, more than {most}"),
                ));
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

/// `tools` is a list of objects, or that list as a JSON string (data sets store it so).
fn check_tools<'a>(tools: Option<Value<'a>>, limits: &Limits) -> Result<Option<Value<'a>>, Bad> {
    let bad = |message: String| Err(Bad::new(Reason::BadMessages, "tools", message));
    let tools = match tools {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Str(text)) => match parse(&text, limits) {
            Ok((value, findings)) => {
                if let Some(key) = findings.duplicate {
                    return bad(format!("expected every key once, found `{key}` twice"));
                }
                check_limit(&findings)?;
                value.into_owned()
            }
            Err(fault) => return bad(format!("expected JSON: {}", fault.message)),
        },
        Some(other) => other,
    };
    match tools {
        Value::Null => Ok(None),
        Value::List(ref items) => match items.iter().find(|item| !matches!(item, Value::Object(_)))
        {
            None => Ok(Some(tools)),
            Some(item) => bad(format!("expected a list of objects, found {} in it", item.kind())),
        },
        other => bad(format!("expected a list of objects, found {}", other.kind())),
    }
}
