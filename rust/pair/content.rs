//! Whether a render holds what its messages say: nothing of a row goes missing in silence.

use std::borrow::Cow;

use super::outcome::{Pair, Refusal};
use super::prompt::Parts;
use super::render::Renderer;
use super::text::is_blank;
use crate::error::{Reason, Warning};
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::template::{Rendered, Shown, strip};

/// Texts below so many bytes may stand in a render by chance, and are looked for with a mark behind them.
const SHORT: usize = 12;
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// The messages of a render that are looked for in it.
pub(super) struct Side<'s> {
    /// All messages.
    pub(super) messages: Vec<&'s Value<'s>>,
    /// The first that is looked for.
    pub(super) from: usize,
    /// The first of the completion.
    pub(super) completion: usize,
    /// Names of the fields of prompt and completion.
    pub(super) names: [&'s str; 2],
    /// Turns of the prompt that its field has; the others stand in the completion's.
    pub(super) own: usize,
    /// Turns of the completion's field before the ones that are the prompt's own.
    pub(super) twice: usize,
}

impl Side<'_> {
    /// The field of a message and its number there.
    fn place(&self, i: usize) -> (&str, usize) {
        let [prompt, side] = self.names;
        if i < self.own { (prompt, i + 1) } else { (side, i - self.own + self.twice + 1) }
    }

    fn lost(&self, i: usize, what: &str) -> Refusal {
        let (key, number) = self.place(i);
        let role = self.messages.get(i).and_then(|m| m.role()).unwrap_or_default();
        let role: String = role.escape_debug().take(80).collect();
        let message = format!("message {number} (`{role}`): the chat template {what}");
        Bad::new(Reason::ContentDropped, key, message).into()
    }
}

/// The texts of a content: itself, or those of its parts.
fn texts<'v>(content: Option<&'v Value<'_>>, see: &mut impl FnMut(&'v str)) {
    match content {
        Some(Value::Str(text)) => see(text),
        Some(Value::List(parts)) => {
            for part in parts {
                if let Value::Str(text) = part.get("text").unwrap_or(part) {
                    see(text);
                }
            }
        }
        Some(value @ Value::Object(_)) => leaves(value, see),
        _ => {}
    }
}

/// All strings of a value, without keys.
fn leaves<'v>(value: &'v Value<'_>, see: &mut impl FnMut(&'v str)) {
    match value {
        Value::Str(text) => see(text),
        Value::List(items) => items.iter().for_each(|item| leaves(item, see)),
        Value::Object(items) => items.iter().for_each(|(_, item)| leaves(item, see)),
        _ => {}
    }
}

fn calls<'v, 'a>(message: &'v Value<'a>) -> &'v [Value<'a>] {
    match message.get("tool_calls") {
        Some(Value::List(calls)) => calls,
        _ => &[],
    }
}

/// Looks for everything that the messages say.
///
/// # Errors
/// A bad row where text of a turn is missing, or a call that is all of a completion.
pub(super) fn check_content(
    side: &Side<'_>,
    rendered: &Rendered,
    renderer: &Renderer<'_>,
    pair: &mut Pair,
) -> Result<(), Refusal> {
    if rendered.complete {
        return Ok(());
    }
    let shown = Shown::new(&rendered.text);
    let mut has_short = false;
    for (i, message) in side.messages.iter().enumerate().skip(side.from) {
        let content = message.get("content");
        let mut is_lost = false;
        texts(content, &mut |text| {
            if strip(text).len() < SHORT {
                has_short |= !strip(text).is_empty();
            } else {
                is_lost |= !shown.has(text);
            }
        });
        if is_lost {
            return Err(side.lost(i, "does not print its `content`"));
        }
        if let Some(value @ (Value::List(_) | Value::Object(_))) = content
            && !matches!(value, Value::List(parts) if parts.is_empty())
            && shown.has_python(value)
        {
            let what = "prints its `content` as Python prints a list or a dict\nhint: give it as one string";
            return Err(side.lost(i, what));
        }
        for call in calls(message) {
            let call = call.get("function").unwrap_or(call);
            let mut is_there =
                !matches!(call.get("name"), Some(Value::Str(name)) if !shown.has(name));
            match call.get("arguments") {
                Some(Value::Str(text)) if text.trim_start().starts_with('{') => {
                    if shown.has_json_string(text) {
                        pair.warn(Warning::ArgumentsAsText);
                    } else {
                        is_there &= shown.has(text);
                    }
                }
                Some(arguments) => leaves(arguments, &mut |text| is_there &= shown.has(text)),
                None => {}
            }
            if is_there {
                continue;
            }
            let is_all = !matches!(content, Some(Value::Str(text)) if !is_blank(text));
            if i >= side.completion && is_all {
                return Err(side.lost(i, "does not print its `tool_calls`"));
            }
            pair.warn(Warning::ToolCallsDropped);
        }
        let is_last = i + 1 == side.messages.len();
        let reasoning = REASONING.iter().find_map(|name| match message.get(name) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        });
        if is_last && reasoning.is_some_and(|text| !shown.has(text)) {
            pair.warn(Warning::ReasoningDropped);
        }
    }
    if has_short {
        check_short(side, &shown, renderer)?;
    }
    if side.from == 0 {
        let tools = renderer.variables.iter().find(|(name, _)| *name == "tools");
        if let Some((_, Value::List(tools))) = tools {
            let is_lost = |tool: &Value<'_>| {
                let name = tool.get("function").unwrap_or(tool).get("name");
                matches!(name, Some(Value::Str(name)) if !shown.has(name))
            };
            if tools.iter().any(is_lost) {
                pair.warn(Warning::ToolsDropped);
            }
        }
    }
    Ok(())
}

/// Looks for short texts by a mark behind each, since they may stand in a render by chance.
fn check_short(side: &Side<'_>, shown: &Shown<'_>, renderer: &Renderer<'_>) -> Result<(), Refusal> {
    let mark = |i: usize| format!("qzxk{i}v");
    let marked: Vec<Value<'_>> =
        side.messages.iter().enumerate().map(|(i, m)| with_mark(m, &mark(i))).collect();
    let rendered = renderer.try_render(&marked.iter().collect::<Vec<_>>());
    let rendered = rendered.map(|text| text.to_lowercase());
    for (i, message) in side.messages.iter().enumerate().skip(side.from) {
        let mut is_lost = false;
        texts(message.get("content"), &mut |text| {
            if !strip(text).is_empty() && strip(text).len() < SHORT {
                is_lost |= match &rendered {
                    Some(rendered) => !rendered.contains(&mark(i)),
                    None => !shown.has(text),
                };
            }
        });
        if is_lost {
            return Err(side.lost(i, "does not print its `content`"));
        }
    }
    Ok(())
}

/// A message with a mark behind each short text of its content.
fn with_mark<'v>(message: &Value<'v>, mark: &str) -> Value<'v> {
    let marked = |text: &str| -> Cow<'v, str> {
        let is_short = !strip(text).is_empty() && strip(text).len() < SHORT;
        if is_short { format!("{text}{mark}").into() } else { text.to_owned().into() }
    };
    with_content(message, |content| match content {
        Value::Str(text) => Value::Str(marked(text)),
        Value::List(parts) => Value::List(
            parts
                .iter()
                .map(|part| match part {
                    Value::Str(text) => Value::Str(marked(text)),
                    Value::Object(items) => Value::Object(
                        items
                            .iter()
                            .map(|(key, value)| match value {
                                Value::Str(text) if key == "text" => {
                                    (key.clone(), Value::Str(marked(text)))
                                }
                                _ => (key.clone(), value.clone()),
                            })
                            .collect(),
                    ),
                    other => other.clone(),
                })
                .collect(),
        ),
        Value::Object(items) => Value::Object(
            items
                .iter()
                .map(|(key, value)| match value {
                    Value::Str(text) => (key.clone(), Value::Str(marked(text))),
                    _ => (key.clone(), value.clone()),
                })
                .collect(),
        ),
        other => other.clone(),
    })
}

fn with_content<'v>(message: &Value<'v>, change: impl Fn(&Value<'v>) -> Value<'v>) -> Value<'v> {
    let Value::Object(items) = message else { return message.clone() };
    let changed = items.iter().map(|(key, value)| {
        (key.clone(), if key == "content" { change(value) } else { value.clone() })
    });
    Value::Object(changed.collect())
}

/// The text of a content that is a list of nothing but text.
fn only_text(message: &Value<'_>) -> Option<String> {
    let Some(Value::List(parts)) = message.get("content") else { return None };
    let text = |part: &Value<'_>| match (part, part.get("type"), part.get("text")) {
        (Value::Str(text), ..) | (_, None, Some(Value::Str(text))) => Some(text.to_string()),
        (_, Some(Value::Str(kind)), Some(Value::Str(text))) if kind.ends_with("text") => {
            Some(text.to_string())
        }
        _ => None,
    };
    parts.iter().map(text).collect()
}

/// Joins lists of text to one string each, where the template prints that and not the lists.
pub(super) fn joined(parts: &mut Parts<'_>, renderer: &Renderer<'_>) {
    let Parts { prompt, chosen, rejected, .. } = &*parts;
    let all = || prompt.iter().chain(chosen);
    if !all().chain(rejected).any(|message| only_text(message).is_some_and(|t| !t.is_empty())) {
        return;
    }
    let prints = |messages: &[&Value<'_>]| {
        renderer.try_render(messages).is_some_and(|text| {
            let shown = Shown::new(&text);
            messages.iter().all(|message| {
                let mut has = true;
                texts(message.get("content"), &mut |text| has &= shown.has(text));
                let list = message.get("content").filter(|c| matches!(c, Value::List(_)));
                has && !list.is_some_and(|list| shown.has_python(list))
            })
        })
    };
    if prints(&all().collect::<Vec<_>>()) {
        return;
    }
    let string = |message: &Value<'_>| match only_text(message) {
        Some(text) => with_content(message, |_| Value::Str(text.clone().into())).into_owned(),
        None => message.clone().into_owned(),
    };
    let strings: Vec<Value<'_>> = all().map(string).collect();
    if prints(&strings.iter().collect::<Vec<_>>()) {
        for messages in [&mut parts.prompt, &mut parts.chosen, &mut parts.rejected] {
            for message in messages {
                *message = string(message);
            }
        }
    }
}
