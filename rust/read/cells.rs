//! The fields of one row, to be looked at and taken.

use super::json::{Fields, Value};
use super::keys::{FIELDS, Field, MEDIA};
use super::turns;

/// What a text begins with that is a whole conversation.
const BEGINNINGS: [&str; 30] = [
    "Human:",
    "User:",
    "USER:",
    "Question:",
    "System:",
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|im_start|>",
    "<|start_header_id|>",
    "<|header_start|>",
    "<start_of_turn>",
    "<|user|>",
    "<|system|>",
    "<|User|>",
    "<\u{ff5c}User\u{ff5c}>",
    "[INST]",
    "### Human:",
    "### User:",
    "### System:",
    "### Instruction:",
    "Below is an instruction",
    "A chat between",
    "<|prompter|>",
    "<\u{ff5c}begin\u{2581}of\u{2581}sentence\u{ff5c}>",
    "[gMASK]",
    "<|startoftext|>",
    "<|endoftext|>",
    "[Round ",
    "### Question:",
];

/// The fields of one row.
pub(super) struct Cells<'a>(pub(super) Fields<'a>);

impl<'a> Cells<'a> {
    fn get(&self, field: Field) -> Option<&Value<'a>> {
        self.0.get(field as usize).and_then(Option::as_ref)
    }

    pub(super) fn take(&mut self, field: Field) -> Option<Value<'a>> {
        self.0.get_mut(field as usize).and_then(Option::take)
    }

    /// The same, where null counts for nothing.
    pub(super) fn take_some(&mut self, field: Field) -> Option<Value<'a>> {
        self.take(field).filter(|value| *value != Value::Null)
    }

    pub(super) fn put(&mut self, field: Field, value: Value<'a>) {
        if let Some(cell) = self.0.get_mut(field as usize) {
            *cell = Some(value);
        }
    }

    /// Whether the row has the field, be it null.
    pub(super) fn is_there(&self, field: Field) -> bool {
        self.get(field).is_some()
    }

    /// Whether the field holds something.
    pub(super) fn has(&self, field: Field) -> bool {
        self.get(field).is_some_and(|value| *value != Value::Null)
    }

    pub(super) fn text(&self, field: Field) -> Option<&str> {
        match self.get(field) {
            Some(Value::Str(text)) => Some(text),
            _ => None,
        }
    }

    pub(super) fn is_text(&self, field: Field) -> bool {
        self.text(field).is_some()
    }

    /// Whether the field holds turns, one or several.
    pub(super) fn is_turns(&self, field: Field) -> bool {
        matches!(self.get(field), Some(Value::List(_) | Value::Object(_)))
    }

    /// Whether the field holds a list of nothing.
    pub(super) fn is_empty(&self, field: Field) -> bool {
        matches!(self.get(field), Some(Value::List(items)) if items.is_empty())
    }

    /// Whether the field holds a turn that is no answer: a whole conversation.
    pub(super) fn is_conversation(&self, field: Field) -> bool {
        self.get(field).is_some_and(turns::is_conversation)
    }

    /// Whether the field holds two values, a better and a worse one.
    pub(super) fn has_two(&self, field: Field) -> bool {
        matches!(self.get(field), Some(Value::List(items)) if items.len() == 2)
    }

    /// The fields that hold something, in their order.
    pub(super) fn left(&self) -> impl Iterator<Item = usize> {
        let is_left = |cell: &Option<Value<'_>>| match cell {
            None | Some(Value::Null) => false,
            Some(Value::Str(text)) => !text.is_empty(),
            Some(Value::List(items)) => !items.is_empty(),
            Some(_) => true,
        };
        self.0.iter().enumerate().filter(move |(_, cell)| is_left(cell)).map(|(at, _)| at)
    }

    /// Whether both sides are single answers, of which one at least is no list of turns.
    pub(super) fn has_answers(&self) -> bool {
        let is_answer = |field: Field| self.is_text(field) || self.is_turns(field);
        let is_list = |field: Field| matches!(self.get(field), Some(Value::List(_)));
        let sides = [Field::Chosen, Field::Rejected];
        sides.into_iter().all(is_answer) && !sides.into_iter().all(is_list)
    }

    /// Whether both sides are texts that begin with a turn.
    pub(super) fn are_transcripts(&self) -> bool {
        let begins = |text: &str| {
            let start = text.trim_start();
            BEGINNINGS.iter().any(|marker| start.starts_with(marker))
        };
        [Field::Chosen, Field::Rejected].into_iter().all(|side| self.text(side).is_some_and(begins))
    }

    /// The name of a field with pictures, films or sounds, if there are any.
    pub(super) fn media(&self) -> Option<&'static str> {
        let cells = self.0.get(FIELDS - MEDIA.len()..FIELDS)?;
        let is_there = |cell: &Option<Value<'_>>| match cell {
            None | Some(Value::Null | Value::Bool(false)) => false,
            Some(Value::List(items)) => items.iter().any(|item| *item != Value::Null),
            Some(Value::Str(text)) => !text.is_empty(),
            Some(_) => true,
        };
        MEDIA.into_iter().zip(cells).find(|(_, cell)| is_there(cell)).map(|(name, _)| name)
    }
}
