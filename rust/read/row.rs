//! From named values to one row: which format it has, and what is wrong with it.

use super::bad::{Bad, check_limit, missing, required, wrong};
use super::cell::{Cell, cell};
use super::cells::Cells;
use super::chat::Chat;
use super::json::{Fields, Findings, Value, parse_fields};
use super::keys::{FIELDS, Field, Keys};
use super::layouts::{Layout, found, read};
use super::limits::Limits;
use super::said::{Said, Strings};
use super::single::{both_sides, label};
use super::turns::{Spelt, spelt};
use crate::error::{Reason, Warning};

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
    /// How the row says it.
    pub layout: Layout,
    /// The field in which the row has a picture, a film or a sound.
    pub media: Option<&'static str>,
    /// What is to know of how it was read.
    pub warned: Vec<Warning>,
    /// Log-probs of the two sides under the reference.
    pub ref_logps: Option<[f64; 2]>,
    /// What the row says of the weights of its sides, to be read with what they weigh.
    pub weights: [Option<Value<'a>>; 2],
    /// The extra columns, in the order of [`Keys::extra`].
    pub extra: Vec<Cell>,
    /// The field, which nobody reads, that holds a number which is none.
    pub non_finite: Option<String>,
    /// Fields with something to read that nobody read.
    pub unread: Vec<String>,
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
    /// The layout of every row, `None` to find it for each.
    pub layout: Option<Layout>,
    /// Keys of Arrow structs that hold null are kept; otherwise they are not there.
    pub keep_nulls: bool,
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
        let Rules { keys, limits, vocab, .. } = *rules;
        if let Some(key) = &findings.duplicate {
            return Err(Bad::new(
                Reason::DuplicateKey,
                key,
                "expected every key once, found it twice",
            ));
        }
        let ref_logps = reference(
            [Field::RefChosen, Field::RefRejected]
                .map(|field| fields.get_mut(field as usize).and_then(Option::take)),
        )?;
        let names = if keys.extra.is_empty() { Vec::new() } else { keys.names() };
        let extra = keys
            .extra
            .iter()
            .enumerate()
            .map(|(i, name)| {
                // The field of a layout may be carried along, too.
                let own = names.iter().position(|known| known == name).filter(|at| *at < FIELDS);
                let value = match own {
                    Some(at) => fields.get(at).cloned().flatten(),
                    None => fields.get_mut(FIELDS + i).and_then(Option::take),
                };
                let value = required(value, name)?;
                if keys.label.as_ref() == Some(name) {
                    return label(&value, name);
                }
                cell(value, name)
            })
            .collect::<Result<_, _>>()?;
        let mut cells = Cells(fields);
        let mut warned = Vec::new();
        let media = cells.media();
        unpack(&mut cells, keys, limits, &mut warned)?;
        if keys.is_single() {
            both_sides(&mut cells, keys, limits)?;
        }
        let layout = rules.layout.unwrap_or_else(|| found(&cells, keys));
        // One completion shares no beginning with another, from which a prompt could be told.
        let lacks = keys.is_single() && layout == Layout::Implicit;
        let needs_prompt = lacks || keys.prompt_required || rules.layout == Some(Layout::Explicit);
        let content = if layout == Layout::Ids {
            let ids = [Field::PromptIds, Field::ChosenIds, Field::RejectedIds];
            Self::ids(
                ids.map(|field| (cells.take(field), keys.name(field))),
                findings,
                limits,
                vocab,
            )?
        } else {
            match read(layout, needs_prompt, &mut cells, keys, limits, &mut warned)? {
                Said::Text(strings) => {
                    check_limit(findings)?;
                    let is_tools = |value: Value<'_>| match value {
                        Value::List(tools) => !tools.is_empty(),
                        Value::Str(text) => !text.is_empty() && text != "[]",
                        _ => false,
                    };
                    if cells.take(Field::Tools).is_some_and(is_tools) {
                        warned.push(Warning::ToolsDropped);
                    }
                    Content::Text(strings)
                }
                Said::Turns(turns) => {
                    let tools = cells.take(Field::Tools);
                    let kwargs = Chat::kwargs(cells.take(Field::Kwargs))?;
                    let allows = layout == Layout::Completions;
                    let chat = Chat { turns, tools, kwargs };
                    Content::Chat(chat.checked(findings, keys, limits, allows)?)
                }
            }
        };
        let weights = if keys.is_single() {
            [None, None]
        } else {
            [Field::ChosenWeights, Field::RejectedWeights].map(|field| cells.take_some(field))
        };
        let media = match &content {
            Content::Chat(chat) => media.or(chat.turns.media()),
            _ => media,
        };
        let non_finite = findings.non_finite.clone();
        let names = || keys.fields().enumerate();
        let is_carried = |name: &str| keys.extra.iter().any(|extra| extra == name);
        let known = cells.left().filter_map(|at| names().find(|(i, _)| *i == at));
        let known = known.map(|(_, name)| name).filter(|name| !is_carried(name));
        let unknown = findings.unread.iter().filter(|name| !keys.ignored.contains(name));
        let unread = known.map(str::to_owned).chain(unknown.cloned()).collect();
        Ok(Self { content, layout, media, warned, ref_logps, weights, extra, non_finite, unread })
    }

    fn ids(
        ids: [(Option<Value<'a>>, &str); 3],
        findings: &Findings,
        limits: &Limits,
        vocab: usize,
    ) -> Result<Content<'a>, Bad> {
        let names = ids.each_ref().map(|(_, name)| *name);
        let mut lists = [Vec::new(), Vec::new(), Vec::new()];
        for (list, (value, name)) in lists.iter_mut().zip(ids) {
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

/// Conversations that were stored as JSON in strings, made conversations.
fn unpack(
    cells: &mut Cells<'_>,
    keys: &Keys,
    limits: &Limits,
    warned: &mut Vec<Warning>,
) -> Result<(), Bad> {
    // Each alone, or both sides of a pair.
    let groups: [&[Field]; 6] = [
        &[Field::Chosen, Field::Rejected],
        &[Field::Prompt],
        &[Field::Messages],
        &[Field::Conversation],
        &[Field::Conversations],
        &[Field::RejectedMessages],
    ];
    for fields in groups {
        let looks = |field: &&Field| {
            cells.text(**field).is_some_and(|text| text.trim_start().starts_with(['[', '{']))
        };
        if fields.iter().find(looks).is_none() {
            continue;
        }
        let mut texts = 0;
        let mut found = Vec::with_capacity(fields.len());
        for field in fields {
            if let Some(text) = cells.text(*field) {
                let spelt = spelt(text, limits);
                texts += usize::from(matches!(spelt, Spelt::Text));
                found.push((*field, spelt));
            }
        }
        if texts == found.len() {
            continue;
        }
        for (field, spelt) in found {
            let bad = |message: String| Bad::new(Reason::BadMessages, keys.name(field), message);
            match spelt {
                Spelt::Turns(turns) if texts == 0 => cells.put(field, turns),
                Spelt::Turns(_) => {
                    let message = "found turns in JSON text, and the other side is no such text";
                    return Err(bad(message.to_owned()));
                }
                Spelt::Broken(message) if texts == 0 => return Err(bad(message)),
                Spelt::Broken(_) | Spelt::Text => {}
            }
        }
        if texts == 0 && !warned.contains(&Warning::MessagesAsJsonText) {
            warned.push(Warning::MessagesAsJsonText);
        }
    }
    Ok(())
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
