//! A strict JSON scanner for one line: linear, never recursive, it borrows what it can.
//!
//! Stricter than RFC 8259 where a data set would otherwise change in silence: a key twice in one object, at any depth,
//! and a lone surrogate are found. Fields that nobody asked for are checked and not built.

mod fault;
mod scanner;
mod string;
mod value;

use crate::read::limits::Limits;
pub use fault::Fault;
pub use scanner::Findings;
use scanner::{Keys, Scanner};
pub use value::Value;

/// So many fields that nobody reads are named.
pub const MOST_UNREAD: usize = 32;

/// The values of the wanted fields, in the order of their names.
pub type Fields<'a> = Vec<Option<Value<'a>>>;

/// Reads one JSON value that fills `text`.
///
/// # Errors
/// The first [`Fault`] of the syntax.
pub fn parse<'a>(text: &'a str, limits: &Limits) -> Result<(Value<'a>, Findings), Fault> {
    let mut scanner = Scanner::new(text, limits);
    let value = scanner.value(true, 0)?;
    scanner.end()?;
    Ok((value, scanner.findings))
}

/// The top fields of a line that hold text and have none of these names.
pub fn other_texts(text: &str, wanted: &[&str], limits: &Limits) -> Vec<String> {
    match parse(text, limits) {
        Ok((Value::Object(items), _)) => items
            .into_iter()
            .filter(|(key, value)| {
                matches!(value, Value::Str(_)) && !wanted.contains(&key.as_ref())
            })
            .map(|(key, _)| key.into_owned())
            .collect(),
        _ => Vec::new(),
    }
}

/// Where the first value of `text` ends, behind which there may be anything.
///
/// # Errors
/// The byte of the first fault of the syntax.
pub(super) fn extent(text: &str, limits: &Limits) -> Result<usize, usize> {
    let mut scanner = Scanner::new(text, limits);
    match scanner.value(false, 0) {
        Ok(_) => Ok(scanner.pos),
        Err(fault) => Err(fault.pos),
    }
}

/// Reads a line that should be an object, and builds only the fields that `wanted` names.
///
/// Returns `Ok(None)` for valid JSON that is no object.
///
/// # Errors
/// The first [`Fault`] of the syntax.
pub fn parse_fields<'a>(
    text: &'a str,
    wanted: &[&str],
    limits: &Limits,
) -> Result<(Option<Fields<'a>>, Findings), Fault> {
    let mut scanner = Scanner::new(text, limits);
    scanner.space();
    if scanner.peek() != Some(b'{') {
        scanner.value(false, 0)?;
        scanner.end()?;
        return Ok((None, scanner.findings));
    }
    scanner.pos += 1;
    let mut found: Vec<Option<Value<'a>>> = wanted.iter().map(|_| None).collect();
    let mut keys = Keys::new();
    scanner.space();
    if scanner.peek() == Some(b'}') {
        scanner.pos += 1;
    } else {
        loop {
            let key = scanner.key()?;
            let slot = wanted.iter().position(|name| *name == key);
            let name = key.clone();
            scanner.note_key(&mut keys, key);
            scanner.space();
            if slot.is_none()
                && scanner.begins_text()
                && scanner.findings.unread.len() < MOST_UNREAD
            {
                scanner.findings.unread.push(name.to_string());
            }
            let value = scanner.value(slot.is_some(), 1).map_err(|fault| {
                // In a field that is read the first one is the fault.
                let found = slot.is_some() && scanner.non_finite.is_some();
                Fault { field: found.then(|| name.to_string()), ..fault }
            })?;
            if scanner.non_finite.take().is_some() && scanner.findings.non_finite.is_none() {
                scanner.findings.non_finite = Some(name.into_owned());
            }
            if let Some(slot) = slot
                && let Some(place) = found.get_mut(slot)
                && place.is_none()
            {
                *place = Some(value);
            }
            if scanner.next_item(b'}')? {
                break;
            }
        }
    }
    scanner.end()?;
    Ok((Some(found), scanner.findings))
}
