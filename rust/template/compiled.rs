//! A chat template, compiled once and rendered under fuel and a cap.

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use minijinja::machinery::{self, Token};
use minijinja::{Environment, Value as Jinja};

use super::checks::Checks;
use super::clock::NOW;
use super::conversation::{Conversation, RenderError, Rendered, as_seen};
use super::flow;
use super::jinja::{
    MARKS, NAME, environment, is_lacking, mark_generation, one_line, rewrite_generation, syntax,
    to_jinja,
};
use super::literals::Literals;
use crate::fork;
use crate::read::json::Value;

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

/// A compiled chat template.
pub struct Template {
    source: String,
    /// One environment for each level of fuel: minijinja keeps the budget there. Empty if minijinja cannot compile it.
    levels: Vec<Environment<'static>>,
    /// Why minijinja cannot compile it.
    broken: Option<String>,
    fallback: Option<Fallback>,
    /// Names this template in the caches of threads.
    pub(super) owner: u64,
    /// What contents must keep to for a render to be a concatenation, or why none is.
    pub(super) checks: std::result::Result<Checks, String>,
    /// A sample of the concatenations differed from its renders.
    pub(super) disproved: AtomicBool,
    /// Found when it is first asked for.
    parts_only: OnceLock<bool>,
    /// The same template with marks around what its training tags enclose, made when it is first asked for.
    tagged: OnceLock<Option<Environment<'static>>>,
}

/// Keeps what was found, unless another thread was first. Nobody waits for the thread that finds it: in the child of a
/// fork it may not be there.
fn keep<T>(cell: &OnceLock<T>, found: T) {
    let _whole = fork::section();
    let _ = cell.set(found);
}

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
            parts_only: OnceLock::new(),
            tagged: OnceLock::new(),
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

    /// Whether minijinja compiles it.
    pub fn compiles(&self) -> bool {
        self.broken.is_none()
    }

    /// The text as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The texts that it can write by itself, and what it does to those of others.
    pub fn literals(&self) -> Literals {
        Literals::of(&self.source.replace("\r\n", "\n").replace('\r', "\n"))
    }

    /// Whether the template prints contents that are lists of parts, and none that is a string; `count` renders a
    /// user's turn and an answer of one content, and counts the text in it.
    pub(crate) fn reads_parts_only(
        &self,
        count: impl Fn(&str, Value<'_>) -> Option<usize>,
    ) -> bool {
        const TEXT: &str = "qzxkpartv";
        if let Some(known) = self.parts_only.get() {
            return *known;
        }
        // A template that refuses the probe may take another row's variables.
        let listed = count(TEXT, Value::List(vec![Value::part(TEXT.into())]));
        let Some(listed) = listed else { return false };
        let plain = count(TEXT, Value::Str(TEXT.into()));
        let found = listed == 2 && plain.unwrap_or(0) == 0;
        keep(&self.parts_only, found);
        found
    }

    /// The variables that the template reads; `None` if only another renderer knows.
    pub fn reads(&self) -> Option<HashSet<String>> {
        let env = self.levels.first()?;
        let mut names = env.get_template(NAME).ok()?.undeclared_variables(false);
        let (defaults, macros) = names_of_blocks(&self.source);
        names.extend(defaults);
        let is_given = |name: &String| env.globals().any(|(global, _)| global == name);
        let is_item = |name: &String| loop_targets(&self.source).any(|target| target == name);
        names.retain(|name| !macros.contains(name) && !is_given(name) && !is_item(name));
        Some(names)
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
            Ok(text) => Ok(Rendered { text, fallback: false, complete: false }),
            Err(RenderError::Lacks(construct)) => self.elsewhere(conversation, &construct),
            Err(error) => Err(error),
        }
    }

    /// What the training tags `{% generation %}` enclose in the render `text` of a conversation; `None` for a
    /// template without them, or one that is not rendered here.
    pub fn regions(
        &self,
        conversation: &Conversation<'_>,
        text: &str,
    ) -> Option<Vec<Range<usize>>> {
        let make = || {
            let lines = self.source.replace("\r\n", "\n").replace('\r', "\n");
            let mut env = environment();
            env.set_fuel(Some(FUEL_MOST));
            env.add_template_owned(NAME, mark_generation(&lines)?).ok()?;
            Some(env)
        };
        if self.tagged.get().is_none() {
            keep(&self.tagged, make());
        }
        let marked = Self::render_in(self.tagged.get()?.as_ref()?, conversation).ok()?;
        let (mut bare, mut regions) = (String::with_capacity(text.len()), Vec::new());
        let mut start = None;
        for c in marked.chars() {
            match (c, start) {
                (c, None) if c == MARKS[0] => start = Some(bare.len()),
                (c, Some(begin)) if c == MARKS[1] => {
                    regions.push(begin..bare.len());
                    start = None;
                }
                _ => bare.push(c),
            }
        }
        (bare == text && start.is_none()).then_some(regions)
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
            Answer::Text(text) => Ok(Rendered { text, fallback: true, complete: false }),
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
        let messages = conversation.messages;
        let bytes: usize = messages.iter().map(|message| message.text_bytes()).sum();
        let need = FUEL_LEAST + FUEL_A_MESSAGE * messages.len() as u64 + bytes as u64 / FUEL_BYTES;
        let env = self
            .levels
            .iter()
            .find(|env| env.fuel().is_some_and(|fuel| fuel >= need))
            .or(self.levels.last())
            .ok_or_else(|| RenderError::Template("no environment".to_owned()))?;
        Self::render_in(env, conversation)
    }

    fn render_in(
        env: &Environment<'_>,
        conversation: &Conversation<'_>,
    ) -> Result<String, RenderError> {
        let Conversation { messages, named, variables, generation, now, cap } = *conversation;
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

/// Names that a template sets from themselves, as it does to give a variable a default, and those of its macros.
fn names_of_blocks(source: &str) -> (HashSet<String>, HashSet<String>) {
    let source = rewrite_generation(source);
    let tokens: Vec<Token<'_>> = machinery::tokenize(&source, false, syntax())
        .map_while(|token| token.ok().map(|(token, _)| token))
        .collect();
    let (mut defaults, mut macros) = (HashSet::new(), HashSet::new());
    for block in tokens.split(|token| matches!(token, Token::BlockStart)) {
        let end = block.iter().position(|token| matches!(token, Token::BlockEnd));
        match block.get(..end.unwrap_or(block.len())) {
            Some([Token::Ident("set"), Token::Ident(name), Token::Assign, from @ ..]) => {
                let is_read = |(i, token): (usize, &Token<'_>)| {
                    let is_attribute = i > 0 && matches!(from.get(i - 1), Some(Token::Dot));
                    matches!(token, Token::Ident(read) if read == name) && !is_attribute
                };
                if from.iter().enumerate().any(is_read) {
                    defaults.insert((*name).to_owned());
                }
            }
            Some([Token::Ident("macro"), Token::Ident(name), ..]) => {
                macros.insert((*name).to_owned());
            }
            _ => {}
        }
    }
    (defaults, macros)
}

/// The names that loops give their items, which a block of a loop may set anew.
fn loop_targets(source: &str) -> impl Iterator<Item = &str> {
    source.split("{%").skip(1).flat_map(|tag| {
        let tag = tag.trim_start_matches(['-', '+']).trim_start();
        let targets = tag.strip_prefix("for ").and_then(|rest| rest.split_once(" in "));
        targets.map_or("", |(targets, _)| targets).split(',').map(str::trim)
    })
}

fn checks(source: &str) -> std::result::Result<Checks, String> {
    let tree = machinery::parse(source, NAME, syntax()).map_err(|e| one_line(&e))?;
    let guards = flow::analyse(&tree)?;
    Checks::new(&guards).ok_or_else(|| "the template searches for private characters".to_owned())
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
