//! Rows of one completion and its label, read as pairs of which both sides are that completion.

use super::bad::{Bad, wrong};
use super::cell::Cell;
use super::cells::Cells;
use super::json::Value;
use super::keys::{Field, Keys};
use super::limits::Limits;
use super::turns::{is_answer, turns};
use crate::error::Reason;

const WORDS: [(&str, bool); 8] = [
    ("true", true),
    ("false", false),
    ("1", true),
    ("0", false),
    ("desirable", true),
    ("undesirable", false),
    ("chosen", true),
    ("rejected", false),
];
const EXPECTED: &str =
    "a label: a boolean, 0 or 1, or true, false, desirable, undesirable, chosen, rejected as text";
/// Characters of a wrong label that are shown.
const SHOWN: usize = 40;

/// Whether a completion is desirable.
///
/// # Errors
/// A bad row for what says neither.
pub(super) fn label(value: &Value<'_>, name: &str) -> Result<Cell, Bad> {
    let found = match value {
        Value::Bool(flag) => return Ok(Cell::Bool(*flag)),
        Value::Int(number @ (0 | 1)) => return Ok(Cell::Bool(*number == 1)),
        // Tables whose labels have gaps hold them as floats.
        Value::Float(number) if [0.0, 1.0].contains(number) => {
            return Ok(Cell::Bool(*number > 0.0));
        }
        Value::Str(text) => {
            let is = |(word, _): &&(&str, bool)| word.eq_ignore_ascii_case(text.trim());
            if let Some((_, flag)) = WORDS.iter().find(is) {
                return Ok(Cell::Bool(*flag));
            }
            let text: String = text.escape_debug().take(SHOWN).collect();
            format!("\"{text}\"")
        }
        Value::Int(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        other => return Err(wrong(name, EXPECTED, other)),
    };
    Err(Bad::new(Reason::WrongType, name, format!("expected {EXPECTED}, found {found}")))
}

/// Finds the completion, in its own field, as the last turn of a conversation or as `output` or `response`, and makes
/// it both sides.
///
/// # Errors
/// [`Bad`] for a conversation that does not end with an answer.
pub(super) fn both_sides(cells: &mut Cells<'_>, keys: &Keys, limits: &Limits) -> Result<(), Bad> {
    if !cells.has(Field::Chosen) && !cells.has(Field::ChosenIds) {
        let holds = |field: &Field| cells.has(*field) && !cells.is_empty(*field);
        let talks = [Field::Messages, Field::Conversation, Field::Conversations];
        let talk = talks.into_iter().find(holds);
        let answer = [Field::Output, Field::Response].into_iter().find(holds);
        if let Some(field) = talk {
            let name = keys.name(field);
            let mut said = turns(cells.take(field).unwrap_or(Value::Null), name, limits)?;
            let Some(last) = said.pop().filter(|last| is_answer(last) && !said.is_empty()) else {
                let message =
                    "expected the completion as the last turn behind a prompt, found none there";
                return Err(Bad::new(Reason::BadMessages, name, message));
            };
            cells.put(field, Value::List(said));
            cells.put(Field::Chosen, last);
        } else if let Some(value) = answer.and_then(|field| cells.take(field)) {
            cells.put(Field::Chosen, value);
        }
    }
    let sides = [(Field::Chosen, Field::Rejected), (Field::ChosenIds, Field::RejectedIds)];
    for (one, other) in sides {
        if let Some(value) = cells.0.get(one as usize).cloned().flatten() {
            cells.put(other, value);
        }
    }
    Ok(())
}
