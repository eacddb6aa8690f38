//! Private characters in the place of contents, by which a render shows where each content goes.

use crate::read::json::Value;

/// A probe's content is one of these characters between two kinds of white space.
const FIRST: u32 = 0xe100;
pub(super) const MOST: usize = 0x100;
pub(super) const LEFT: char = '\u{2001}';
pub(super) const RIGHT: char = '\u{2002}';

fn probe_char(i: usize) -> Option<char> {
    char::from_u32(FIRST + u32::try_from(i).ok()?)
}

pub(super) fn probe_index(c: char) -> Option<usize> {
    let i = u32::from(c).checked_sub(FIRST)? as usize;
    (i < MOST).then_some(i)
}

pub(super) fn is_probe(c: char) -> bool {
    c == LEFT || c == RIGHT || probe_index(c).is_some()
}

/// The same messages with a probe each as content.
pub(super) fn probe(messages: &[&Value<'_>]) -> Vec<Value<'static>> {
    let one = |(i, message): (usize, &&Value<'_>)| {
        let mut message = Value::clone(message).into_owned();
        if let Value::Object(items) = &mut message
            && let Some((_, content)) = items.iter_mut().find(|(name, _)| name == "content")
        {
            let c = probe_char(i).map(String::from).unwrap_or_default();
            *content = Value::Str(format!("{LEFT}{c}{RIGHT}").into());
        }
        message
    };
    messages.iter().enumerate().map(one).collect()
}
