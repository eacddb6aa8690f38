//! Chat templates: `transformers`' jinja2 environment, in minijinja.
//!
//! A template is code of somebody else: each render has fuel and a cap on its output.

use std::fmt::Write as _;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, State, Value as Jinja};

use crate::error::{Error, Result};
use crate::read::json::Value;

/// Local time, taken once for a whole data set so that every row sees the same date.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Year, month 1..=12, day, hour, minute, second.
    pub time: [i32; 6],
    /// 0 is Monday.
    pub weekday: usize,
    /// 1..=366.
    pub yearday: i32,
}

/// Fuel of the smallest environment; each further one has twice as much, up to [`FUEL_MOST`].
const FUEL_LEAST: u64 = 100_000;
const FUEL_MOST: u64 = 10_000_000;
const FUEL_A_MESSAGE: u64 = 200;
const FUEL_BYTES: u64 = 4;
const LEVELS: usize = 8;

/// A compiled chat template.
#[derive(Debug)]
pub struct Template {
    source: String,
    /// One environment for each level of fuel: minijinja keeps the budget there.
    levels: Vec<Environment<'static>>,
}

const NAME: &str = "chat_template";

impl Template {
    /// Compiles `source`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] names what minijinja does not understand.
    pub fn new(source: &str) -> Result<Self> {
        let rewritten = rewrite_generation(source);
        let mut levels = Vec::with_capacity(LEVELS);
        for level in 0..LEVELS {
            let mut env = environment();
            env.set_fuel(Some((FUEL_LEAST << level).min(FUEL_MOST)));
            env.add_template_owned(NAME, rewritten.clone()).map_err(|e| {
                Error::Tokenizer(format!("the chat template does not compile: {}", one_line(&e)))
            })?;
            levels.push(env);
        }
        Ok(Self { source: source.to_owned(), levels })
    }

    /// The text as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders with `variables`; `messages` and `bytes` of input set the fuel, `cap` bounds the output.
    ///
    /// # Errors
    /// What the template or minijinja said, in one line.
    pub fn render(
        &self,
        variables: &[(&str, Jinja)],
        now: Now,
        messages: usize,
        bytes: usize,
        cap: usize,
    ) -> Result<String, RenderError> {
        let need = FUEL_LEAST + FUEL_A_MESSAGE * messages as u64 + bytes as u64 / FUEL_BYTES;
        let env = self
            .levels
            .iter()
            .find(|env| env.fuel().is_some_and(|fuel| fuel >= need))
            .or(self.levels.last())
            .ok_or_else(|| RenderError::Template("no environment".to_owned()))?;
        let template = env.get_template(NAME).map_err(|e| RenderError::Template(one_line(&e)))?;
        let now = [now.time.to_vec(), vec![now.weekday as i32, now.yearday]].concat();
        let now = Jinja::from(now);
        let all = variables.iter().map(|(name, value)| (*name, value.clone()));
        let context = Jinja::from_pairs(all.chain([(NOW, now)]));
        let mut out = Capped { bytes: Vec::new(), cap, full: false };
        match template.render_captured_to(context, &mut out) {
            Ok(_) => String::from_utf8(out.bytes).map_err(|e| RenderError::Template(e.to_string())),
            Err(_) if out.full => Err(RenderError::TooLong),
            Err(e) => Err(RenderError::Template(one_line(&e))),
        }
    }
}

/// Why a conversation was not rendered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RenderError {
    /// The template refused it or ran out of fuel.
    Template(String),
    /// The output would pass the cap.
    TooLong,
}

struct Capped {
    bytes: Vec<u8>,
    cap: usize,
    full: bool,
}

impl io::Write for Capped {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buf.len() > self.cap {
            self.full = true;
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn one_line(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        let _ = write!(text, ": {inner}");
        source = inner.source();
    }
    let text: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.replace(&format!(" (in {NAME}:"), " (line ")
}

/// Name of the hidden variable that carries the time.
const NOW: &str = "_dpo_ext_now";

/// Turns the training tags `{% generation %}` into a block that is always rendered.
fn rewrite_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (tag, after) = tag.split_at(end + 2);
        let inner = tag.trim_start_matches("{%").trim_end_matches("%}");
        let name = inner.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'));
        match name {
            "generation" => out.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&tag.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    // Only delimiters can make `build` fail, and those are minijinja's own.
    if let Ok(syntax) = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build() {
        env.set_syntax(syntax);
    }
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_recursion_limit(100);
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_function("raise_exception", |message: String| -> Result<Jinja, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    env.add_function("strftime_now", strftime_now);
    // jinja2: none is not iterable, a string is a sequence, and so is a mapping.
    env.add_test("iterable", |value: &Jinja| match value.kind() {
        ValueKind::None => false,
        ValueKind::String | ValueKind::Undefined => true,
        _ => value.try_iter().is_ok(),
    });
    env.add_test("sequence", |value: &Jinja| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    env
}

fn bad(message: impl Into<std::borrow::Cow<'static, str>>) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, message)
}

/// Methods of Python strings that `pycompat` lacks; the rest goes there.
fn method(
    state: &mut State,
    value: &Jinja,
    name: &str,
    args: &[Jinja],
) -> Result<Jinja, minijinja::Error> {
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

#[allow(clippy::needless_pass_by_value)] // minijinja's arguments are owned
/// Python's `json.dumps(x, ensure_ascii=, indent=, separators=, sort_keys=)`.
fn tojson(value: &Jinja, args: Rest<Jinja>, kwargs: Kwargs) -> Result<Jinja, minijinja::Error> {
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

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

fn strftime_now(state: &State, format: &str) -> Result<String, minijinja::Error> {
    let parts: Vec<i32> = state
        .lookup(NOW)
        .and_then(|now| now.try_iter().ok()?.map(|n| i32::try_from(n).ok()).collect())
        .unwrap_or_default();
    let [year, month, day, hour, minute, second, weekday, yearday] = *parts.as_slice() else {
        return Err(bad("no time is known"));
    };
    let name = |names: &[&'static str], i: i32| {
        usize::try_from(i).ok().and_then(|i| names.get(i).copied()).unwrap_or_default()
    };
    let half = match hour % 12 {
        0 => 12,
        h => h,
    };
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = rest.next();
        let plain = directive == Some('-');
        let directive = if plain { rest.next() } else { directive };
        let number = |n: i32, width: usize| {
            if plain { n.to_string() } else { format!("{n:0width$}") }
        };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(hour, 2),
            Some('I') => number(half, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(yearday, 3),
            Some('B') => name(&MONTHS, month - 1).to_owned(),
            Some('b') => name(&MONTHS, month - 1).chars().take(3).collect(),
            Some('A') => name(&DAYS, weekday).to_owned(),
            Some('a') => name(&DAYS, weekday).chars().take(3).collect(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                return Err(bad(format!("`strftime_now` does not know `%{other}`")));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// A template's view of a value.
///
/// # Errors
/// A number that 128 bits do not hold, and a float that is not finite.
pub fn to_jinja(value: &Value<'_>) -> Result<Jinja, String> {
    Ok(match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Int(n) => i64::try_from(*n).map_or_else(|_| Jinja::from(*n), Jinja::from),
        Value::Float(x) if x.is_finite() => Jinja::from(*x),
        Value::Float(_) => return Err("a number is not finite".to_owned()),
        Value::Huge(_) => return Err("a number needs more than 128 bits".to_owned()),
        Value::Str(s) => Jinja::from(s.as_ref()),
        Value::List(items) => items.iter().map(to_jinja).collect::<Result<Vec<_>, _>>()?.into(),
        Value::Object(items) => {
            let pairs: Result<Vec<(&str, Jinja)>, String> =
                items.iter().map(|(k, v)| Ok((k.as_ref(), to_jinja(v)?))).collect();
            Jinja::from_pairs(pairs?)
        }
    })
}

const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message as the template sees it: `transformers` fills the usual names for a message's reasoning.
///
/// # Errors
/// As [`to_jinja`].
pub fn message_to_jinja(message: &Value<'_>) -> Result<Jinja, String> {
    let reasoning =
        REASONING.iter().find_map(|name| message.get(name).filter(|v| **v != Value::Null)).cloned();
    match (message, reasoning) {
        (Value::Object(items), Some(reasoning)) => {
            let mut all = items.clone();
            if !items.iter().any(|(k, _)| k == "thinking") {
                all.insert(0, ("thinking".into(), reasoning.clone()));
            }
            match all.iter_mut().find(|(k, _)| k == "reasoning_content") {
                Some((_, value)) => *value = reasoning,
                None => all.push(("reasoning_content".into(), reasoning)),
            }
            to_jinja(&Value::Object(all))
        }
        _ => to_jinja(message),
    }
}
