//! Whether a render holds what its messages say: nothing of a row goes missing in silence.

use std::cell::OnceCell;

use super::marked::Marked;
use super::outcome::{Pair, Refusal};
use super::render::Renderer;
use super::strings::{calls, function, leaves, texts, with_field};
use super::text::is_blank;
use crate::error::{Reason, Warning};
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::said::Turns;
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
    /// Where its text begins in the render, 0 if that is not known.
    pub(super) begin: usize,
    /// The first of the completion.
    pub(super) completion: usize,
    /// Names of the fields of prompt and completion.
    pub(super) names: [&'s str; 2],
    /// Turns of the prompt that its field has; the others stand in the completion's.
    pub(super) own: usize,
    /// Turns of the completion's field before the ones that are the prompt's own.
    pub(super) twice: usize,
    /// Some of the messages are spelt otherwise than those that were rendered, and print alike.
    pub(super) spelt: bool,
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

/// What an answer says behind its thoughts, which templates take out on purpose.
fn without_thoughts<'t>(message: &Value<'_>, text: &'t str) -> Option<&'t str> {
    if is_asked(message) {
        return None;
    }
    text.rsplit_once(END_OF_THOUGHT).map(|(_, said)| said)
}

/// A text without switches of thoughts, if there are some in it.
fn without_switches(text: &str) -> Option<String> {
    let has = SWITCHES.iter().any(|switch| text.contains(switch));
    has.then(|| SWITCHES.iter().fold(text.to_owned(), |text, switch| text.replace(switch, "")))
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
    /// Made when it is needed.
    marked: OnceCell<Marked>,
}

impl<'l> Look<'l> {
    /// Looks at the `messages` behind the first ones, which end before the byte `begin` of `text`.
    fn new(
        messages: &'l [&'l Value<'l>],
        from: usize,
        text: &'l str,
        begin: usize,
        renderer: &'l Renderer<'l>,
    ) -> Self {
        let mut places = Places::new(text, begin);
        let (mut has_places, mut has_short) = (true, false);
        for (i, message) in messages.iter().enumerate().skip(from) {
            let is_last = i + 1 == messages.len();
            texts(message.get("content"), &mut |text| {
                has_short |= (1..SHORT).contains(&strip(text).len());
                let said = || without_thoughts(message, text).filter(|_| !is_last);
                has_places = has_places
                    && (places.take(text) || said().is_some_and(|said| places.take(said)));
            });
        }
        has_places = has_places && (!has_short || renderer.shows_contents(messages));
        let (shown, marked) = (Shown::new(text), OnceCell::new());
        Self { messages, shown, renderer, has_places, marked }
    }

    fn marked(&self) -> &Marked {
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
        if let Some(value @ (Value::Int(_) | Value::Float(_) | Value::Bool(_))) = content {
            return (!self.shown.has_scalar(value)).then_some(Loss::Text);
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
            if !self.marked().has_content(i, count) {
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
            let is_marked = self.marked().has_call(i, number, count);
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
    if rendered.complete && !side.spelt {
        return Ok(());
    }
    // Where the end of the prompt is not known, its texts must have their places, too.
    let from = if side.begin > 0 { side.from } else { 0 };
    let look = Look::new(&side.messages, from, &rendered.text, side.begin, renderer);
    for (i, message) in side.messages.iter().enumerate().skip(side.from) {
        match look.loss(i) {
            Some(Loss::Text) => {
                let what = if reads_parts(&side.messages, renderer) {
                    "prints no `content` that is a string\nhint: give it as [{\"type\": \"text\", \"text\": ...}]"
                } else {
                    "does not print its `content`"
                };
                return Err(side.lost(i, what));
            }
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
        if i + 1 == side.messages.len() {
            let reasoning = REASONING.iter().find_map(|name| match message.get(name) {
                Some(Value::Str(text)) => Some(text),
                _ => None,
            });
            if reasoning.is_some_and(|text| !look.shown.has(text)) {
                pair.warn(Warning::ReasoningDropped);
            }
        }
    }
    if side.from == 0
        && let Some(tools) = renderer.tools()
    {
        let is_lost = |(i, tool): (usize, &Value<'_>)| match function(tool).get("name") {
            Some(Value::Str(name)) => !look.marked().has_tool(i) || !look.shown.has(name),
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

/// Of every message, whether the template does not print its content.
fn losses(messages: &[&Value<'_>], renderer: &Renderer<'_>) -> Vec<bool> {
    let Some(text) = renderer.try_render(messages) else { return vec![true; messages.len()] };
    let look = Look::new(messages, 0, &text, 0, renderer);
    (0..messages.len()).map(|i| !matches!(look.loss(i), None | Some(Loss::Thoughts))).collect()
}

/// The same message with a list of one part for a string.
fn listed<'v>(message: &Value<'v>) -> Value<'v> {
    with_field(message, "content", |content| match content {
        Value::Str(text) => Value::List(vec![Value::part(text.clone())]),
        other => other.clone(),
    })
}

/// Gives a template that reads lists of parts alone its strings as such, as processors of pictures do.
pub(super) fn in_parts(turns: &mut Turns<'_>, renderer: &Renderer<'_>) {
    if renderer.reads_parts_only() {
        let prompt = turns.prompt.iter_mut().flatten();
        for message in prompt.chain(&mut turns.chosen).chain(&mut turns.rejected) {
            *message = listed(message);
        }
    }
}

/// Whether the template prints all contents if each string is a list of one part.
fn reads_parts(messages: &[&Value<'_>], renderer: &Renderer<'_>) -> bool {
    let listed = |message: &&Value<'_>| listed(message).into_owned();
    let listed: Vec<Value<'_>> = messages.iter().map(listed).collect();
    losses(&listed.iter().collect::<Vec<_>>(), renderer).iter().all(|is_lost| !is_lost)
}

/// Joins lists of text to one string each, where the template prints that and not the lists.
pub(super) fn joined(turns: &mut Turns<'_>, renderer: &Renderer<'_>) {
    let prompt = turns.prompt.as_deref().unwrap_or_default();
    let has_text = |message: &Value<'_>| only_text(message).is_some_and(|text| !text.is_empty());
    if !prompt.iter().chain(&turns.chosen).chain(&turns.rejected).any(has_text) {
        return;
    }
    let parts = [prompt, &turns.chosen, &turns.rejected];
    let mut lost = parts.map(|messages| vec![false; messages.len()]);
    let [in_prompt, in_sides @ ..] = &mut lost;
    for (side, in_side) in parts[1..].iter().zip(in_sides) {
        let messages: Vec<&Value<'_>> = prompt.iter().chain(*side).collect();
        let places = in_prompt.iter_mut().chain(in_side);
        for (is_lost, found) in places.zip(losses(&messages, renderer)) {
            *is_lost |= found;
        }
    }
    if lost.iter().flatten().all(|is_lost| !is_lost) {
        return;
    }
    // Those alone that are lost, as others may be printed otherwise than joined; or else all.
    for all in [false, true] {
        let string = |(message, is_lost): (&Value<'_>, &bool)| match only_text(message) {
            Some(text) if all || *is_lost => {
                with_field(message, "content", |_| Value::Str(text.into())).into_owned()
            }
            _ => message.clone().into_owned(),
        };
        let mut strings = parts.iter().zip(&lost).map(|(messages, lost)| {
            messages.iter().zip(lost).map(string).collect::<Vec<Value<'_>>>()
        });
        let [Some(prompt), Some(chosen), Some(rejected)] =
            [strings.next(), strings.next(), strings.next()]
        else {
            return;
        };
        let printed = |side: &[Value<'_>]| {
            let messages: Vec<&Value<'_>> = prompt.iter().chain(side).collect();
            losses(&messages, renderer).iter().all(|is_lost| !is_lost)
        };
        if printed(&chosen) && printed(&rejected) {
            turns.prompt = turns.prompt.is_some().then_some(prompt);
            (turns.chosen, turns.rejected) = (chosen, rejected);
            return;
        }
    }
}
