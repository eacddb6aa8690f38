//! Chat templates: `transformers`' jinja2 environment, in minijinja.
//!
//! A template is code of somebody else: each render has fuel and a cap on its output.

mod clock;
mod flow;
mod json;
mod program;
mod python;
pub(crate) mod roles;

use std::fmt::Write as _;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::ValueKind;
use minijinja::{AutoEscape, Environment, ErrorKind, Value as Jinja, machinery};

use clock::strftime_now;
use json::tojson;
use program::Checks;
pub(crate) use program::concatenate;
use python::{method, trim};

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

/// What another renderer answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The text.
    Text(String),
    /// The template refuses the conversation, or is no template there either.
    Refused(String),
    /// It is not installed.
    Missing,
}

/// Renders elsewhere: given the variables as JSON, and what minijinja lacks.
pub type Fallback = Box<dyn Fn(&str, &str) -> Answer + Send + Sync>;

/// A conversation and what a template sees beside it.
#[derive(Debug, Clone, Copy)]
pub struct Conversation<'a> {
    /// Objects with a role.
    pub messages: &'a [&'a Value<'a>],
    /// `bos_token` and its like.
    pub named: &'a [(String, String)],
    /// `tools`, `documents` and the caller's own; they win over `named`.
    pub variables: &'a [(&'a str, &'a Value<'a>)],
    /// Whether to begin an answer.
    pub generation: bool,
    /// The time that the template sees.
    pub now: Now,
    /// Bounds the output, in bytes.
    pub cap: usize,
}

/// A render.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Whether it was rendered elsewhere.
    pub fallback: bool,
}

/// A compiled chat template.
pub struct Template {
    source: String,
    /// One environment for each level of fuel: minijinja keeps the budget there. Empty if minijinja cannot compile it.
    levels: Vec<Environment<'static>>,
    /// Why minijinja cannot compile it.
    broken: Option<String>,
    fallback: Option<Fallback>,
    /// Names this template in the caches of threads.
    owner: u64,
    /// What contents must keep to for a render to be a concatenation, or why none is.
    checks: std::result::Result<Checks, String>,
    /// A sample of the concatenations differed from its renders.
    disproved: AtomicBool,
}

const NAME: &str = "chat_template";

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Template {
    /// Compiles `source`. What minijinja does not understand goes to [`Self::with_fallback`]'s, or is the error of
    /// every render.
    pub fn new(source: &str) -> Self {
        // jinja2 reads every line end as `\n`.
        let lines = source.replace("\r\n", "\n").replace('\r', "\n");
        let rewritten = rewrite_generation(&lines);
        let mut levels = Vec::with_capacity(LEVELS);
        let mut broken = None;
        for level in 0..LEVELS {
            let mut env = environment();
            env.set_fuel(Some((FUEL_LEAST << level).min(FUEL_MOST)));
            if let Err(e) = env.add_template_owned(NAME, rewritten.clone()) {
                broken = Some(format!("the chat template does not compile: {}", one_line(&e)));
                break;
            }
            levels.push(env);
        }
        let owner = NEXT.fetch_add(1, Ordering::Relaxed);
        let checks = checks(&rewritten);
        Self {
            source: source.to_owned(),
            levels,
            broken,
            fallback: None,
            owner,
            checks,
            disproved: AtomicBool::new(false),
        }
    }

    /// Renders elsewhere what minijinja cannot.
    #[must_use]
    pub fn with_fallback(mut self, fallback: Fallback) -> Self {
        self.fallback = Some(fallback);
        self
    }

    /// Why renders of ordinary conversations are not concatenations, if they are not.
    pub fn refusal(&self) -> Option<&str> {
        if self.disproved.load(Ordering::Relaxed) {
            return Some("a sample of the concatenations differed from its renders");
        }
        self.checks.as_ref().err().map(String::as_str)
    }

    /// The text as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `conversation`. The messages and their bytes set the fuel.
    ///
    /// # Errors
    /// [`RenderError`].
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<Rendered, RenderError> {
        if let Some(construct) = &self.broken {
            return self.elsewhere(conversation, construct);
        }
        match self.render_here(conversation) {
            Ok(text) => Ok(Rendered { text, fallback: false }),
            Err(RenderError::Lacks(construct)) => self.elsewhere(conversation, &construct),
            Err(error) => Err(error),
        }
    }

    fn elsewhere(
        &self,
        conversation: &Conversation<'_>,
        construct: &str,
    ) -> Result<Rendered, RenderError> {
        let Some(fallback) = &self.fallback else {
            return Err(RenderError::Lacks(construct.to_owned()));
        };
        match fallback(&conversation.to_json()?, construct) {
            Answer::Text(text) if text.len() > conversation.cap => Err(RenderError::TooLong),
            Answer::Text(text) => Ok(Rendered { text, fallback: true }),
            Answer::Refused(_) if self.broken.is_some() => {
                Err(RenderError::Lacks(construct.to_owned()))
            }
            Answer::Refused(message) => Err(RenderError::Template(message)),
            Answer::Missing => Err(RenderError::Lacks(format!(
                "{construct}\nhint: install transformers, which can render it"
            ))),
        }
    }

    fn render_here(&self, conversation: &Conversation<'_>) -> Result<String, RenderError> {
        let Conversation { messages, named, variables, generation, now, cap } = *conversation;
        let bytes: usize = messages.iter().map(|message| message.text_bytes()).sum();
        let need = FUEL_LEAST + FUEL_A_MESSAGE * messages.len() as u64 + bytes as u64 / FUEL_BYTES;
        let env = self
            .levels
            .iter()
            .find(|env| env.fuel().is_some_and(|fuel| fuel >= need))
            .or(self.levels.last())
            .ok_or_else(|| RenderError::Template("no environment".to_owned()))?;
        let template = env.get_template(NAME).map_err(|e| RenderError::Template(one_line(&e)))?;
        let value = |field: &str, e: String| RenderError::Value(field.to_owned(), e);
        let mut all: Vec<(&str, Jinja)> = Vec::with_capacity(16);
        all.extend([("tools", Jinja::from(())), ("documents", Jinja::from(()))]);
        all.extend(named.iter().map(|(name, text)| (name.as_str(), Jinja::from(text.as_str()))));
        for (name, given) in variables {
            all.push((name, to_jinja(given).map_err(|e| value(name, e))?));
        }
        let messages: Result<Vec<_>, _> =
            messages.iter().map(|message| to_jinja(&as_seen(message))).collect();
        all.push(("messages", messages.map_err(|e| value("messages", e))?.into()));
        all.push(("add_generation_prompt", Jinja::from(generation)));
        let now = [now.time.to_vec(), vec![now.weekday as i32, now.yearday]].concat();
        all.push((NOW, Jinja::from(now)));
        let mut out = Capped { bytes: Vec::new(), cap, full: false };
        match template.render_captured_to(Jinja::from_pairs(all), &mut out) {
            Ok(_) => String::from_utf8(out.bytes).map_err(|e| RenderError::Template(e.to_string())),
            Err(_) if out.full => Err(RenderError::TooLong),
            Err(e) if is_lacking(&e) => Err(RenderError::Lacks(one_line(&e))),
            Err(e) => Err(RenderError::Template(one_line(&e))),
        }
    }
}

impl std::fmt::Debug for Template {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Template").field("source", &self.source).finish_non_exhaustive()
    }
}

impl Conversation<'_> {
    /// All variables as one JSON object, for a renderer elsewhere.
    fn to_json(self) -> Result<String, RenderError> {
        let mut all: Vec<(&str, Value<'_>)> = self
            .named
            .iter()
            .map(|(name, text)| (name.as_str(), Value::Str(text.as_str().into())))
            .collect();
        for (name, value) in self.variables {
            all.retain(|(known, _)| known != name);
            all.push((name, Value::clone(value)));
        }
        let messages = self.messages.iter().map(|message| as_seen(message).into_owned()).collect();
        all.push(("messages", Value::List(messages)));
        all.push(("add_generation_prompt", Value::Bool(self.generation)));
        let all = all.into_iter().map(|(name, value)| (name.into(), value)).collect();
        let value = to_jinja(&Value::Object(all))
            .map_err(|e| RenderError::Value("messages".to_owned(), e))?;
        json::dumps(&value).map_err(|e| RenderError::Template(one_line(&e)))
    }
}

/// Whether jinja2 could do what made minijinja fail. Methods that only fill up to a width are left out: no template
/// needs them, and there they have no bound.
fn is_lacking(error: &minijinja::Error) -> bool {
    use minijinja::ErrorKind as Kind;
    let detail = error.detail().unwrap_or_default();
    match error.kind() {
        Kind::UnknownMethod => !["center", "ljust", "rjust", "zfill", "expandtabs", "encode", "__"]
            .iter()
            .any(|name| detail.contains(name)),
        Kind::UnknownFilter | Kind::UnknownTest | Kind::UnknownFunction => true,
        Kind::InvalidOperation => {
            (detail.starts_with("tried to use % operator on unsupported types string"))
                || detail.starts_with("cannot perform a containment check")
        }
        _ => false,
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
    /// The template needs what minijinja lacks, and there is no other renderer, or it cannot do it either.
    Lacks(String),
    /// This variable has a value that no template can be given.
    Value(String, String),
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
    env.set_formatter(|out, state, value| match json::printed(value) {
        Some(text) => out.write_str(&text).map_err(minijinja::Error::from),
        None => minijinja::escape_formatter(out, state, value),
    });
    env.add_filter("string", |value: &Jinja| match json::printed(value) {
        Some(text) => Jinja::from(text),
        None if value.as_str().is_some() => value.clone(),
        None => Jinja::from(value.to_string()),
    });
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
fn to_jinja(value: &Value<'_>) -> Result<Jinja, String> {
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

/// A message as `transformers` shows it to a template: without keys that hold nothing, and with the usual names for its
/// reasoning filled in.
fn as_seen<'v>(message: &'v Value<'v>) -> std::borrow::Cow<'v, Value<'v>> {
    use std::borrow::Cow;
    let Value::Object(items) = message else { return Cow::Borrowed(message) };
    let reasoning =
        REASONING.iter().find_map(|name| message.get(name).filter(|v| **v != Value::Null)).cloned();
    if reasoning.is_none() && items.iter().all(|(_, value)| *value != Value::Null) {
        return Cow::Borrowed(message);
    }
    let mut all: Vec<_> =
        items.iter().filter(|(_, value)| *value != Value::Null).cloned().collect();
    if let Some(reasoning) = reasoning {
        if !all.iter().any(|(k, _)| k == "thinking") {
            all.insert(0, ("thinking".into(), reasoning.clone()));
        }
        match all.iter_mut().find(|(k, _)| k == "reasoning_content") {
            Some((_, value)) => *value = reasoning,
            None => all.push(("reasoning_content".into(), reasoning)),
        }
    }
    Cow::Owned(Value::Object(all))
}
