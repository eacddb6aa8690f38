//! Python's `json.dumps`, as the filter `tojson` of `transformers`.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{ErrorKind, Value as Jinja};

use super::python::bad;

#[allow(clippy::needless_pass_by_value)] // minijinja's arguments are owned
/// Python's `json.dumps(x, ensure_ascii=, indent=, separators=, sort_keys=)`.
pub(super) fn tojson(
    value: &Jinja,
    args: Rest<Jinja>,
    kwargs: Kwargs,
) -> Result<Jinja, minijinja::Error> {
    if args.len() > 4 {
        return Err(ErrorKind::TooManyArguments.into());
    }
    let named = |i: usize, name: &str| -> Result<Option<Jinja>, minijinja::Error> {
        let value = match args.get(i) {
            Some(value) => Some(value.clone()),
            None => kwargs.get(name)?,
        };
        Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ascii = named(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = match named(1, "indent")? {
        None => None,
        Some(v) if v.as_str().is_some() => v.as_str().map(str::to_owned),
        Some(v) => Some(" ".repeat(usize::try_from(v)?.min(64))),
    };
    let (mut item, mut pair) =
        (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned());
    if let Some(separators) = named(2, "separators")? {
        let parts: Vec<Jinja> = separators.try_iter()?.collect();
        match (parts.first().and_then(Jinja::as_str), parts.get(1).and_then(Jinja::as_str)) {
            (Some(a), Some(b)) if parts.len() == 2 => (item, pair) = (a.to_owned(), b.to_owned()),
            _ => return Err(bad("`separators` must be two strings")),
        }
    }
    let sort = named(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let style = Style { ascii, indent, item, pair, sort };
    let mut out = String::new();
    dump(value, &style, 0, &mut out)?;
    Ok(Jinja::from(out))
}

/// `json.dumps(value, ensure_ascii=True)`.
pub(super) fn dumps(value: &Jinja) -> Result<String, minijinja::Error> {
    let (item, pair) = (", ".to_owned(), ": ".to_owned());
    let mut out = String::new();
    dump(value, &Style { ascii: true, indent: None, item, pair, sort: false }, 0, &mut out)?;
    Ok(out)
}

/// What stands between the quotes of a string of JSON.
pub(super) fn in_json(text: &str, ascii: bool) -> String {
    let style =
        Style { ascii, indent: None, item: String::new(), pair: String::new(), sort: false };
    let mut out = String::new();
    // Strings are always written.
    let _ = dump(&Jinja::from(text), &style, 0, &mut out);
    out.get(1..out.len().saturating_sub(1)).unwrap_or_default().to_owned()
}

/// Python's `str.isprintable` of one character: the standard library's own table, which `escape_debug` reads.
fn is_printable(c: char) -> bool {
    let after = ['a', c].iter().collect::<String>();
    c.is_ascii_graphic()
        || c == ' '
        || !after.escape_debug().to_string().starts_with("a\\u") && !c.is_control()
}

/// Python's `repr` of a string.
fn quote_python(text: &str, out: &mut String) {
    let mark = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(mark);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == mark || c == '\\' => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => {
                let _ = match u32::from(c) {
                    n @ ..0x100 => write!(out, "\\x{n:02x}"),
                    n @ ..0x1_0000 => write!(out, "\\u{n:04x}"),
                    n => write!(out, "\\U{n:08x}"),
                };
            }
        }
    }
    out.push(mark);
}

/// A value that minijinja prints otherwise than Python's `str` and `repr`, as they do: floats, and strings in lists.
pub(super) fn printed(value: &Jinja) -> Option<String> {
    fn odd(value: &Jinja, depth: usize) -> bool {
        match value.kind() {
            ValueKind::Number if !value.is_integer() => {
                f64::try_from(value.clone()).is_ok_and(|x| python_float(x) != value.to_string())
            }
            ValueKind::Undefined => depth > 0,
            ValueKind::String if depth > 0 => {
                value.as_str().is_some_and(|text| text.chars().any(|c| !is_printable(c)))
            }
            ValueKind::Seq | ValueKind::Map if depth < DEEPEST => {
                let inner = |item: Jinja| odd(&item, depth + 1);
                value.try_iter().is_ok_and(|mut items| {
                    items.any(|item| match value.kind() {
                        ValueKind::Map => value.get_item(&item).is_ok_and(inner),
                        _ => inner(item),
                    })
                })
            }
            _ => false,
        }
    }
    fn repr(value: &Jinja, out: &mut String) {
        match value.kind() {
            ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
                Ok(x) => out.push_str(&python_float(x)),
                Err(_) => out.push_str(&value.to_string()),
            },
            kind @ (ValueKind::Seq | ValueKind::Map) => {
                let tuple = value.to_string().starts_with('(');
                let (open, close) = match kind {
                    ValueKind::Map => ('{', '}'),
                    _ if tuple => ('(', ')'),
                    _ => ('[', ']'),
                };
                out.push(open);
                let mut count = 0;
                for item in value.try_iter().into_iter().flatten() {
                    if count > 0 {
                        out.push_str(", ");
                    }
                    count += 1;
                    repr(&item, out);
                    if kind == ValueKind::Map {
                        out.push_str(": ");
                        value.get_item(&item).iter().for_each(|item| repr(item, out));
                    }
                }
                if tuple && count == 1 {
                    out.push(',');
                }
                out.push(close);
            }
            ValueKind::Undefined => out.push_str("Undefined"),
            ValueKind::String => quote_python(value.as_str().unwrap_or_default(), out),
            // A list prints its only item as Python's repr.
            _ => {
                let listed = Jinja::from(vec![value.clone()]).to_string();
                out.push_str(listed.get(1..listed.len() - 1).unwrap_or_default());
            }
        }
    }
    odd(value, 0).then(|| {
        let mut out = String::new();
        repr(value, &mut out);
        out
    })
}

struct Style {
    ascii: bool,
    indent: Option<String>,
    item: String,
    pair: String,
    sort: bool,
}

impl Style {
    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    }
}

const DEEPEST: usize = 128;

fn dump(
    value: &Jinja,
    style: &Style,
    depth: usize,
    out: &mut String,
) -> Result<(), minijinja::Error> {
    if depth > DEEPEST {
        return Err(bad("nested too deep for `tojson`"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), style.ascii, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let mut empty = true;
            out.push('[');
            for item in value.try_iter()? {
                if !empty {
                    out.push_str(&style.item);
                }
                empty = false;
                style.line(depth + 1, out);
                dump(&item, style, depth + 1, out)?;
            }
            if !empty {
                style.line(depth, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            let mut keys: Vec<Jinja> = value.try_iter()?.collect();
            if style.sort {
                keys.sort_by_key(ToString::to_string);
            }
            out.push('{');
            for (i, key) in keys.iter().enumerate() {
                if i > 0 {
                    out.push_str(&style.item);
                }
                style.line(depth + 1, out);
                if let Some(text) = key.as_str() {
                    quote(text, style.ascii, out);
                } else {
                    let mut text = String::new();
                    dump(key, style, DEEPEST, &mut text)?;
                    quote(&text, style.ascii, out);
                }
                out.push_str(&style.pair);
                dump(&value.get_item(key)?, style, depth + 1, out)?;
            }
            if !keys.is_empty() {
                style.line(depth, out);
            }
            out.push('}');
        }
        kind => return Err(bad(format!("{kind} is not JSON serializable"))),
    }
    Ok(())
}

fn quote(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || (ascii && c > '~') => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// Python's `repr` of a float, as `json.dumps` writes it.
fn python_float(x: f64) -> String {
    if x.is_nan() {
        return "NaN".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    // Rust's shortest digits are Python's; only the choice of the notation differs.
    let scientific = format!("{x:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(e) if x != 0.0 && !(-4..16).contains(&e) => {
            let sign = if e < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", e.abs())
        }
        _ => {
            let plain = format!("{x}");
            if plain.contains('.') { plain } else { plain + ".0" }
        }
    }
}
