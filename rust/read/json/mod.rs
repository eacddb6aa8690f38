//! A strict JSON scanner for one line: linear, never recursive, it borrows what it can.
//!
//! Stricter than RFC 8259 where a data set would otherwise change in silence: a key twice in one object, at any depth,
//! and a lone surrogate are found. Fields that nobody asked for are checked and not built.

use std::borrow::Cow;
use std::collections::HashSet;

use crate::read::limits::Limits;

/// A JSON value, or a Python value that looks like one.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i128),
    /// Any other number; `1e400` is infinite.
    Float(f64),
    /// A whole number that 128 bits do not hold, as it was spelt.
    Huge(Cow<'a, str>),
    /// A string.
    Str(Cow<'a, str>),
    /// An array.
    List(Vec<Value<'a>>),
    /// An object, in the order of the text.
    Object(Vec<(Cow<'a, str>, Value<'a>)>),
}

impl Value<'_> {
    /// The kind in words, for "expected ..., found ...".
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::Int(_) | Self::Float(_) | Self::Huge(_) => "a number",
            Self::Str(_) => "a string",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    /// Bytes of all strings inside, without keys.
    pub fn text_bytes(&self) -> usize {
        match self {
            Self::Str(text) => text.len(),
            Self::List(items) => items.iter().map(Self::text_bytes).sum(),
            Self::Object(items) => items.iter().map(|(_, value)| value.text_bytes()).sum(),
            _ => 0,
        }
    }

    /// The same value, borrowing nothing.
    pub fn into_owned<'b>(self) -> Value<'b> {
        let text = |s: Cow<'_, str>| Cow::Owned(s.into_owned());
        match self {
            Self::Null => Value::Null,
            Self::Bool(b) => Value::Bool(b),
            Self::Int(n) => Value::Int(n),
            Self::Float(n) => Value::Float(n),
            Self::Huge(s) => Value::Huge(text(s)),
            Self::Str(s) => Value::Str(text(s)),
            Self::List(items) => Value::List(items.into_iter().map(Value::into_owned).collect()),
            Self::Object(items) => {
                Value::Object(items.into_iter().map(|(k, v)| (text(k), v.into_owned())).collect())
            }
        }
    }

    /// The value of `key`, if this is an object that has it.
    pub fn get(&self, key: &str) -> Option<&Self> {
        match self {
            Self::Object(items) => items.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            _ => None,
        }
    }
}

/// Why a text is not JSON, and at which byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Byte offset in the text.
    pub pos: usize,
    /// Expected, then found.
    pub message: String,
    /// A byte-order mark stands where a value should: a fault of the encoding.
    pub is_encoding: bool,
}

/// What a scan found beside the values; each is the first of its kind.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Findings {
    /// A key that occurs twice in one object.
    pub duplicate: Option<String>,
    /// An exceeded limit: its name, and what was found.
    pub limit: Option<(&'static str, String)>,
}

/// The values of the wanted fields, in the order of their names.
pub type Fields<'a> = Vec<Option<Value<'a>>>;

struct Keys<'a> {
    list: Vec<Cow<'a, str>>,
    set: Option<HashSet<Cow<'a, str>>>,
}

/// Keys above which an object looks them up in a hash set.
const LINEAR_KEYS: usize = 16;

impl<'a> Keys<'a> {
    fn new() -> Self {
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
pub struct Scanner<'a, 'l> {
    text: &'a str,
    pos: usize,
    limits: &'l Limits,
    findings: Findings,
}

/// Reads one JSON value that fills `text`.
///
/// # Errors
/// The first [`Fault`] of the syntax.
pub fn parse<'a>(text: &'a str, limits: &Limits) -> Result<(Value<'a>, Findings), Fault> {
    let mut scanner = Scanner::new(text, limits);
    let value = scanner.value(true, 0)?;
    scanner.end()?;
    Ok((value, scanner.findings))
}

/// Reads a line that should be an object, and builds only the fields that `wanted` names.
///
/// Returns `Ok(None)` for valid JSON that is no object.
///
/// # Errors
/// The first [`Fault`] of the syntax.
pub fn parse_fields<'a>(
    text: &'a str,
    wanted: &[&str],
    limits: &Limits,
) -> Result<(Option<Fields<'a>>, Findings), Fault> {
    let mut scanner = Scanner::new(text, limits);
    scanner.space();
    if scanner.peek() != Some(b'{') {
        scanner.value(false, 0)?;
        scanner.end()?;
        return Ok((None, scanner.findings));
    }
    scanner.pos += 1;
    let mut found: Vec<Option<Value<'a>>> = wanted.iter().map(|_| None).collect();
    let mut keys = Keys::new();
    scanner.space();
    if scanner.peek() == Some(b'}') {
        scanner.pos += 1;
    } else {
        loop {
            let key = scanner.key()?;
            let slot = wanted.iter().position(|name| *name == key);
            scanner.note_key(&mut keys, key);
            let value = scanner.value(slot.is_some(), 1)?;
            if let Some(slot) = slot
                && let Some(place) = found.get_mut(slot)
                && place.is_none()
            {
                *place = Some(value);
            }
            if scanner.next_item(b'}')? {
                break;
            }
        }
    }
    scanner.end()?;
    Ok((Some(found), scanner.findings))
}

impl<'a, 'l> Scanner<'a, 'l> {
    fn new(text: &'a str, limits: &'l Limits) -> Self {
        Self { text, pos: 0, limits, findings: Findings::default() }
    }

    fn bytes(&self) -> &'a [u8] {
        self.text.as_bytes()
    }

    fn peek(&self) -> Option<u8> {
        self.bytes().get(self.pos).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.pos += 1;
        }
    }

    fn fault<T>(&self, expected: &str) -> Result<T, Fault> {
        let rest = self.text.get(self.pos..).unwrap_or_default();
        let found = match rest.chars().next() {
            None => "the end of the line".to_owned(),
            Some(c) => format!("`{}`", c.escape_debug()),
        };
        let is_encoding = rest.starts_with('\u{feff}');
        Err(Fault {
            pos: self.pos,
            message: format!("expected {expected}, found {found}"),
            is_encoding,
        })
    }

    fn fault_at<T>(&self, pos: usize, message: impl Into<String>) -> Result<T, Fault> {
        Err(Fault { pos: pos.min(self.text.len()), message: message.into(), is_encoding: false })
    }

    fn limit(&mut self, name: &'static str, found: impl FnOnce() -> String) {
        if self.findings.limit.is_none() {
            self.findings.limit = Some((name, found()));
        }
    }

    fn note_key(&mut self, keys: &mut Keys<'a>, key: Cow<'a, str>) {
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
    fn key(&mut self) -> Result<Cow<'a, str>, Fault> {
        self.space();
        if self.peek() != Some(b'"') {
            return self.fault("a key in double quotes");
        }
        let key = self.string()?;
        self.space();
        if self.peek() != Some(b':') {
            return self.fault("`:` after the key");
        }
        self.pos += 1;
        Ok(key)
    }

    /// True if the container ends here, false after a comma.
    fn next_item(&mut self, close: u8) -> Result<bool, Fault> {
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

    fn end(&mut self) -> Result<(), Fault> {
        self.space();
        if self.peek().is_none() { Ok(()) } else { self.fault("one value on the line") }
    }

    /// One value of any kind. With `keep` false only its syntax, keys and depth are checked.
    fn value(&mut self, keep: bool, depth: usize) -> Result<Value<'a>, Fault> {
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
                _ => Some(self.scalar()?),
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

    fn scalar(&mut self) -> Result<Value<'a>, Fault> {
        match self.peek() {
            Some(b'"') => Ok(Value::Str(self.string()?)),
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
                for word in ["NaN", "Infinity"] {
                    if rest.starts_with(word) {
                        return self
                            .fault_at(self.pos, format!("expected a value, found `{word}`"));
                    }
                }
                self.fault("a value")
            }
        }
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

    /// A string, with the scanner on its opening quote.
    fn string(&mut self) -> Result<Cow<'a, str>, Fault> {
        self.pos += 1;
        let mut start = self.pos;
        let mut built: Option<String> = None;
        loop {
            let rest = self.bytes().get(self.pos..).unwrap_or_default();
            self.pos += plain_bytes(rest);
            match self.peek() {
                Some(b'"' | b'\\') => {}
                Some(_) => return self.control(self.pos),
                None => return self.fault("`\"` at the end of the string"),
            }
            let plain = self.text.get(start..self.pos).unwrap_or_default();
            if self.peek() == Some(b'"') {
                self.pos += 1;
                return Ok(match built {
                    None => Cow::Borrowed(plain),
                    Some(mut text) => {
                        text.push_str(plain);
                        Cow::Owned(text)
                    }
                });
            }
            let text = built.get_or_insert_with(|| String::with_capacity(rest.len().min(4096)));
            text.push_str(plain);
            let c = Self::escape(self.text, &mut self.pos)?;
            text.push(c);
            start = self.pos;
        }
    }

    fn control<T>(&self, pos: usize) -> Result<T, Fault> {
        let byte = self.bytes().get(pos).copied().unwrap_or_default();
        self.fault_at(
            pos,
            format!("expected an escape, found the raw control character 0x{byte:02x}"),
        )
    }

    /// The character of one escape; `pos` is on the backslash and ends behind the escape.
    fn escape(text: &str, pos: &mut usize) -> Result<char, Fault> {
        let bytes = text.as_bytes();
        let at = *pos;
        let fault = |pos: usize, message: &str| {
            Err(Fault {
                pos: pos.min(bytes.len()),
                message: message.to_owned(),
                is_encoding: false,
            })
        };
        let kind = bytes.get(at + 1).copied();
        *pos = at + 2;
        let c = match kind {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let Some(first) = hex4(bytes, at + 2) else {
                    return fault(at, "expected four hexadecimal digits after `\\u`");
                };
                *pos = at + 6;
                let code = match first {
                    0xd800..=0xdbff => {
                        let second = match bytes.get(at + 6..at + 8) {
                            Some(b"\\u") => hex4(bytes, at + 8),
                            _ => None,
                        };
                        let Some(second @ 0xdc00..=0xdfff) = second else {
                            return fault(at, "expected a pair of surrogates, found a lone one");
                        };
                        *pos = at + 12;
                        0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
                    }
                    _ => first,
                };
                match char::from_u32(code) {
                    Some(c) => c,
                    None => return fault(at, "expected a pair of surrogates, found a lone one"),
                }
            }
            None => return fault(at + 1, "expected an escape, found the end of the line"),
            Some(_) => {
                return fault(
                    at,
                    "expected one of the escapes `\\\" \\\\ \\/ \\b \\f \\n \\r \\t \\u`",
                );
            }
        };
        Ok(c)
    }
}

/// How many bytes at the start of `bytes` mean themselves inside a string: no quote, no backslash, no control character.
///
/// Same as `take_while`, eight bytes at a time: the pieces between escapes are too short for `memchr` to pay.
fn plain_bytes(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x8080_8080_8080_8080;
    let zeros = |x: u64| x.wrapping_sub(ONES) & !x & HIGH;
    let mut at = 0;
    while let Some(eight) = bytes.get(at..).and_then(|rest| rest.first_chunk()) {
        let eight = u64::from_le_bytes(*eight);
        let quotes = zeros(eight ^ (ONES * u64::from(b'"')));
        let backslashes = zeros(eight ^ (ONES * u64::from(b'\\')));
        let controls = eight.wrapping_sub(ONES * 0x20) & !eight & HIGH;
        // A borrow can only mark bytes above one that is rightly marked, and the lowest mark is what counts.
        let special = quotes | backslashes | controls;
        if special != 0 {
            return at + special.trailing_zeros() as usize / 8;
        }
        at += 8;
    }
    let rest = bytes.get(at..).unwrap_or_default();
    at + rest.iter().take_while(|b| !matches!(b, b'"' | b'\\' | 0..0x20)).count()
}

fn hex4(bytes: &[u8], at: usize) -> Option<u32> {
    let digits = bytes.get(at..at + 4)?;
    digits.iter().try_fold(0, |n, b| Some(n * 16 + char::from(*b).to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn plain_bytes_equal_one_at_a_time(
            bytes in proptest::collection::vec(prop_oneof![8 => any::<u8>(), 1 => 0x1fu8..0x24, 1 => Just(b'\\')], 0..40),
            plain in 0usize..40,
        ) {
            let bytes = [vec![b'a'; plain], bytes].concat();
            let expected = bytes.iter().take_while(|b| !matches!(b, b'"' | b'\\' | 0..0x20)).count();
            prop_assert_eq!(plain_bytes(&bytes), expected);
        }
    }
}
