//! The scanner: values, keys and numbers, without recursion.

use std::borrow::Cow;
use std::collections::HashSet;

use super::fault::Fault;
use super::string::string;
use super::value::Value;
use crate::read::limits::Limits;

/// What a scan found beside the values; each is the first of its kind.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Findings {
    /// A key that occurs twice in one object.
    pub duplicate: Option<String>,
    /// An exceeded limit: its name, and what was found.
    pub limit: Option<(&'static str, String)>,
    /// Fields of text that nobody reads, of rows from memory: those of a line are looked up when asked for.
    pub others: Vec<String>,
    /// Fields of text that no layout has, as far as they are known row by row.
    pub unread: Vec<String>,
    /// The field, which nobody reads, that holds `NaN`, `Infinity` or `-Infinity`.
    pub non_finite: Option<String>,
}

/// Numbers that are none, as Python's `json.dumps` writes them.
const NON_FINITE: [&str; 3] = ["NaN", "Infinity", "-Infinity"];

pub(super) struct Keys<'a> {
    list: Vec<Cow<'a, str>>,
    set: Option<HashSet<Cow<'a, str>>>,
}

/// Keys above which an object looks them up in a hash set.
const LINEAR_KEYS: usize = 16;

impl<'a> Keys<'a> {
    pub(super) fn new() -> Self {
        Self { list: Vec::new(), set: None }
    }

    fn len(&self) -> usize {
        self.set.as_ref().map_or(self.list.len(), HashSet::len)
    }

    /// False if `key` was there already.
    fn insert(&mut self, key: Cow<'a, str>) -> bool {
        if let Some(set) = &mut self.set {
            return set.insert(key);
        }
        if self.list.contains(&key) {
            return false;
        }
        self.list.push(key);
        if self.list.len() > LINEAR_KEYS {
            self.set = Some(self.list.drain(..).collect());
        }
        true
    }
}

enum Frame<'a> {
    List(Vec<Value<'a>>),
    Object {
        keys: Keys<'a>,
        items: Vec<(Cow<'a, str>, Value<'a>)>,
        key: Cow<'a, str>,
    },
    /// Deeper than `max_depth`: only the syntax is checked.
    Deep {
        is_object: bool,
    },
}

/// The scanner over one text.
pub(super) struct Scanner<'a, 'l> {
    text: &'a str,
    pub(super) pos: usize,
    limits: &'l Limits,
    pub(super) findings: Findings,
    /// Where a number stands that is none.
    pub(super) non_finite: Option<usize>,
}

impl<'a, 'l> Scanner<'a, 'l> {
    pub(super) fn new(text: &'a str, limits: &'l Limits) -> Self {
        Self { text, pos: 0, limits, findings: Findings::default(), non_finite: None }
    }

    fn bytes(&self) -> &'a [u8] {
        self.text.as_bytes()
    }

    pub(super) fn peek(&self) -> Option<u8> {
        self.bytes().get(self.pos).copied()
    }

    /// Whether a string stands here that is not empty.
    pub(super) fn begins_text(&self) -> bool {
        let next = self.bytes().get(self.pos + 1);
        self.peek() == Some(b'"') && next.is_some_and(|byte| *byte != b'"')
    }

    pub(super) fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.pos += 1;
        }
    }

    fn fault<T>(&self, expected: &str) -> Result<T, Fault> {
        Err(Fault::expected(self.text, self.pos, expected))
    }

    fn fault_at<T>(&self, pos: usize, message: impl Into<String>) -> Result<T, Fault> {
        Err(Fault::at(self.text, pos, message))
    }

    fn limit(&mut self, name: &'static str, found: impl FnOnce() -> String) {
        if self.findings.limit.is_none() {
            self.findings.limit = Some((name, found()));
        }
    }

    pub(super) fn note_key(&mut self, keys: &mut Keys<'a>, key: Cow<'a, str>) {
        let most = self.limits.max_keys;
        if keys.len() >= most {
            self.limit("max_keys", || format!("an object has more than {most} keys"));
            return;
        }
        if self.findings.duplicate.is_some() {
            return;
        }
        let spelt = key.clone();
        if !keys.insert(key) {
            self.findings.duplicate = Some(spelt.into_owned());
        }
    }

    /// A key and its colon.
    pub(super) fn key(&mut self) -> Result<Cow<'a, str>, Fault> {
        self.space();
        if self.peek() != Some(b'"') {
            return self.fault("a key in double quotes");
        }
        let key = string(self.text, &mut self.pos)?;
        self.space();
        if self.peek() != Some(b':') {
            return self.fault("`:` after the key");
        }
        self.pos += 1;
        Ok(key)
    }

    /// True if the container ends here, false after a comma.
    pub(super) fn next_item(&mut self, close: u8) -> Result<bool, Fault> {
        self.space();
        match self.peek() {
            Some(b',') => {
                self.pos += 1;
                Ok(false)
            }
            Some(b) if b == close => {
                self.pos += 1;
                Ok(true)
            }
            _ if close == b'}' => self.fault("`,` or `}`"),
            _ => self.fault("`,` or `]`"),
        }
    }

    pub(super) fn end(&mut self) -> Result<(), Fault> {
        self.space();
        if self.peek().is_none() { Ok(()) } else { self.fault("one value on the line") }
    }

    /// One value of any kind. With `keep` false only its syntax, keys and depth are checked.
    pub(super) fn value(&mut self, keep: bool, depth: usize) -> Result<Value<'a>, Fault> {
        let mut stack: Vec<Frame<'a>> = Vec::new();
        loop {
            self.space();
            // A scalar or an empty container is done at once; an opened container goes onto the stack.
            let mut done = match self.peek() {
                Some(b'{') => {
                    self.pos += 1;
                    self.space();
                    if self.peek() == Some(b'}') {
                        self.pos += 1;
                        Some(Value::Object(Vec::new()))
                    } else {
                        self.open(&mut stack, true, depth)?;
                        None
                    }
                }
                Some(b'[') => {
                    self.pos += 1;
                    self.space();
                    if self.peek() == Some(b']') {
                        self.pos += 1;
                        Some(Value::List(Vec::new()))
                    } else {
                        self.open(&mut stack, false, depth)?;
                        None
                    }
                }
                _ => Some(self.scalar(keep)?),
            };
            // Hand each finished value to its container, which may be finished by it in turn.
            while let Some(value) = done.take() {
                let Some(frame) = stack.last_mut() else { return Ok(value) };
                let close = match frame {
                    Frame::List(items) => {
                        if keep {
                            let most = self.limits.max_row_tokens;
                            if items.len() < most {
                                items.push(value);
                            } else {
                                self.limit("max_row_tokens", || {
                                    format!("a list has more than {most} items")
                                });
                            }
                        }
                        b']'
                    }
                    Frame::Object { items, key, .. } => {
                        if keep {
                            items.push((std::mem::take(key), value));
                        }
                        b'}'
                    }
                    Frame::Deep { is_object: true } => b'}',
                    Frame::Deep { is_object: false } => b']',
                };
                if self.next_item(close)? {
                    done = Some(match stack.pop() {
                        Some(Frame::List(items)) => Value::List(items),
                        Some(Frame::Object { items, .. }) => Value::Object(items),
                        _ => Value::Null,
                    });
                } else if close == b'}' {
                    self.next_key(&mut stack)?;
                }
            }
        }
    }

    fn open(
        &mut self,
        stack: &mut Vec<Frame<'a>>,
        is_object: bool,
        depth: usize,
    ) -> Result<(), Fault> {
        let most = self.limits.max_depth;
        if depth + stack.len() >= most {
            self.limit("max_depth", || format!("a value is nested more than {most} deep"));
            stack.push(Frame::Deep { is_object });
        } else if is_object {
            stack.push(Frame::Object { keys: Keys::new(), items: Vec::new(), key: Cow::default() });
        } else {
            stack.push(Frame::List(Vec::new()));
        }
        if is_object { self.next_key(stack) } else { Ok(()) }
    }

    fn next_key(&mut self, stack: &mut [Frame<'a>]) -> Result<(), Fault> {
        let found = self.key()?;
        if let Some(Frame::Object { keys, key, .. }) = stack.last_mut() {
            self.note_key(keys, found.clone());
            *key = found;
        }
        Ok(())
    }

    fn scalar(&mut self, keep: bool) -> Result<Value<'a>, Fault> {
        match self.peek() {
            Some(b'"') => Ok(Value::Str(string(self.text, &mut self.pos)?)),
            Some(b'-' | b'N' | b'I') if self.non_finite_word().is_some() => self.not_finite(keep),
            Some(b'-' | b'0'..=b'9') => self.number(),
            _ => {
                let rest = self.text.get(self.pos..).unwrap_or_default();
                for (word, value) in [
                    ("true", Value::Bool(true)),
                    ("false", Value::Bool(false)),
                    ("null", Value::Null),
                ] {
                    if rest.starts_with(word) {
                        self.pos += word.len();
                        return Ok(value);
                    }
                }
                self.fault("a value")
            }
        }
    }

    fn non_finite_word(&self) -> Option<&'static str> {
        let rest = self.text.get(self.pos..).unwrap_or_default();
        NON_FINITE.into_iter().find(|word| rest.starts_with(word))
    }

    /// A number that is none passes where nobody reads it.
    fn not_finite(&mut self, keep: bool) -> Result<Value<'a>, Fault> {
        let word = self.non_finite_word().unwrap_or_default();
        self.non_finite = Some(self.pos);
        if keep {
            return self.fault_at(self.pos, format!("expected a finite number, found `{word}`"));
        }
        self.pos += word.len();
        Ok(Value::Null)
    }

    fn digits(&mut self) -> Result<(), Fault> {
        if !matches!(self.peek(), Some(b'0'..=b'9')) {
            return self.fault("a digit");
        }
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.pos += 1;
        }
        Ok(())
    }

    fn number(&mut self) -> Result<Value<'a>, Fault> {
        let start = self.pos;
        if self.peek() == Some(b'-') {
            self.pos += 1;
        }
        if self.peek() == Some(b'0') {
            self.pos += 1;
            if matches!(self.peek(), Some(b'0'..=b'9')) {
                return self.fault_at(
                    start,
                    "expected a number without leading zeros, found `0` and a digit",
                );
            }
        } else {
            self.digits()?;
        }
        let mut whole = true;
        if self.peek() == Some(b'.') {
            self.pos += 1;
            self.digits()?;
            whole = false;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.pos += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.pos += 1;
            }
            self.digits()?;
            whole = false;
        }
        let spelt = self.text.get(start..self.pos).unwrap_or_default();
        if whole {
            return Ok(spelt.parse().map_or(Value::Huge(Cow::Borrowed(spelt)), Value::Int));
        }
        match spelt.parse() {
            Ok(number) => Ok(Value::Float(number)),
            Err(_) => self.fault_at(start, "expected a number"),
        }
    }
}
