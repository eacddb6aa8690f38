//! Renders by concatenation, for templates that [`super::flow`] proved to be nothing else.
//!
//! The roles and the number of messages decide which literals stand around which contents. That is found once for each
//! such shape, by rendering it with contents of private characters, and kept by the thread. The first render of a shape
//! and a sample of the later ones are compared with the template's own.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::io::Write as _;
use std::sync::atomic::Ordering;

use super::compiled::Template;
use super::conversation::{Conversation, Now, RenderError, Rendered};
use super::probe::{LEFT, MOST, RIGHT, is_probe, probe, probe_index};
use super::python::{trim_end, trim_start};
use crate::read::json::Value;

/// Shapes that a thread keeps for one template, and templates.
const SHAPES: usize = 4096;
const TEMPLATES: usize = 4;

#[derive(Debug, PartialEq)]
enum Piece {
    /// This many bytes of the literals.
    Literal(usize),
    Content {
        index: usize,
        trim_start: bool,
        trim_end: bool,
    },
}

#[derive(Debug, Default)]
struct Program {
    literals: String,
    pieces: Vec<Piece>,
    /// Every content has its place.
    complete: bool,
}

impl Program {
    /// Reads a render of probes. `None` if they are not in it as they were given.
    fn read(text: &str, contents: usize) -> Option<Self> {
        let mut program = Self::default();
        let mut literal = 0;
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            let after_left = rest.strip_prefix(LEFT);
            let from = after_left.unwrap_or(rest);
            let probe = from.chars().next();
            if let (Some(index), Some(probe)) = (probe.and_then(probe_index), probe) {
                if literal > 0 {
                    program.pieces.push(Piece::Literal(literal));
                    literal = 0;
                }
                rest = from.get(probe.len_utf8()..)?;
                let after_right = rest.strip_prefix(RIGHT);
                program.pieces.push(Piece::Content {
                    index,
                    trim_start: after_left.is_none(),
                    trim_end: after_right.is_none(),
                });
                rest = after_right.unwrap_or(rest);
                continue;
            }
            if is_probe(c) {
                return None;
            }
            program.literals.push(c);
            literal += c.len_utf8();
            rest = rest.get(c.len_utf8()..)?;
        }
        if literal > 0 {
            program.pieces.push(Piece::Literal(literal));
        }
        let has = |i: usize| {
            program.pieces.iter().any(|p| matches!(p, Piece::Content { index, .. } if *index == i))
        };
        program.complete = (0..contents).all(has);
        Some(program)
    }

    fn run(&self, contents: &[&str]) -> Option<String> {
        let most = self.literals.len() + contents.iter().map(|text| text.len()).sum::<usize>();
        let mut out = String::with_capacity(most);
        let mut literals = self.literals.as_str();
        for piece in &self.pieces {
            match *piece {
                Piece::Literal(length) => {
                    let (literal, rest) = literals.split_at(length);
                    out.push_str(literal);
                    literals = rest;
                }
                Piece::Content { index, trim_start: start, trim_end: end } => {
                    let mut text = *contents.get(index)?;
                    if start {
                        text = trim_start(text);
                    }
                    if end {
                        text = trim_end(text);
                    }
                    out.push_str(text);
                }
            }
        }
        Some(out)
    }
}

/// A shape, and how often it came.
struct Shape {
    program: Option<Program>,
    uses: u64,
}

#[derive(Default)]
struct Fnv(u64);

impl std::hash::Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            let mixed = (self.0 ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.0 = mixed ^ (mixed >> 29);
        }
    }
}

struct Shapes {
    owner: u64,
    now: Now,
    map: HashMap<Vec<u8>, Shape, BuildHasherDefault<Fnv>>,
}

#[derive(Default)]
struct Cache {
    all: Vec<Shapes>,
    key: Vec<u8>,
}

impl Cache {
    /// The shapes of a template at a time, and the key of the shape that is looked for.
    fn of(&mut self, template: &Template, now: Now) -> Option<(&mut Shapes, &[u8])> {
        let Self { all, key } = self;
        let found = all.iter().position(|s| s.owner == template.owner && s.now == now);
        let at = found.unwrap_or_else(|| {
            all.truncate(TEMPLATES - 1);
            all.insert(0, Shapes { owner: template.owner, now, map: HashMap::default() });
            0
        });
        Some((all.get_mut(at)?, key))
    }
}

impl Shapes {
    /// The shape of `key`, which `make` makes of a conversation of probes.
    fn shape(&mut self, key: &[u8], make: impl FnOnce() -> Option<Program>) -> Option<&mut Shape> {
        if !self.map.contains_key(key) {
            if self.map.len() >= SHAPES {
                self.map.clear();
            }
            self.map.insert(key.to_owned(), Shape { program: make(), uses: 0 });
        }
        self.map.get_mut(key)
    }
}

thread_local! {
    // No lock: a thread of a forked child finds its own copy, whatever the parent's threads were doing.
    static CACHE: RefCell<Cache> = RefCell::default();
}

/// Appends what a template may ask of a message beside its content, and gives the content.
fn describe<'v>(message: &'v Value<'_>, key: &mut Vec<u8>) -> Option<&'v str> {
    let Value::Object(items) = message else { return None };
    let mut content = None;
    let mut role = false;
    for (name, value) in items {
        match (name.as_ref(), value) {
            ("role", Value::Str(text)) => {
                key.push(1);
                key.extend_from_slice(text.as_bytes());
                role = true;
            }
            ("content", Value::Str(text)) => {
                key.push(2);
                content = Some(text.as_ref());
            }
            (_, Value::Null) => continue, // the template does not see it
            _ => return None,
        }
        key.push(0xff); // in no UTF-8 text
    }
    key.push(0xfe);
    content.filter(|_| role)
}

/// The render of probes in the place of the contents.
fn probed(template: &Template, conversation: &Conversation<'_>) -> Option<Program> {
    let probes = probe(conversation.messages);
    let messages = &probes.iter().collect::<Vec<_>>()[..];
    let rendered = template.render(&Conversation { messages, ..*conversation }).ok()?;
    Program::read(&rendered.text, messages.len())
}

/// Whether the template prints all contents of a conversation of this shape, as far as their texts do not matter.
pub(crate) fn shows_contents(template: &Template, conversation: &Conversation<'_>) -> bool {
    let Conversation { messages, variables, generation, now, .. } = *conversation;
    if messages.len() > MOST {
        return false;
    }
    CACHE.with_borrow_mut(|cache| {
        cache.key.clear();
        cache.key.push(2 + u8::from(generation)); // shapes that are never run
        let is_plain = messages.iter().all(|m| describe(m, &mut cache.key).is_some());
        if !variables.is_empty() {
            let _ = write!(cache.key, "{variables:?}");
        }
        let Some((shapes, key)) = cache.of(template, now).filter(|_| is_plain) else {
            return false;
        };
        let shape = shapes.shape(key, || probed(template, conversation));
        shape.and_then(|shape| shape.program.as_ref()).is_some_and(|program| program.complete)
    })
}

/// The render of `messages` by concatenation, or `None` if this conversation has to be rendered.
///
/// Only the messages may differ between conversations of one template and time: there are no further variables, and the
/// named tokens are those of the tokenizer that owns the template.
pub(crate) fn concatenate(
    template: &Template,
    conversation: &Conversation<'_>,
) -> Option<Result<Rendered, RenderError>> {
    let Conversation { messages, variables, generation, now, cap, .. } = *conversation;
    if !variables.is_empty() {
        return None;
    }
    let render =
        |messages: &[&Value<'_>]| template.render(&Conversation { messages, ..*conversation });
    let checks = template.checks.as_ref().ok()?;
    if template.disproved.load(Ordering::Relaxed) {
        return None;
    }
    if messages.len() > MOST {
        return None;
    }
    CACHE.with_borrow_mut(|cache| {
        cache.key.clear();
        cache.key.push(u8::from(generation));
        let mut contents = Vec::with_capacity(messages.len());
        for message in messages {
            let content = describe(message, &mut cache.key)?;
            if !checks.hold(content) {
                return None;
            }
            contents.push(content);
        }
        let (shapes, key) = cache.of(template, now)?;
        let shape = shapes.shape(key, || probed(template, conversation))?;
        let program = shape.program.as_ref()?;
        let (text, complete) = (program.run(&contents)?, program.complete);
        if text.len() > cap {
            return Some(Err(RenderError::TooLong));
        }
        shape.uses += 1;
        if shape.uses.is_power_of_two() {
            let rendered = render(messages);
            if rendered.as_ref().map(|rendered| &rendered.text) != Ok(&text) {
                template.disproved.store(true, Ordering::Relaxed);
                return Some(rendered);
            }
        }
        Some(Ok(Rendered { text, fallback: false, complete }))
    })
}
