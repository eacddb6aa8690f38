//! The layouts of rows: which fields each has, how one is found, and how it becomes a prompt and two sides.
//!
//! `docs/rows.md` shows a row of each.

use std::borrow::Cow;

use super::bad::{Bad, missing, required, wrong};
use super::cells::Cells;
use super::json::Value;
use super::keys::{Field, Keys};
use super::limits::Limits;
use super::said::{Said, Strings, Turns};
use super::turns::{answer, history, is_answer, said, turns};
use crate::error::{Reason, Warning};

/// How a row says its prompt and its two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layout {
    /// `prompt`, `chosen`, `rejected`: text, or messages.
    Explicit,
    /// `chosen`, `rejected`: whole texts or conversations that begin alike.
    Implicit,
    /// `chosen`, `rejected`, and no prompt at all.
    Completions,
    /// `prompt_ids`, `chosen_ids`, `rejected_ids`.
    Ids,
    /// `prompt`, the text of a turn that both conversations `chosen` and `rejected` have.
    UltraFeedback,
    /// `messages`, or another conversation, with one answer each in `chosen` and `rejected`.
    Messages,
    /// `conversations` of `from` and `value`, with one answer each in `chosen` and `rejected`.
    ShareGpt,
    /// `instruction`, `input`, `history`, `system`, with the texts `chosen` and `rejected`, or both in `output`.
    Alpaca,
    /// `question` or `query`, `history` and `system`, with the texts `chosen` and `rejected`.
    Question,
    /// `messages`, whose last turn is chosen, or `query` and `response`, with `rejected_response` or
    /// `rejected_messages`.
    Swift,
}

impl Layout {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Explicit,
        Self::Implicit,
        Self::Completions,
        Self::Ids,
        Self::UltraFeedback,
        Self::Messages,
        Self::ShareGpt,
        Self::Alpaca,
        Self::Question,
        Self::Swift,
    ];

    /// The name by which Python knows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Explicit => "explicit",
            Self::Implicit => "implicit",
            Self::Completions => "completions",
            Self::Ids => "ids",
            Self::UltraFeedback => "ultrafeedback",
            Self::Messages => "messages",
            Self::ShareGpt => "sharegpt",
            Self::Alpaca => "alpaca",
            Self::Question => "question",
            Self::Swift => "swift",
        }
    }

    /// The layout of a name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layout| layout.name() == name)
    }

    /// Whether its texts are put together as turns.
    pub fn makes_turns(self) -> bool {
        matches!(self, Self::Alpaca | Self::Question)
    }

    /// Whether a column `system` is the first turn. TRL's own layouts have no such column.
    fn has_system(self) -> bool {
        use Layout::{Alpaca, Messages, Question, ShareGpt, Swift};
        matches!(self, Messages | ShareGpt | Alpaca | Question | Swift)
    }
}

/// The layout of a row, from all of its fields.
pub(super) fn found(cells: &Cells<'_>, keys: &Keys) -> Layout {
    let has = |field| cells.has(field);
    let sides = has(Field::Chosen) || has(Field::Rejected);
    let ids = [Field::PromptIds, Field::ChosenIds, Field::RejectedIds];
    if ids.into_iter().all(has) || (!sides && ids.into_iter().any(has)) {
        return Layout::Ids;
    }
    if keys.prompt_required && !has(Field::Prompt) {
        return Layout::Explicit;
    }
    let swift = has(Field::RejectedResponse) || has(Field::RejectedMessages);
    let said = has(Field::Messages) || (has(Field::Query) && has(Field::Response));
    let given = has(Field::Chosen) || has(Field::ChosenResponse) || has(Field::Prompt);
    if swift && said && !given {
        return Layout::Swift;
    }
    let whole = cells.is_conversation(Field::Chosen) && cells.is_conversation(Field::Rejected);
    // A transcript repeats the question, or the turns, that stand beside it.
    let transcripts = cells.are_transcripts();
    if has(Field::Prompt) {
        let turns = !cells.is_text(Field::Chosen) && !cells.is_text(Field::Rejected) && sides;
        return match cells.text(Field::Prompt) {
            Some(text) if text.trim().is_empty() && (whole || turns) && !keys.prompt_required => {
                Layout::Implicit
            }
            Some(_) if whole => Layout::UltraFeedback,
            Some(_) if turns => Layout::Messages,
            None if !whole
                && cells.is_turns(Field::Prompt)
                && cells.has_answers()
                && !transcripts =>
            {
                Layout::Messages
            }
            _ => Layout::Explicit,
        };
    }
    let whole = whole || transcripts;
    let asks = [Field::Instruction, Field::Input, Field::Question, Field::Query];
    // Tables with rows of several layouts leave an empty list where a row has no conversation.
    let empty = cells.is_empty(Field::Messages) && asks.into_iter().any(has);
    let messages = has(Field::Messages) && !empty;
    if !whole && (messages || cells.is_turns(Field::Conversation)) {
        return Layout::Messages;
    }
    if !whole && has(Field::Conversations) {
        return Layout::ShareGpt;
    }
    let answers = sides || swift || has(Field::ChosenResponse) || cells.has_two(Field::Output);
    if !whole && answers {
        if has(Field::Instruction) {
            return Layout::Alpaca;
        }
        if has(Field::Question) || has(Field::Query) {
            return Layout::Question;
        }
        if has(Field::Input) {
            return Layout::Alpaca;
        }
    }
    // A prompt of null is none, where the sides themselves have one.
    if cells.is_there(Field::Prompt) && !whole { Layout::Explicit } else { Layout::Implicit }
}

/// The prompt and the sides of a row, which is bad without a prompt where the caller asked for one.
///
/// # Errors
/// [`Bad`] for a field that the layout needs and the row has not, or has otherwise.
pub(super) fn read<'a>(
    layout: Layout,
    needs_prompt: bool,
    cells: &mut Cells<'a>,
    keys: &Keys,
    limits: &Limits,
    warned: &mut Vec<Warning>,
) -> Result<Said<'a>, Bad> {
    let mut row = match layout {
        Layout::Explicit | Layout::Implicit | Layout::Completions | Layout::Ids => {
            trl(layout, needs_prompt, cells, keys, limits)?
        }
        Layout::UltraFeedback => ultrafeedback(cells, keys, limits).map(Said::Turns)?,
        Layout::Messages | Layout::ShareGpt => {
            messages(layout, cells, keys, limits, warned).map(Said::Turns)?
        }
        Layout::Alpaca => alpaca(cells, keys, limits).map(Said::Turns)?,
        Layout::Question => question(cells, keys, limits).map(Said::Turns)?,
        Layout::Swift => swift(cells, keys, limits).map(Said::Turns)?,
    };
    if let Some(system) = cells.take_some(Field::System) {
        match &mut row {
            Said::Turns(turns) if layout.has_system() => {
                let system = said(system, "system")?;
                if !system.is_empty() {
                    turns.begin_with(&system, warned);
                }
            }
            _ if matches!(&system, Value::Str(text) if text.is_empty()) => {}
            _ => warned.push(Warning::UnreadSystem),
        }
    }
    Ok(row)
}

/// TRL's layouts: both sides are text, or both are turns.
fn trl<'a>(
    layout: Layout,
    needs_prompt: bool,
    cells: &mut Cells<'a>,
    keys: &Keys,
    limits: &Limits,
) -> Result<Said<'a>, Bad> {
    let prompt = (layout == Layout::Explicit).then(|| cells.take(Field::Prompt)).flatten();
    let chosen = required(cells.take(Field::Chosen), &keys.chosen)?;
    let rejected = required(cells.take(Field::Rejected), &keys.rejected)?;
    if prompt.is_none() && needs_prompt {
        return Err(missing(&keys.prompt));
    }
    let is_turns = |value: &Value<'_>| {
        let names = ["role", "from", "messages", "conversations"];
        let is_turn = || names.iter().any(|name| value.get(name).is_some());
        matches!(value, Value::List(_)) || is_turn()
    };
    match (chosen, rejected) {
        (Value::Str(chosen), Value::Str(rejected)) => {
            let prompt = match prompt {
                Some(Value::Str(text)) => Some(text),
                Some(other) => {
                    return Err(wrong(&keys.prompt, "a string, as in the completions", &other));
                }
                None => (layout == Layout::Completions).then(Cow::default),
            };
            Ok(Said::Text(Strings { prompt, chosen, rejected }))
        }
        (chosen, rejected) if is_turns(&chosen) && is_turns(&rejected) => {
            let prompt = match prompt {
                Some(prompt) if is_turns(&prompt) => Some(turns(prompt, &keys.prompt, limits)?),
                Some(other) => {
                    let expected = "a list of messages, as in the completions";
                    return Err(wrong(&keys.prompt, expected, &other));
                }
                None => (layout == Layout::Completions).then(Vec::new),
            };
            let chosen = turns(chosen, &keys.chosen, limits)?;
            let rejected = turns(rejected, &keys.rejected, limits)?;
            let fields = [Field::Prompt, Field::Chosen, Field::Rejected];
            Ok(Said::Turns(Turns { prompt, said: None, chosen, rejected, fields }))
        }
        (Value::Str(_), other) => {
            Err(wrong(&keys.rejected, "a string, as in the other side", &other))
        }
        (chosen, other) if is_turns(&chosen) => {
            Err(wrong(&keys.rejected, "a list of messages, as in the other side", &other))
        }
        (other, _) => Err(wrong(&keys.chosen, "a string or a list of messages", &other)),
    }
}

fn ultrafeedback<'a>(
    cells: &mut Cells<'a>,
    keys: &Keys,
    limits: &Limits,
) -> Result<Turns<'a>, Bad> {
    let text = said(required(cells.take(Field::Prompt), &keys.prompt)?, &keys.prompt)?;
    let chosen = required(cells.take(Field::Chosen), &keys.chosen)?;
    let rejected = required(cells.take(Field::Rejected), &keys.rejected)?;
    Ok(Turns {
        prompt: None,
        said: Some(text),
        chosen: turns(chosen, &keys.chosen, limits)?,
        rejected: turns(rejected, &keys.rejected, limits)?,
        fields: [Field::Prompt, Field::Chosen, Field::Rejected],
    })
}

fn messages<'a>(
    layout: Layout,
    cells: &mut Cells<'a>,
    keys: &Keys,
    limits: &Limits,
    warned: &mut Vec<Warning>,
) -> Result<Turns<'a>, Bad> {
    let field = match layout {
        Layout::ShareGpt => Field::Conversations,
        _ if cells.has(Field::Prompt) => Field::Prompt,
        _ if !cells.has(Field::Messages) && cells.has(Field::Conversation) => Field::Conversation,
        _ => Field::Messages,
    };
    let name = keys.name(field);
    let mut prompt = match required(cells.take(field), name)? {
        Value::Str(text) if field == Field::Prompt => vec![Value::turn("user", text)],
        other => turns(other, name, limits)?,
    };
    if prompt.is_empty() {
        let message = "expected at least one message, found an empty list";
        return Err(Bad::new(Reason::BadMessages, name, message));
    }
    let (chosen, chosen_field) = side(Field::Chosen, cells, keys, limits)?;
    let (rejected, rejected_field) = side(Field::Rejected, cells, keys, limits)?;
    // Logs keep the answer that was given, as the last turn, beside the pair.
    let says = |one: &Value<'_>, other: &Value<'_>| {
        one.role() == other.role()
            && matches!((one.get("content"), other.get("content")), (Some(a), Some(b)) if a.same(b))
            && one.get("tool_calls") == other.get("tool_calls")
    };
    let given = |last: &Value<'_>| {
        [&chosen, &rejected].iter().any(|s| matches!(s.as_slice(), [one] if says(one, last)))
    };
    if prompt.len() > 1 && prompt.last().is_some_and(given) {
        prompt.pop();
        warned.push(Warning::PromptInSides);
    } else if prompt.last().is_some_and(is_answer) {
        let message = "expected a turn to be answered at the end, found an answer of neither side";
        return Err(Bad::new(Reason::BadMessages, name, message));
    }
    let fields = [field, chosen_field, rejected_field];
    Ok(Turns { prompt: Some(prompt), said: None, chosen, rejected, fields })
}

fn alpaca<'a>(cells: &mut Cells<'a>, keys: &Keys, limits: &Limits) -> Result<Turns<'a>, Bad> {
    let mut prompt = history(cells.take_some(Field::History), limits)?;
    let mut texts: Vec<Cow<'a, str>> = Vec::new();
    for field in [Field::Instruction, Field::Input] {
        if let Some(value) = cells.take_some(field) {
            texts.push(said(value, keys.name(field))?);
        }
    }
    if texts.is_empty() {
        return Err(missing("instruction"));
    }
    texts.retain(|text| !text.is_empty());
    if texts.iter().all(|text| text.trim().is_empty()) {
        return Err(no_text("instruction"));
    }
    let text = match (texts.pop(), texts.pop()) {
        (Some(input), Some(instruction)) => format!("{instruction}\n{input}").into(),
        (text, _) => text.unwrap_or_default(),
    };
    prompt.push(Value::turn("user", text));
    let sides = [Field::Chosen, Field::ChosenResponse, Field::Rejected, Field::RejectedResponse];
    if cells.has_two(Field::Output)
        && !sides.into_iter().any(|side| cells.has(side))
        && let Some(Value::List(answers)) = cells.take(Field::Output)
        && let Ok(answers) = <[Value<'a>; 2]>::try_from(answers)
    {
        let [chosen, rejected] = answers.map(|value| answer(value, "output", limits));
        let fields = [Field::Instruction, Field::Output, Field::Output];
        let (chosen, rejected) = (chosen?, rejected?);
        return Ok(Turns { prompt: Some(prompt), said: None, chosen, rejected, fields });
    }
    answered(prompt, Field::Instruction, cells, keys, limits)
}

fn question<'a>(cells: &mut Cells<'a>, keys: &Keys, limits: &Limits) -> Result<Turns<'a>, Bad> {
    let is_query = !cells.has(Field::Question) && cells.has(Field::Query);
    let field = if is_query { Field::Query } else { Field::Question };
    let mut prompt = history(cells.take_some(Field::History), limits)?;
    prompt.push(asked(field, cells, keys)?);
    answered(prompt, field, cells, keys, limits)
}

/// The turn of a field that asks.
fn asked<'a>(field: Field, cells: &mut Cells<'a>, keys: &Keys) -> Result<Value<'a>, Bad> {
    let name = keys.name(field);
    let text = said(required(cells.take(field), name)?, name)?;
    if text.trim().is_empty() { Err(no_text(name)) } else { Ok(Value::turn("user", text)) }
}

fn no_text(name: &str) -> Bad {
    Bad::new(Reason::MissingPrompt, name, "expected a prompt, found no text")
}

/// A prompt with the answers of `chosen` and `rejected`, or of the same names with `_response`.
fn answered<'a>(
    prompt: Vec<Value<'a>>,
    field: Field,
    cells: &mut Cells<'a>,
    keys: &Keys,
    limits: &Limits,
) -> Result<Turns<'a>, Bad> {
    let (chosen, chosen_field) = side(Field::Chosen, cells, keys, limits)?;
    let (rejected, rejected_field) = side(Field::Rejected, cells, keys, limits)?;
    let fields = [field, chosen_field, rejected_field];
    Ok(Turns { prompt: Some(prompt), said: None, chosen, rejected, fields })
}

/// The turns of a side, in its field or in that of the same name with `_response`.
fn side<'a>(
    usual: Field,
    cells: &mut Cells<'a>,
    keys: &Keys,
    limits: &Limits,
) -> Result<(Vec<Value<'a>>, Field), Bad> {
    let other = match usual {
        Field::Chosen => Field::ChosenResponse,
        _ => Field::RejectedResponse,
    };
    let field = if cells.has(usual) { usual } else { other };
    match cells.take_some(field) {
        Some(value) => Ok((answer(value, keys.name(field), limits)?, field)),
        None => Err(missing(keys.name(usual))),
    }
}

fn swift<'a>(cells: &mut Cells<'a>, keys: &Keys, limits: &Limits) -> Result<Turns<'a>, Bad> {
    if !cells.has(Field::Messages) && cells.has(Field::Query) {
        let mut prompt = history(cells.take_some(Field::History), limits)?;
        prompt.push(asked(Field::Query, cells, keys)?);
        let chosen =
            answer(required(cells.take(Field::Response), "response")?, "response", limits)?;
        let rejected = required(cells.take(Field::RejectedResponse), "rejected_response")?;
        let rejected = answer(rejected, "rejected_response", limits)?;
        let fields = [Field::Query, Field::Response, Field::RejectedResponse];
        return Ok(Turns { prompt: Some(prompt), said: None, chosen, rejected, fields });
    }
    let conversation = required(cells.take(Field::Messages), "messages")?;
    let mut prompt = turns(conversation, "messages", limits)?;
    if let Some(other) = cells.take_some(Field::RejectedMessages) {
        let rejected = turns(other, "rejected_messages", limits)?;
        let fields = [Field::Messages, Field::Messages, Field::RejectedMessages];
        return Ok(Turns { prompt: None, said: None, chosen: prompt, rejected, fields });
    }
    let rejected = required(cells.take(Field::RejectedResponse), "rejected_response")?;
    let rejected = answer(rejected, "rejected_response", limits)?;
    let Some(last) = prompt.pop().filter(|last| is_answer(last) && !prompt.is_empty()) else {
        let message =
            "expected the chosen answer as the last turn behind a prompt, found none there";
        return Err(Bad::new(Reason::BadMessages, "messages", message));
    };
    let fields = [Field::Messages, Field::Messages, Field::RejectedResponse];
    Ok(Turns { prompt: Some(prompt), said: None, chosen: vec![last], rejected, fields })
}
