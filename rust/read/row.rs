//! From named values to one row: which format it has, and what is wrong with it.

use std::borrow::Cow;

use super::cell::{Cell, cell};
use super::json::{Fields, Findings, Value, parse};
use super::limits::Limits;

/// The names under which a row's fields are found.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Name of the prompt's field.
    pub prompt: String,
    /// The caller named the prompt, so a row without it is bad; otherwise such a row has an implicit prompt.
    pub prompt_required: bool,
    /// Name of the preferred side.
    pub chosen: String,
    /// Name of the other side.
    pub rejected: String,
    /// Further columns to carry.
    pub extra: Vec<String>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            prompt: "prompt".to_owned(),
            prompt_required: false,
            chosen: "chosen".to_owned(),
            rejected: "rejected".to_owned(),
            extra: Vec::new(),
        }
    }
}

/// Fields of a row before the extra ones.
const FIELDS: usize = 10;

impl Keys {
    /// The field names in the order of [`Row::from_fields`].
    pub fn names(&self) -> Vec<&str> {
        let fields: [&str; FIELDS] = [
            &self.prompt,
            &self.chosen,
            &self.rejected,
            "tools",
            "chat_template_kwargs",
            "prompt_ids",
            "chosen_ids",
            "rejected_ids",
            "ref_chosen_logps",
            "ref_rejected_logps",
        ];
        fields.into_iter().chain(self.extra.iter().map(String::as_str)).collect()
    }
}

/// Why one row is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bad {
    /// A key of the report's `dropped`.
    pub reason: &'static str,
    /// The field, or the name of the limit.
    pub field: Option<String>,
    /// Byte offset inside the row's text.
    pub byte: Option<usize>,
    /// Expected, then found.
    pub message: String,
}

impl Bad {
    /// A bad row; `field` may be empty for none.
    pub fn new(reason: &'static str, field: &str, message: impl Into<String>) -> Self {
        let field = (!field.is_empty()).then(|| field.to_owned());
        Self { reason, field, byte: None, message: message.into() }
    }
}

/// What a row holds.
#[derive(Debug, Clone)]
pub enum Content<'a> {
    /// Strings; without a prompt it is found in the common start of both sides.
    Text {
        /// The text before the completions, `None` for the common start of both.
        prompt: Option<Cow<'a, str>>,
        /// The preferred text.
        chosen: Cow<'a, str>,
        /// The other text.
        rejected: Cow<'a, str>,
    },
    /// Lists of messages.
    Chat {
        /// The messages before the completions, `None` for the common leading messages.
        prompt: Option<Vec<Value<'a>>>,
        /// The preferred messages.
        chosen: Vec<Value<'a>>,
        /// The other messages.
        rejected: Vec<Value<'a>>,
        /// Functions that the template may describe.
        tools: Option<Value<'a>>,
        /// Further variables of the template.
        kwargs: Vec<(Cow<'a, str>, Value<'a>)>,
    },
    /// Token ids.
    Ids {
        /// Shared by both sides.
        prompt: Vec<i32>,
        /// The preferred ids, without the prompt's.
        chosen: Vec<i32>,
        /// The other ids, without the prompt's.
        rejected: Vec<i32>,
    },
}

/// One row of a data set.
#[derive(Debug, Clone)]
pub struct Row<'a> {
    /// Text, messages or ids.
    pub content: Content<'a>,
    /// Log-probs of the two sides under the reference.
    pub ref_logps: Option<[f64; 2]>,
    /// The extra columns, in the order of [`Keys::extra`].
    pub extra: Vec<Cell>,
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

const ARRAY_HINT: &str = "\nhint: write one object a line; this looks like a JSON array file";

/// A value whose limit was noted but not acted on: the reasons before `limit` come first.
fn check_limit(findings: &Findings) -> Result<(), Bad> {
    match &findings.limit {
        Some((name, found)) => Err(Bad::new("limit", name, found.clone())),
        None => Ok(()),
    }
}

impl<'a> Row<'a> {
    /// The row of one JSON line; `names` are those of [`Keys::names`].
    ///
    /// # Errors
    /// [`Bad`] with the first reason that applies, in the order of the report's table.
    pub fn from_line(
        text: &'a str,
        names: &[&str],
        keys: &Keys,
        limits: &Limits,
        vocab: usize,
    ) -> Result<Self, Bad> {
        let (fields, findings) =
            super::json::parse_fields(text, names, limits).map_err(|fault| {
                let hint = if text.trim_start().starts_with('[') { ARRAY_HINT } else { "" };
                Bad {
                    reason: if fault.is_encoding { "bad_utf8" } else { "bad_json" },
                    field: None,
                    byte: Some(fault.pos),
                    message: fault.message + hint,
                }
            })?;
        let Some(fields) = fields else {
            let (kind, hint) = match text.trim_start().chars().next() {
                Some('[') => ("a list", ARRAY_HINT),
                Some('"') => ("a string", ""),
                Some('t' | 'f') => ("a boolean", ""),
                Some('n') => ("null", ""),
                _ => ("a number", ""),
            };
            let message = format!("expected an object, found {kind}{hint}");
            return Err(Bad::new("not_an_object", "", message));
        };
        Self::from_fields(fields, &findings, keys, limits, vocab)
    }

    /// The row of named values, in the order of [`Keys::names`].
    ///
    /// # Errors
    /// [`Bad`] with the first reason that applies, in the order of the report's table.
    pub fn from_fields(
        mut fields: Fields<'a>,
        findings: &Findings,
        keys: &Keys,
        limits: &Limits,
        vocab: usize,
    ) -> Result<Self, Bad> {
        if let Some(key) = &findings.duplicate {
            return Err(Bad::new("duplicate_key", key, "expected every key once, found it twice"));
        }
        let mut take = |slot: usize| fields.get_mut(slot).and_then(Option::take);
        let [prompt, chosen, rejected, tools, kwargs] = [0, 1, 2, 3, 4].map(&mut take);
        let ids = [5, 6, 7].map(&mut take);
        let ref_logps = [8, 9].map(&mut take);
        let ref_logps = reference(ref_logps)?;
        let extra = keys
            .extra
            .iter()
            .enumerate()
            .map(|(i, name)| cell(required(take(FIELDS + i), name)?, name))
            .collect::<Result<_, _>>()?;
        let is_text = chosen.is_some() || rejected.is_some();
        let is_ids =
            ids.iter().all(Option::is_some) || (!is_text && ids.iter().any(Option::is_some));
        let content = if is_ids {
            Self::ids(ids, findings, limits, vocab)?
        } else {
            let chosen = required(chosen, &keys.chosen)?;
            let rejected = required(rejected, &keys.rejected)?;
            if prompt.is_none() && keys.prompt_required {
                return Err(missing(&keys.prompt));
            }
            match (chosen, rejected) {
                (Value::Str(chosen), Value::Str(rejected)) => {
                    let prompt = match prompt {
                        None => None,
                        Some(Value::Str(text)) => Some(text),
                        Some(other) => {
                            return Err(wrong(
                                &keys.prompt,
                                "a string, as in the completions",
                                &other,
                            ));
                        }
                    };
                    check_limit(findings)?;
                    Content::Text { prompt, chosen, rejected }
                }
                (Value::List(chosen), Value::List(rejected)) => {
                    let prompt = match prompt {
                        None => None,
                        Some(Value::List(messages)) => Some(messages),
                        Some(other) => {
                            return Err(wrong(
                                &keys.prompt,
                                "a list of messages, as in the completions",
                                &other,
                            ));
                        }
                    };
                    Self::chat(prompt, chosen, rejected, tools, kwargs, findings, keys, limits)?
                }
                (Value::Str(_), other) => {
                    return Err(wrong(&keys.rejected, "a string, as in the other side", &other));
                }
                (Value::List(_), other) => {
                    return Err(wrong(
                        &keys.rejected,
                        "a list of messages, as in the other side",
                        &other,
                    ));
                }
                (other, _) => {
                    return Err(wrong(&keys.chosen, "a string or a list of messages", &other));
                }
            }
        };
        Ok(Self { content, ref_logps, extra })
    }

    #[allow(clippy::too_many_arguments)] // the fields of one row, taken apart once
    fn chat(
        prompt: Option<Vec<Value<'a>>>,
        chosen: Vec<Value<'a>>,
        rejected: Vec<Value<'a>>,
        tools: Option<Value<'a>>,
        kwargs: Option<Value<'a>>,
        findings: &Findings,
        keys: &Keys,
        limits: &Limits,
    ) -> Result<Content<'a>, Bad> {
        let kwargs = match kwargs {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Object(items)) => items,
            Some(other) => return Err(wrong("chat_template_kwargs", "an object", &other)),
        };
        if let Some(messages) = &prompt {
            check_messages(messages, &keys.prompt)?;
        }
        check_messages(&chosen, &keys.chosen)?;
        check_messages(&rejected, &keys.rejected)?;
        let tools = check_tools(tools, limits)?;
        if let Some((name, _)) = kwargs.iter().find(|(name, _)| RESERVED.contains(&name.as_ref())) {
            let message = format!(
                "`{name}` belongs to the template's own variables and cannot be overridden by a row"
            );
            return Err(Bad::new("bad_messages", "chat_template_kwargs", message));
        }
        check_limit(findings)?;
        for (messages, key) in [
            (prompt.as_ref(), &keys.prompt),
            (Some(&chosen), &keys.chosen),
            (Some(&rejected), &keys.rejected),
        ] {
            let found = messages.map_or(0, Vec::len);
            if found > limits.max_messages {
                let most = limits.max_messages;
                return Err(Bad::new(
                    "limit",
                    "max_messages",
                    format!("`{key}` has {found} messages, more than {most}"),
                ));
            }
        }
        Ok(Content::Chat { prompt, chosen, rejected, tools, kwargs })
    }

    fn ids(
        ids: [Option<Value<'a>>; 3],
        findings: &Findings,
        limits: &Limits,
        vocab: usize,
    ) -> Result<Content<'a>, Bad> {
        let names = ["prompt_ids", "chosen_ids", "rejected_ids"];
        let [prompt, chosen, rejected] = ids;
        let mut lists = [Vec::new(), Vec::new(), Vec::new()];
        for ((list, value), name) in lists.iter_mut().zip([prompt, chosen, rejected]).zip(names) {
            match required(value, name)? {
                Value::List(items) => *list = items,
                other => return Err(wrong(name, "a list of token ids", &other)),
            }
        }
        check_limit(findings)?;
        let [p, c, r] = &lists;
        let longest = p.len() + c.len().max(r.len());
        if longest > limits.max_row_tokens {
            let message =
                format!("a side has {longest} tokens, more than {}", limits.max_row_tokens);
            return Err(Bad::new("limit", "max_row_tokens", message));
        }
        let mut out = [Vec::new(), Vec::new(), Vec::new()];
        for ((out, list), name) in out.iter_mut().zip(&lists).zip(names) {
            out.reserve_exact(list.len());
            for value in list {
                match value {
                    Value::Int(id) => match i32::try_from(*id) {
                        Ok(id) if usize::try_from(id).is_ok_and(|id| id < vocab) => out.push(id),
                        _ => {
                            let message = format!("expected token ids in 0..{vocab}, found {id}");
                            return Err(Bad::new("bad_ids", name, message));
                        }
                    },
                    other => {
                        let message = format!("expected whole numbers, found {}", other.kind());
                        return Err(Bad::new("bad_ids", name, message));
                    }
                }
            }
        }
        let [prompt, chosen, rejected] = out;
        Ok(Content::Ids { prompt, chosen, rejected })
    }
}

fn missing(name: &str) -> Bad {
    Bad::new("missing_field", name, "expected this field, found none")
}

fn required<'a>(value: Option<Value<'a>>, name: &str) -> Result<Value<'a>, Bad> {
    value.ok_or_else(|| missing(name))
}

pub(super) fn wrong(name: &str, expected: &str, found: &Value<'_>) -> Bad {
    Bad::new("wrong_type", name, format!("expected {expected}, found {}", found.kind()))
}

fn reference(values: [Option<Value<'_>>; 2]) -> Result<Option<[f64; 2]>, Bad> {
    let names = ["ref_chosen_logps", "ref_rejected_logps"];
    let [chosen, rejected] = values.map(|value| value.filter(|v| *v != Value::Null));
    let (chosen, rejected) = match (chosen, rejected) {
        (None, None) => return Ok(None),
        (Some(_), None) => return Err(missing("ref_rejected_logps")),
        (None, Some(_)) => return Err(missing("ref_chosen_logps")),
        (Some(chosen), Some(rejected)) => (chosen, rejected),
    };
    let mut out = [0.0; 2];
    for ((out, value), name) in out.iter_mut().zip([chosen, rejected]).zip(names) {
        *out = match value {
            Value::Int(number) => number as f64,
            Value::Float(number) if number.is_finite() => number,
            Value::Float(_) | Value::Huge(_) => {
                return Err(Bad::new(
                    "wrong_type",
                    name,
                    "expected a finite number, found one that is not",
                ));
            }
            other => return Err(wrong(name, "a number", &other)),
        };
    }
    Ok(Some(out))
}

fn check_messages(messages: &[Value<'_>], key: &str) -> Result<(), Bad> {
    let bad = |message: String| Err(Bad::new("bad_messages", key, message));
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
    let bad = |message: String| Err(Bad::new("bad_messages", "tools", message));
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
