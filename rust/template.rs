//! Chat templates: `transformers`' jinja2 environment, in minijinja.
//!
//! A template is code of somebody else: each render has fuel and a cap on its output.

mod clock;
mod flow;
mod json;
mod program;
mod python;

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, ErrorKind, Value as Jinja, machinery};

use clock::strftime_now;
use json::tojson;
use program::Checks;
pub(crate) use program::concatenate;
use python::{method, trim};

use crate::error::{Error, Result};
use crate::read::json::Value;

/// Local time, taken once for a whole data set so that every row sees the same date.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Names this template in the caches of threads.
    owner: u64,
    /// What contents must keep to for a render to be a concatenation, or why none is.
    checks: std::result::Result<Checks, String>,
}

const NAME: &str = "chat_template";

static NEXT: AtomicU64 = AtomicU64::new(1);

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
        let owner = NEXT.fetch_add(1, Ordering::Relaxed);
        let checks = checks(&rewritten);
        Ok(Self { source: source.to_owned(), levels, owner, checks })
    }

    /// Why renders of ordinary conversations are not concatenations, if they are not.
    pub fn refusal(&self) -> Option<&str> {
        self.checks.as_ref().err().map(String::as_str)
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

fn checks(source: &str) -> std::result::Result<Checks, String> {
    let tree = machinery::parse(source, NAME, syntax()).map_err(|e| one_line(&e))?;
    let guards = flow::analyse(&tree)?;
    Checks::new(&guards).ok_or_else(|| "the template searches for private characters".to_owned())
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

fn syntax() -> SyntaxConfig {
    // Only delimiters can make `build` fail, and those are minijinja's own.
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default()
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_syntax(syntax());
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_recursion_limit(100);
    env.set_unknown_method_callback(method);
    env.add_filter("tojson", tojson);
    env.add_filter("trim", trim);
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
