//! Where a render has certain places of its contents: by private characters there, which are taken out again.

use super::render::Renderer;
use super::strings::{texts, with_field, with_texts};
use crate::read::json::Value;
use crate::template::strip;

/// Message `i` has the mark of this number, so that a template may print messages in any order.
const FIRST: u32 = 0xe000;
const MOST: usize = 0x1800;

fn mark(message: usize) -> Option<char> {
    char::from_u32(FIRST + u32::try_from(message).ok().filter(|_| message < MOST)?)
}

fn number(c: char) -> Option<usize> {
    let number = u32::from(c).checked_sub(FIRST)? as usize;
    (number < MOST).then_some(number)
}

/// The text of a content: itself, or that of its parts, one behind the other.
pub(super) fn text_of(message: &Value<'_>) -> String {
    let mut out = String::new();
    if let Some(content @ (Value::Str(_) | Value::List(_))) = message.get("content") {
        texts(Some(content), &mut |text| out.push_str(text));
    }
    out
}

/// Where a text begins and ends without the white space around it, if there is more.
pub(super) fn ends(text: &str) -> Option<[usize; 2]> {
    let inner = strip(text);
    let start = inner.as_ptr() as usize - text.as_ptr() as usize;
    (!inner.is_empty()).then_some([start, start + inner.len()])
}

/// The same message with its mark at some bytes of its text, which are sorted.
fn marked<'v>(message: &Value<'v>, mark: char, at: &[usize]) -> Value<'v> {
    let (mut at, mut before) = (at, 0);
    with_field(message, "content", |content| {
        with_texts(content, &mut |text| {
            let end = before + text.len();
            let (here, later) = at.split_at(at.partition_point(|place| *place <= end));
            let mut out = String::with_capacity(text.len() + 3 * here.len());
            let mut done = 0;
            for place in here {
                out.push_str(text.get(done..place - before).unwrap_or_default());
                out.push(mark);
                done = place - before;
            }
            out.push_str(text.get(done..).unwrap_or_default());
            (at, before) = (later, end);
            out
        })
    })
}

/// Where the render `whole` of `messages` has the bytes `at` of each message's text; `None` where the template does
/// not print texts as they are.
pub(super) fn places(
    messages: &[&Value<'_>],
    at: &[Vec<usize>],
    renderer: &Renderer<'_>,
    whole: &str,
) -> Option<Vec<Vec<usize>>> {
    if messages.len() > MOST || whole.chars().any(|c| number(c).is_some()) {
        return None;
    }
    let changed: Vec<Value<'_>> = messages
        .iter()
        .zip(at)
        .enumerate()
        .map(|(i, (message, at))| Some(marked(message, mark(i)?, at)))
        .collect::<Option<_>>()?;
    let text = renderer.try_render(&changed.iter().collect::<Vec<_>>())?;
    let mut bare = String::with_capacity(whole.len());
    let mut found = vec![Vec::new(); messages.len()];
    for c in text.chars() {
        match number(c) {
            Some(message) => found.get_mut(message)?.push(bare.len()),
            None => bare.push(c),
        }
    }
    let all = found.iter().zip(at).all(|(found, at)| found.len() == at.len());
    (all && bare == whole).then_some(found)
}
