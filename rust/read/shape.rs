//! What shape the rows of a text have, by its start: lines, or one array.

use super::json::extent;
use super::limits::Limits;

/// How rows stand in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// One a line.
    Lines,
    /// As the elements of one array.
    Items,
}

const MESSAGES: [&str; 4] = ["role", "content", "from", "value"];

/// The shape of a text that begins with `head`.
///
/// # Errors
/// The line and a message for an object that spans several lines: no line of it is a row.
pub(super) fn shape(head: &[u8], limits: &Limits) -> Result<Shape, (u64, String)> {
    let bytes = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
    let bytes = std::str::from_utf8(bytes)
        .map_or_else(|e| bytes.get(..e.valid_up_to()).unwrap_or_default(), str::as_bytes);
    let whole = std::str::from_utf8(bytes).unwrap_or_default();
    let text = whole.trim_start_matches(SPACE);
    if text.starts_with('[') {
        return Ok(Shape::Items);
    }
    if !spans_lines(text, limits) {
        return Ok(Shape::Lines);
    }
    let before = whole.get(..whole.len() - text.len()).unwrap_or_default();
    let newlines = before.matches('\n').count();
    let program = match list_of_rows(text, limits) {
        Some(key) => format!(
            "its rows seem to be the list `{key}`: `jq -c '.[{}][]' FILE`",
            serde_json::Value::from(key)
        ),
        None => "`jq -c . FILE`".to_owned(),
    };
    let message = format!(
        "expected one object a line, or one array of objects, found an object over several \
         lines\nhint: {program} writes one a line"
    );
    Err((newlines as u64 + 1, message))
}

const SPACE: [char; 4] = [' ', '\t', '\n', '\r'];

/// Whether an object of `text`, the first thing in it, goes on behind its line.
///
/// A damaged line is no such object: behind it the next row begins, with which it does not go on.
fn spans_lines(text: &str, limits: &Limits) -> bool {
    let Some((first, rest)) = text.split_once('\n') else { return false };
    if !text.starts_with('{') {
        return false;
    }
    match extent(first, limits) {
        Err(at) if at >= first.trim_end_matches(SPACE).len() => {}
        _ => return false,
    }
    let start_of = |part: &str| text.len() - part.trim_start_matches(SPACE).len();
    let Err(at) = extent(text, limits) else { return true };
    let second = rest.trim_start_matches(SPACE);
    match second.split_once('\n') {
        Some((_, third)) if !third.trim_matches(SPACE).is_empty() => at > start_of(third),
        _ => at > start_of(second),
    }
}

/// The key of the object's first list of objects that are no messages.
fn list_of_rows<'a>(text: &'a str, limits: &Limits) -> Option<&'a str> {
    let mut rest = text.strip_prefix('{')?;
    loop {
        rest = rest.trim_start_matches(SPACE);
        let end = extent(rest, limits).ok()?;
        let key = rest.get(..end)?.trim_matches('"');
        rest = rest.get(end..)?.trim_start_matches(SPACE).strip_prefix(':')?;
        rest = rest.trim_start_matches(SPACE);
        if let Some(item) = rest.strip_prefix('[')
            && let Some(inner) = item.trim_start_matches(SPACE).strip_prefix('{')
        {
            let first = inner.trim_start_matches(SPACE);
            let name = first.strip_prefix('"').unwrap_or(first);
            if !MESSAGES.iter().any(|key| name.starts_with(key)) {
                return Some(key);
            }
        }
        let end = extent(rest, limits).ok()?;
        rest = rest.get(end..)?.trim_start_matches(SPACE).strip_prefix(',')?;
    }
}
