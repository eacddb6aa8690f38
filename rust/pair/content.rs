//! Whether a render holds what its messages say: nothing of a row goes missing in silence.

use super::outcome::{Pair, Refusal};
use super::prompt::Parts;
use super::render::Renderer;
use super::text::is_blank;
use crate::error::{Reason, Warning};
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::turns::is_asked;
use crate::template::{Places, Rendered, Shown, strip};

/// Texts below so many bytes may stand in a render by chance.
const SHORT: usize = 12;
const END_OF_THOUGHT: &str = "</think>";
/// Words that switch thoughts on and off, which some templates take out of a text.
const SWITCHES: [&str; 3] = ["/no_think", "/nothink", "/think"];
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

/// The texts of a content, to be seen or changed: itself, those of its parts, or all of an object's.
fn texts<'v>(content: Option<&'v Value<'_>>, see: &mut impl FnMut(&'v str)) {
    match content {
        Some(Value::Str(text)) => see(text),
        Some(Value::List(parts)) => {
            for part in parts {
                if let Some(Value::Str(text)) =
                    text_of(part).map_or(Some(part), |key| part.get(key))
                {
                    see(text);
                }
            }
        }
        Some(value @ Value::Object(_)) => leaves(value, see),
        _ => {}
    }
}

/// The same content with its texts changed.
fn with_texts<'v>(content: &Value<'v>, change: &mut impl FnMut(&str) -> String) -> Value<'v> {
    match content {
        Value::List(parts) => {
            let part = |part: &Value<'v>| match (part, text_of(part)) {
                (Value::Object(_), Some(text)) => {
                    with_field(part, text, |text| with_leaves(text, change))
                }
                (Value::Str(_), _) => with_leaves(part, change),
                _ => part.clone(),
            };
            Value::List(parts.iter().map(part).collect())
        }
        other => with_leaves(other, change),
    }
}

/// The key of a part's text.
fn text_of(part: &Value<'_>) -> Option<&'static str> {
    ["text", "content"].into_iter().find(|key| matches!(part.get(key), Some(Value::Str(_))))
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

/// The same value with its strings changed.
fn with_leaves<'v>(value: &Value<'v>, change: &mut impl FnMut(&str) -> String) -> Value<'v> {
    match value {
        Value::Str(text) => Value::Str(change(text).into()),
        Value::List(items) => {
            Value::List(items.iter().map(|item| with_leaves(item, change)).collect())
        }
        Value::Object(items) => {
            let item = |(key, item): &(_, _)| (Clone::clone(key), with_leaves(item, change));
            Value::Object(items.iter().map(item).collect())
        }
        other => other.clone(),
    }
}

/// The same object with one field changed, if it is there.
fn with_field<'v>(
    value: &Value<'v>,
    name: &str,
    change: impl FnOnce(&Value<'v>) -> Value<'v>,
) -> Value<'v> {
    let mut value = value.clone();
    if let Value::Object(items) = &mut value
        && let Some((_, field)) = items.iter_mut().find(|(key, _)| key == name)
    {
        *field = change(field);
    }
    value
}

/// What is left of a text without what templates take out on purpose: thoughts of an answer, and switches of them.
fn without_thoughts<'t>(message: &Value<'_>, text: &'t str) -> Option<&'t str> {
    if is_asked(message) {
        return None;
    }
    text.rsplit_once(END_OF_THOUGHT).map(|(_, said)| said)
}

fn without_switches(text: &str) -> Option<String> {
    let has = SWITCHES.iter().any(|switch| text.contains(switch));
    has.then(|| SWITCHES.iter().fold(text.to_owned(), |text, switch| text.replace(switch, "")))
}

fn calls<'v, 'a>(message: &'v Value<'a>) -> Vec<&'v Value<'a>> {
    let mut calls: Vec<_> = match message.get("tool_calls") {
        Some(Value::List(calls)) => calls.iter().collect(),
        _ => Vec::new(),
    };
    calls.extend(message.get("function_call").filter(|call| matches!(call, Value::Object(_))));
    calls
}

fn function<'v, 'a>(value: &'v Value<'a>) -> &'v Value<'a> {
    value.get("function").unwrap_or(value)
}

/// A render of the same conversation in which each text has a mark of its own behind it.
#[derive(Default)]
struct Marked {
    /// In lower case; none if the template does not take the marks.
    text: Option<String>,
}

impl Marked {
    fn content(message: usize, text: usize) -> String {
        format!("qzxk{message}t{text}v")
    }

    fn call(message: usize, call: usize, string: usize) -> String {
        format!("qzxk{message}c{call}s{string}v")
    }

    fn tool(tool: usize) -> String {
        format!("qzxktool{tool}v")
    }

    /// Renders `messages` with marks behind all contents, and behind names and arguments of calls and tools if the
    /// template takes it.
    fn new(messages: &[&Value<'_>], renderer: &Renderer<'_>) -> [Self; 2] {
        let contents: Vec<Value<'_>> =
            messages.iter().enumerate().map(|(i, message)| Self::message(i, message)).collect();
        let has_calls = messages.iter().any(|message| !calls(message).is_empty());
        let tools = renderer.tools().map(Self::tools);
        let render = |messages: &[Value<'_>], tools: Option<&Value<'_>>| {
            let text = renderer.try_render_with(&messages.iter().collect::<Vec<_>>(), tools);
            text.map(|text| text.to_lowercase())
        };
        if has_calls || tools.is_some() {
            let all: Vec<Value<'_>> =
                contents.iter().enumerate().map(|(i, message)| Self::calls(i, message)).collect();
            if let Some(text) = render(&all, tools.as_ref()) {
                return [Self { text: Some(text.clone()) }, Self { text: Some(text) }];
            }
        }
        [Self { text: render(&contents, None) }, Self::default()]
    }

    fn message<'v>(i: usize, message: &Value<'v>) -> Value<'v> {
        with_field(message, "content", |content| {
            let mut count = 0;
            with_texts(content, &mut |text| {
                count += 1;
                // What is blank may be left out, and what is not may not begin to be printed.
                if strip(text).is_empty() {
                    text.to_owned()
                } else {
                    text.to_owned() + &Self::content(i, count)
                }
            })
        })
    }

    fn calls<'v>(i: usize, message: &Value<'v>) -> Value<'v> {
        let mut number = 0;
        let mut marked = |call: &Value<'v>| {
            number += 1;
            let mut count = 0;
            let mut mark = |text: &str| {
                count += 1;
                text.to_owned() + &Self::call(i, number, count)
            };
            let mut said = |function: &Value<'v>| {
                let named = with_field(function, "name", |name| with_leaves(name, &mut mark));
                with_field(&named, "arguments", |value| with_leaves(value, &mut mark))
            };
            match call.get("function") {
                Some(_) => with_field(call, "function", said),
                None => said(call),
            }
        };
        let listed = with_field(message, "tool_calls", |calls| match calls {
            Value::List(calls) => Value::List(calls.iter().map(&mut marked).collect()),
            other => other.clone(),
        });
        with_field(&listed, "function_call", |call| match call {
            Value::Object(_) => marked(call),
            other => other.clone(),
        })
    }

    fn tools<'v>(tools: &[Value<'v>]) -> Value<'v> {
        let marked = |(i, tool): (usize, &Value<'v>)| {
            let mut mark = |text: &str| text.to_owned() + &Self::tool(i);
            let mut named = |function: &Value<'v>| {
                with_field(function, "name", |name| with_leaves(name, &mut mark))
            };
            match tool.get("function") {
                Some(_) => with_field(tool, "function", named),
                None => named(tool),
            }
        };
        Value::List(tools.iter().enumerate().map(marked).collect())
    }

    fn has(&self, mark: &str) -> bool {
        self.text.as_ref().is_none_or(|text| text.contains(mark))
    }
}

/// What a render lacks of a content.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Loss {
    Text,
    /// It is there as Python prints it.
    Python,
    /// Thoughts of the last turn.
    Thoughts,
}

/// What renders of one conversation say of it.
struct Look<'l> {
    messages: &'l [&'l Value<'l>],
    shown: Shown<'l>,
    renderer: &'l Renderer<'l>,
    /// Every text has a place of its own in the render.
    has_places: bool,
    /// Marks of contents, and of calls and tools.
    marked: std::cell::OnceCell<[Marked; 2]>,
}

impl<'l> Look<'l> {
    fn new(messages: &'l [&'l Value<'l>], text: &'l str, renderer: &'l Renderer<'l>) -> Self {
        let mut places = Places::new(text);
        let (mut has_places, mut has_short) = (true, false);
        for (i, message) in messages.iter().enumerate() {
            let is_last = i + 1 == messages.len();
            texts(message.get("content"), &mut |text| {
                has_short |= (1..SHORT).contains(&strip(text).len());
                let said = || without_thoughts(message, text).filter(|_| !is_last);
                has_places = has_places
                    && (places.take(text) || said().is_some_and(|said| places.take(said)));
            });
        }
        has_places = has_places && (!has_short || renderer.shows_contents(messages));
        let (shown, marked) = (Shown::new(text), std::cell::OnceCell::new());
        Self { messages, shown, renderer, has_places, marked }
    }

    fn marked(&self) -> &[Marked; 2] {
        self.marked.get_or_init(|| Marked::new(self.messages, self.renderer))
    }

    /// What the render lacks of the content of a message.
    fn loss(&self, i: usize) -> Option<Loss> {
        let message = self.messages.get(i)?;
        let content = message.get("content");
        if let Some(value @ (Value::List(_) | Value::Object(_))) = content
            && self.shown.has_python(value)
        {
            return Some(Loss::Python);
        }
        if self.has_places {
            return None;
        }
        let is_last = i + 1 == self.messages.len();
        let mut loss = None;
        let mut count = 0;
        texts(content, &mut |text| {
            count += 1;
            if strip(text).is_empty() || loss == Some(Loss::Text) {
                return;
            }
            let thoughtless = without_thoughts(message, text);
            let is_there = |text: &str| {
                let has = |text: &str| strip(text).is_empty() || self.shown.has(text);
                has(text) || without_switches(text).is_some_and(|text| has(&text))
            };
            if !self.marked()[0].has(&Marked::content(i, count)) {
                loss = Some(Loss::Text);
            } else if !is_there(text) {
                loss = match thoughtless {
                    Some(said) if strip(said).is_empty() && is_last => Some(Loss::Text),
                    Some(said) if is_there(said) => is_last.then_some(Loss::Thoughts),
                    _ => Some(Loss::Text),
                };
            }
        });
        loss
    }

    /// Whether the render has a call.
    fn has_call(&self, i: usize, number: usize, call: &Value<'_>) -> bool {
        let (mut is_there, mut count) = (true, 0);
        let mut see = |text: &str| {
            count += 1;
            let is_marked = self.marked()[1].has(&Marked::call(i, number, count));
            is_there &= is_marked && (strip(text).is_empty() || self.shown.has(text));
        };
        let function = function(call);
        for name in ["name", "arguments"] {
            function.get(name).into_iter().for_each(|value| leaves(value, &mut see));
        }
        if let Some(Value::Object(items)) = function.get("arguments") {
            is_there &= items.iter().all(|(key, _)| self.shown.has(key));
        }
        is_there
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
    let look = Look::new(&side.messages, &rendered.text, renderer);
    for (i, message) in side.messages.iter().enumerate().skip(side.from) {
        match look.loss(i) {
            Some(Loss::Text) => return Err(side.lost(i, "does not print its `content`")),
            Some(Loss::Python) => {
                let what = "prints its `content` as Python prints a list or a dict\nhint: give it as one string";
                return Err(side.lost(i, what));
            }
            Some(Loss::Thoughts) => pair.warn(Warning::ReasoningDropped),
            None => {}
        }
        for (number, call) in (1..).zip(calls(message)) {
            if let Some(Value::Str(text)) = function(call).get("arguments")
                && text.trim_start().starts_with('{')
                && look.shown.has_json_string(text)
            {
                pair.warn(Warning::ArgumentsAsText);
            }
            if look.has_call(i, number, call) {
                continue;
            }
            let is_all =
                !matches!(message.get("content"), Some(Value::Str(text)) if !is_blank(text));
            if i >= side.completion && is_all {
                return Err(side.lost(i, "does not print its `tool_calls`"));
            }
            pair.warn(Warning::ToolCallsDropped);
        }
        let reasoning = REASONING.iter().find_map(|name| match message.get(name) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        });
        let is_last = i + 1 == side.messages.len();
        if is_last && reasoning.is_some_and(|text| !look.shown.has(text)) {
            pair.warn(Warning::ReasoningDropped);
        }
    }
    if side.from == 0
        && let Some(tools) = renderer.tools()
    {
        let is_lost = |(i, tool): (usize, &Value<'_>)| match function(tool).get("name") {
            Some(Value::Str(name)) => {
                !look.marked()[1].has(&Marked::tool(i)) || !look.shown.has(name)
            }
            _ => false,
        };
        if tools.iter().enumerate().any(is_lost) {
            pair.warn(Warning::ToolsDropped);
        }
    }
    Ok(())
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
    let all = || prompt.iter().chain(chosen).chain(rejected);
    if !all().any(|message| only_text(message).is_some_and(|text| !text.is_empty())) {
        return;
    }
    let prints = |prompt: &[Value<'_>], side: &[Value<'_>]| {
        let messages: Vec<&Value<'_>> = prompt.iter().chain(side).collect();
        renderer.try_render(&messages).is_some_and(|text| {
            let look = Look::new(&messages, &text, renderer);
            (0..messages.len()).all(|i| matches!(look.loss(i), None | Some(Loss::Thoughts)))
        })
    };
    if prints(prompt, chosen) && prints(prompt, rejected) {
        return;
    }
    let string = |message: &Value<'_>| match only_text(message) {
        Some(text) => with_field(message, "content", |_| Value::Str(text.into())).into_owned(),
        None => message.clone().into_owned(),
    };
    let strings = |messages: &[Value<'_>]| messages.iter().map(string).collect::<Vec<_>>();
    let [prompt, chosen, rejected] = [prompt, chosen, rejected].map(|turns| strings(turns));
    if prints(&prompt, &chosen) && prints(&prompt, &rejected) {
        (parts.prompt, parts.chosen, parts.rejected) = (prompt, chosen, rejected);
    }
}
