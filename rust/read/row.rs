//! From named values to one row: which format it has, and what is wrong with it.

use std::borrow::Cow;

use super::bad::{Bad, check_limit, missing, required, wrong};
use super::cell::{Cell, cell};
use super::chat::Chat;
use super::json::{Fields, Findings, Value, parse_fields};
use super::keys::{FIELDS, Keys};
use super::limits::Limits;
use crate::error::Reason;

/// Two texts and what stands before them.
#[derive(Debug, Clone)]
pub struct Strings<'a> {
    /// The text before the completions, `None` for the common start of both.
    pub prompt: Option<Cow<'a, str>>,
    /// The preferred text.
    pub chosen: Cow<'a, str>,
    /// The other text.
    pub rejected: Cow<'a, str>,
}

/// What a row holds.
#[derive(Debug, Clone)]
pub enum Content<'a> {
    /// Strings.
    Text(Strings<'a>),
    /// Lists of messages.
    Chat(Chat<'a>),
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
    /// The field, which nobody reads, that holds a number which is none.
    pub non_finite: Option<String>,
}

/// What a row is read by.
#[derive(Debug, Clone, Copy)]
pub struct Rules<'a> {
    /// Names of the fields.
    pub keys: &'a Keys,
    /// Limits on input.
    pub limits: &'a Limits,
    /// One more than the largest id that a row may hold.
    pub vocab: usize,
}

const ARRAY_HINT: &str = "\nhint: a row is an object; an array of rows is a file of its own";

impl<'a> Row<'a> {
    /// The row of one JSON line; `names` are those of [`Keys::names`].
    ///
    /// # Errors
    /// [`Bad`] with the first reason that applies, in the order of the report's table.
    pub fn from_line(text: &'a str, names: &[&str], rules: &Rules<'_>) -> Result<Self, Bad> {
        let (fields, findings) = parse_fields(text, names, rules.limits).map_err(|fault| {
            let hint = if text.trim_start().starts_with('[') { ARRAY_HINT } else { "" };
            Bad {
                reason: if fault.is_encoding { Reason::BadUtf8 } else { Reason::BadJson },
                field: fault.field,
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
            return Err(Bad::new(Reason::NotAnObject, "", message));
        };
        Self::from_fields(fields, &findings, rules)
    }

    /// The row of named values, in the order of [`Keys::names`].
    ///
    /// # Errors
    /// [`Bad`] with the first reason that applies, in the order of the report's table.
    pub fn from_fields(
        mut fields: Fields<'a>,
        findings: &Findings,
        rules: &Rules<'_>,
    ) -> Result<Self, Bad> {
        let Rules { keys, limits, vocab } = *rules;
        if let Some(key) = &findings.duplicate {
            return Err(Bad::new(
                Reason::DuplicateKey,
                key,
                "expected every key once, found it twice",
            ));
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
                    Content::Text(Strings { prompt, chosen, rejected })
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
                    let kwargs = Chat::kwargs(kwargs)?;
                    let chat = Chat { prompt, chosen, rejected, tools, kwargs };
                    Content::Chat(chat.checked(findings, keys, limits)?)
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
        let non_finite = findings.non_finite.clone();
        Ok(Self { content, ref_logps, extra, non_finite })
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
            return Err(Bad::new(Reason::Limit, "max_row_tokens", message));
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
                            return Err(Bad::new(Reason::BadIds, name, message));
                        }
                    },
                    other => {
                        let message = format!("expected whole numbers, found {}", other.kind());
                        return Err(Bad::new(Reason::BadIds, name, message));
                    }
                }
            }
        }
        let [prompt, chosen, rejected] = out;
        Ok(Content::Ids { prompt, chosen, rejected })
    }
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
                    Reason::WrongType,
                    name,
                    "expected a finite number, found one that is not",
                ));
            }
            other => return Err(wrong(name, "a number", &other)),
        };
    }
    Ok(Some(out))
}
