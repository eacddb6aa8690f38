//! What Python's strings do and minijinja's do not.

use minijinja::value::{Kwargs, Rest};
use minijinja::{ErrorKind, State, Value as Jinja};

/// The widest indent; wider ones have no use.
const MOST_INDENT: usize = 256;

pub(super) fn bad(message: impl Into<std::borrow::Cow<'static, str>>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message)
}

/// Python's white space: Unicode's, and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `lstrip()`.
pub(super) fn trim_start(text: &str) -> &str {
    text.trim_start_matches(is_space)
}

/// Python's `rstrip()`.
pub(super) fn trim_end(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// Characters that `strip` takes away: its argument's, by default white space.
fn stripped<'t>(text: &'t str, chars: Option<&str>, start: bool, end: bool) -> &'t str {
    let gone = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(gone) } else { text };
    if end { text.trim_end_matches(gone) } else { text }
}

/// Python's `splitlines()`, which knows eleven ends of a line.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    let is_end = |c| {
        matches!(
            c,
            '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some(at) = rest.find(is_end) else { return Some(std::mem::take(&mut rest)) };
        let (line, after) = rest.split_at(at);
        let end = if after.starts_with("\r\n") {
            2
        } else {
            after.chars().next().map_or(0, char::len_utf8)
        };
        rest = after.get(end..).unwrap_or_default();
        Some(line)
    })
}

/// jinja2's filter `trim`, which is Python's `str(value).strip(chars)`.
pub(super) fn trim(value: &Jinja, chars: Option<&str>) -> String {
    match value.as_str() {
        Some(text) => stripped(text, chars, true, true).to_owned(),
        None => stripped(&value.to_string(), chars, true, true).to_owned(),
    }
}

#[allow(clippy::needless_pass_by_value)] // minijinja's arguments are owned
/// jinja2's filter `indent`, whose lines are Python's.
pub(super) fn indent(
    value: &Jinja,
    args: Rest<Jinja>,
    kwargs: Kwargs,
) -> Result<Jinja, minijinja::Error> {
    let named = |i: usize, name: &str| -> Result<Option<Jinja>, minijinja::Error> {
        match args.get(i) {
            Some(value) => Ok(Some(value.clone())),
            None => kwargs.get(name),
        }
    };
    let with = match named(0, "width")? {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(width)?.min(MOST_INDENT)),
        },
    };
    let is_set = |value: Option<Jinja>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (is_set(named(1, "first")?), is_set(named(2, "blank")?));
    kwargs.assert_all_used()?;
    let text = match value.as_str() {
        Some(text) => format!("{text}\n"),
        None => format!("{value}\n"),
    };
    let mut out = String::with_capacity(text.len());
    for (i, line) in lines(&text).enumerate() {
        if i > 0 {
            out.push('\n');
        }
        // The first line is a matter of its own.
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&with);
        }
        out.push_str(line);
    }
    Ok(Jinja::from(out))
}

/// Methods of Python strings that `pycompat` lacks; the rest goes there.
pub(super) fn method(
    state: &mut State,
    value: &Jinja,
    name: &str,
    args: &[Jinja],
) -> Result<Jinja, minijinja::Error> {
    if let (Some(text), "strip" | "lstrip" | "rstrip", [] | [_]) = (value.as_str(), name, args) {
        let chars = args.first().filter(|chars| !chars.is_none());
        if chars.is_none_or(|chars| chars.as_str().is_some()) {
            let chars = chars.and_then(Jinja::as_str);
            return Ok(Jinja::from(stripped(text, chars, name != "rstrip", name != "lstrip")));
        }
    }
    if let (Some(text), "splitlines", []) = (value.as_str(), name, args) {
        return Ok(Jinja::from(lines(text).map(Jinja::from).collect::<Vec<_>>()));
    }
    let (Some(text), Some(first)) = (value.as_str(), args.first().and_then(Jinja::as_str)) else {
        return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args);
    };
    let tuple = |parts: [&str; 3]| Jinja::from(parts.map(Jinja::from).to_vec());
    Ok(match name {
        "removeprefix" => Jinja::from(text.strip_prefix(first).unwrap_or(text)),
        "removesuffix" => Jinja::from(text.strip_suffix(first).unwrap_or(text)),
        "partition" | "rpartition" | "rsplit" if first.is_empty() => {
            return Err(bad("empty separator"));
        }
        "partition" => match text.split_once(first) {
            Some((a, b)) => tuple([a, first, b]),
            None => tuple([text, "", ""]),
        },
        "rpartition" => match text.rsplit_once(first) {
            Some((a, b)) => tuple([a, first, b]),
            None => tuple(["", "", text]),
        },
        "rsplit" => {
            let most = match args.get(1) {
                None => usize::MAX,
                Some(n) => usize::try_from(n.clone()).unwrap_or(usize::MAX),
            };
            let mut parts: Vec<Jinja> =
                text.rsplitn(most.saturating_add(1), first).map(Jinja::from).collect();
            parts.reverse();
            Jinja::from(parts)
        }
        _ => return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    })
}
