//! Turns of a conversation as data sets write them, made messages of `role` and `content`.

use std::borrow::Cow;

use super::bad::{Bad, wrong};
use super::json::{Findings, Value, parse};
use super::limits::Limits;
use crate::error::Reason;

/// Who `from` names in `ShareGPT` and its kin, and the role of a message.
const SPEAKERS: [(&str, &str); 14] = [
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("assistant", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("system", "system"),
    ("developer", "developer"),
    ("observation", "tool"),
    ("tool", "tool"),
    ("tool_response", "tool"),
    ("function_response", "tool"),
];
/// Speakers whose turn is a call of a function, in JSON.
const CALLERS: [&str; 2] = ["function_call", "tool_call"];
/// Roles whose turns a model is asked, and does not say.
const ASKING: [&str; 10] = [
    "user",
    "human",
    "system",
    "developer",
    "tool",
    "function",
    "ipython",
    "observation",
    "environment",
    "tool_response",
];

/// Whether a turn is what the model is given, and not what it says.
pub fn is_asked(turn: &Value<'_>) -> bool {
    turn.role().is_some_and(|role| ASKING.contains(&role))
}

/// Whether a turn is the model's.
pub(super) fn is_answer(turn: &Value<'_>) -> bool {
    turn.role().is_some() && !is_asked(turn)
}

fn speaker<'v>(turn: &'v Value<'_>) -> Option<&'v str> {
    match turn.get("from") {
        Some(Value::Str(from)) if turn.get("role").is_none() => Some(from),
        _ => None,
    }
}

/// The role of whom `from` names, in capitals or not.
fn role_of(from: &str) -> Option<&'static str> {
    let named = SPEAKERS.iter().find(|(name, _)| name.eq_ignore_ascii_case(from));
    named.map(|(_, role)| *role)
}

/// Whether a value is a conversation with a turn that is no answer.
pub(super) fn is_conversation(value: &Value<'_>) -> bool {
    let asks = |turn: &Value<'_>| {
        is_asked(turn) || speaker(turn).and_then(role_of).is_some_and(|role| ASKING.contains(&role))
    };
    match value {
        Value::List(turns) => turns.iter().any(asks),
        Value::Object(_) => inside(value).is_some_and(|turns| turns.iter().any(asks)),
        _ => false,
    }
}

/// The turns of an object that holds a conversation.
fn inside<'v, 'a>(value: &'v Value<'a>) -> Option<&'v Vec<Value<'a>>> {
    match (value.get("role"), value.get("messages").or(value.get("conversations"))) {
        (None, Some(Value::List(turns))) => Some(turns),
        _ => None,
    }
}

/// The turns of a field: a list of them, one alone, or an object that holds them.
pub(super) fn turns<'a>(
    value: Value<'a>,
    name: &str,
    limits: &Limits,
) -> Result<Vec<Value<'a>>, Bad> {
    let items = match value {
        Value::List(items) => items,
        Value::Object(_) => match inside(&value) {
            Some(_) => match value {
                Value::Object(fields) => fields
                    .into_iter()
                    .find_map(|(key, value)| match value {
                        Value::List(items) if key == "messages" || key == "conversations" => {
                            Some(items)
                        }
                        _ => None,
                    })
                    .unwrap_or_default(),
                _ => Vec::new(),
            },
            None => vec![value],
        },
        other => return Err(wrong(name, "a list of messages", &other)),
    };
    if items.iter().all(|item| speaker(item).is_none()) {
        return Ok(items);
    }
    items.into_iter().enumerate().map(|(i, item)| turn(item, i + 1, name, limits)).collect()
}

/// One answer: its text, or its turns.
pub(super) fn answer<'a>(
    value: Value<'a>,
    name: &str,
    limits: &Limits,
) -> Result<Vec<Value<'a>>, Bad> {
    match value {
        Value::Str(text) => Ok(vec![Value::turn("assistant", text)]),
        Value::List(_) | Value::Object(_) => turns(value, name, limits),
        other => Err(wrong(name, "an answer: a string, a message or a list of messages", &other)),
    }
}

/// Text of a field.
pub(super) fn said<'a>(value: Value<'a>, name: &str) -> Result<Cow<'a, str>, Bad> {
    match value {
        Value::Str(text) => Ok(text),
        other => Err(wrong(name, "a string", &other)),
    }
}

/// The turns of a list of questions with their answers.
pub(super) fn history<'a>(
    value: Option<Value<'a>>,
    limits: &Limits,
) -> Result<Vec<Value<'a>>, Bad> {
    let expected = "a list of pairs, a question and its answer";
    let rounds = match value {
        None => return Ok(Vec::new()),
        Some(Value::Str(text)) if text.is_empty() => return Ok(Vec::new()),
        Some(Value::List(rounds)) => rounds,
        Some(other) => return Err(wrong("history", expected, &other)),
    };
    if rounds.iter().all(|round| matches!(round, Value::Object(_))) {
        return turns(Value::List(rounds), "history", limits);
    }
    let mut out = Vec::with_capacity(2 * rounds.len());
    for (i, round) in rounds.into_iter().enumerate() {
        let Value::List(pair) = round else {
            return Err(wrong("history", expected, &round));
        };
        let Ok([Value::Str(question), Value::Str(answer)]) = <[Value<'a>; 2]>::try_from(pair)
        else {
            let message = format!("pair {}: expected two strings", i + 1);
            return Err(Bad::new(Reason::BadMessages, "history", message));
        };
        out.push(Value::turn("user", question));
        out.push(Value::turn("assistant", answer));
    }
    Ok(out)
}

/// A message; what is no turn of `ShareGPT` stays as it is, to be refused or read elsewhere.
fn turn<'a>(
    value: Value<'a>,
    number: usize,
    name: &str,
    limits: &Limits,
) -> Result<Value<'a>, Bad> {
    let Some(from) = speaker(&value).map(str::to_owned) else { return Ok(value) };
    let bad = |message: String| {
        Bad::new(Reason::BadMessages, name, format!("message {number}: {message}"))
    };
    let Value::Object(fields) = value else { return Ok(value) };
    let mut said = None;
    let mut rest = Vec::new();
    for (key, value) in fields {
        match key.as_ref() {
            "from" => {}
            "value" => said = Some(value),
            _ => rest.push((key, value)),
        }
    }
    let Some(said) = said else { return Err(bad("expected a `value`, found none".to_owned())) };
    let mut message = if CALLERS.iter().any(|caller| caller.eq_ignore_ascii_case(&from)) {
        let calls = called(said, limits).map_err(bad)?;
        vec![
            ("role".into(), Value::Str("assistant".into())),
            ("content".into(), Value::Str("".into())),
            ("tool_calls".into(), Value::List(calls)),
        ]
    } else {
        let Some(role) = role_of(&from) else {
            let from: String = from.escape_debug().take(40).collect();
            let known: Vec<&str> = SPEAKERS.iter().map(|(name, _)| *name).collect();
            let known = known.join(", ");
            return Err(bad(format!("`from` is {from}\nhint: it may be {known}, function_call")));
        };
        vec![("role".into(), Value::Str(role.into())), ("content".into(), said)]
    };
    message.extend(rest);
    Ok(Value::Object(message))
}

/// The calls that a turn of `function_call` makes.
fn called<'a>(said: Value<'a>, limits: &Limits) -> Result<Vec<Value<'a>>, String> {
    let said = match said {
        Value::Str(text) => match parse(&text, limits) {
            Ok((value, findings)) if findings == Findings::default() => value.into_owned(),
            Ok(_) => {
                return Err("the call of a function passes a limit or has a key twice".to_owned());
            }
            Err(fault) => {
                return Err(format!("expected the call of a function in JSON: {}", fault.message));
            }
        },
        other => other,
    };
    let calls = match said {
        Value::List(calls) => calls,
        other => vec![other],
    };
    calls
        .into_iter()
        .map(|call| match (call.get("name"), call.get("function")) {
            (_, Some(Value::Object(_))) => Ok(call),
            (Some(Value::Str(_)), _) => Ok(Value::Object(vec![
                ("type".into(), Value::Str("function".into())),
                ("function".into(), call),
            ])),
            _ => Err(format!("expected a call with a `name`, found {}", call.kind())),
        })
        .collect()
}

/// What a text is.
pub(super) enum Spelt {
    /// Text.
    Text,
    /// JSON of turns.
    Turns(Value<'static>),
    /// It looks like turns and is no JSON; what was found.
    Broken(String),
}

/// Whether a text is a conversation that was stored as JSON.
pub(super) fn spelt(text: &str, limits: &Limits) -> Spelt {
    let start = text.trim_start();
    let body = start.strip_prefix('[').map_or(start, str::trim_start);
    let keys = ["role", "content", "from", "value", "messages", "conversations"];
    let quoted = |quote: char| {
        let rest = body.strip_prefix('{').map(str::trim_start);
        let key = rest.and_then(|rest| rest.strip_prefix(quote)?.split(quote).next());
        key.is_some_and(|key| keys.contains(&key))
    };
    let is_turn = |value: &Value<'_>| {
        let has = |a, b| value.get(a).is_some() && value.get(b).is_some();
        has("role", "content") || has("role", "tool_calls") || has("from", "value")
    };
    if quoted('\'') {
        let hint = "hint: json.dumps writes what is read here";
        return Spelt::Broken(format!("found turns as Python prints them, not JSON\n{hint}"));
    }
    if !quoted('"') {
        return Spelt::Text;
    }
    match parse(text, limits) {
        Ok((value, findings)) => {
            let is_turns = match &value {
                Value::List(items) => !items.is_empty() && items.iter().all(is_turn),
                other => is_turn(other) || inside(other).is_some(),
            };
            if !is_turns {
                return Spelt::Text;
            }
            if findings != Findings::default() {
                return Spelt::Broken("found turns with a key twice, or beyond a limit".to_owned());
            }
            Spelt::Turns(value.into_owned())
        }
        Err(fault) => Spelt::Broken(format!("found turns that are no JSON: {}", fault.message)),
    }
}
