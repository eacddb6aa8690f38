//! What a row says: two texts, or turns.

use std::borrow::Cow;

use super::json::Value;
use super::keys::Field;
use super::weights;
use crate::error::Warning;

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

/// What a row says: two texts, or turns.
pub(super) enum Said<'a> {
    /// Text.
    Text(Strings<'a>),
    /// Turns.
    Turns(Turns<'a>),
}

/// The turns of a row.
#[derive(Debug, Clone)]
pub struct Turns<'a> {
    /// The turns before the answers, `None` for those that both sides begin with.
    pub prompt: Option<Vec<Value<'a>>>,
    /// Text of a turn that both sides begin with.
    pub said: Option<Cow<'a, str>>,
    /// The preferred turns.
    pub chosen: Vec<Value<'a>>,
    /// The other turns.
    pub rejected: Vec<Value<'a>>,
    /// The fields that the three come from.
    pub fields: [Field; 3],
}

impl<'a> Turns<'a> {
    /// Takes the key out of each message that weighs its content; those of the sides come back, one a message, or
    /// nothing if no message has one.
    pub fn take_weights(&mut self) -> [Vec<Option<Value<'a>>>; 2] {
        let mut turns = self.prompt.iter().flatten().chain(&self.chosen).chain(&self.rejected);
        if turns.all(|turn| turn.get(weights::KEY).is_none()) {
            return [Vec::new(), Vec::new()];
        }
        let mut take = |turn: &mut Value<'a>| match turn {
            Value::Object(fields) => {
                let at = fields.iter().position(|(key, _)| key == weights::KEY)?;
                Some(fields.remove(at).1).filter(|value| *value != Value::Null)
            }
            _ => None,
        };
        self.prompt.iter_mut().flatten().for_each(|turn| drop(take(turn)));
        [&mut self.chosen, &mut self.rejected].map(|side| side.iter_mut().map(&mut take).collect())
    }
}

impl Turns<'_> {
    /// The field whose messages have a part that is a picture, a film or a sound.
    pub(super) fn media(&self) -> Option<&'static str> {
        let parts = [
            (self.prompt.as_deref().unwrap_or_default(), "prompt"),
            (&self.chosen, "chosen"),
            (&self.rejected, "rejected"),
        ];
        let has = |turn: &Value<'_>| match turn.get("content") {
            Some(Value::List(parts)) => parts.iter().any(is_media),
            _ => false,
        };
        parts.into_iter().find(|(turns, _)| turns.iter().any(has)).map(|(_, name)| name)
    }

    /// Leaves those parts out.
    pub fn drop_media(&mut self) {
        let prompt = self.prompt.iter_mut().flatten();
        for turn in prompt.chain(&mut self.chosen).chain(&mut self.rejected) {
            if let Value::Object(fields) = turn
                && let Some((_, Value::List(parts))) =
                    fields.iter_mut().find(|(key, _)| key == "content")
            {
                parts.retain(|part| !is_media(part));
            }
        }
    }

    /// Puts the column `system` before everything.
    pub(super) fn begin_with(&mut self, system: &str, warned: &mut Vec<Warning>) {
        let first = self.prompt.as_ref().unwrap_or(&self.chosen).first();
        match first.filter(|turn| turn.role() == Some("system")).map(|turn| turn.get("content")) {
            Some(Some(Value::Str(text))) if text == system => {}
            Some(_) => warned.push(Warning::UnreadSystem),
            None => {
                let places = match &mut self.prompt {
                    Some(prompt) => vec![prompt],
                    None => vec![&mut self.chosen, &mut self.rejected],
                };
                for place in places {
                    place.insert(0, Value::turn("system", system.to_owned().into()));
                }
            }
        }
    }
}

/// Whether a part of a content is a picture, a film or a sound.
fn is_media(part: &Value<'_>) -> bool {
    let kinds = ["image", "video", "audio"];
    match part.get("type") {
        Some(Value::Str(kind)) => {
            kinds.iter().any(|media| kind.trim_start_matches("input_").starts_with(media))
        }
        _ => kinds.iter().any(|media| {
            let holds = |key: &str| part.get(key).is_some_and(|held| *held != Value::Null);
            holds(media) || holds(&format!("{media}_url"))
        }),
    }
}
