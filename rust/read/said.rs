//! What a row says: two texts, or turns.

use std::borrow::Cow;

use super::json::Value;
use super::keys::Field;
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

impl Turns<'_> {
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
