//! The strings of messages, to be seen or changed.

use crate::read::json::Value;

/// The texts of a content: itself, those of its parts, or all of an object's.
pub(super) fn texts<'v>(content: Option<&'v Value<'_>>, see: &mut impl FnMut(&'v str)) {
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
pub(super) fn with_texts<'v>(
    content: &Value<'v>,
    change: &mut impl FnMut(&str) -> String,
) -> Value<'v> {
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
pub(super) fn text_of(part: &Value<'_>) -> Option<&'static str> {
    ["text", "content"].into_iter().find(|key| matches!(part.get(key), Some(Value::Str(_))))
}

/// All strings of a value, without keys.
pub(super) fn leaves<'v>(value: &'v Value<'_>, see: &mut impl FnMut(&'v str)) {
    match value {
        Value::Str(text) => see(text),
        Value::List(items) => items.iter().for_each(|item| leaves(item, see)),
        Value::Object(items) => items.iter().for_each(|(_, item)| leaves(item, see)),
        _ => {}
    }
}

/// The same value with its strings changed.
pub(super) fn with_leaves<'v>(
    value: &Value<'v>,
    change: &mut impl FnMut(&str) -> String,
) -> Value<'v> {
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
pub(super) fn with_field<'v>(
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

/// The calls that a message makes.
pub(super) fn calls<'v, 'a>(message: &'v Value<'a>) -> Vec<&'v Value<'a>> {
    let mut calls: Vec<_> = match message.get("tool_calls") {
        Some(Value::List(calls)) => calls.iter().collect(),
        _ => Vec::new(),
    };
    calls.extend(message.get("function_call").filter(|call| matches!(call, Value::Object(_))));
    calls
}

/// What a call or a tool says of its function.
pub(super) fn function<'v, 'a>(value: &'v Value<'a>) -> &'v Value<'a> {
    value.get("function").unwrap_or(value)
}
