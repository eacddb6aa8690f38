//! Arrow columns as rows: a view of somebody else's buffers, checked where it is read, from which values borrow text.
//!
//! Python describes each column as a tree of nodes over byte buffers. Nothing in it is trusted: an offset that points
//! outside its buffer is a bad input, text that is not UTF-8 a bad row.

use super::bad::Bad;
use super::json::{Fields, Findings, Value, parse};
use super::keys::{FIELDS, MEDIA};
use super::limits::Limits;
use super::row::Rules;
use super::text::text;
use crate::error::Reason;

/// A column, or a part of a nested one.
#[derive(Debug, Clone)]
pub struct Column<'a> {
    /// Number of values.
    pub len: usize,
    /// Values of the buffers before the first.
    pub offset: usize,
    /// One bit a value, 0 for null; absent if there is no null.
    pub validity: Option<&'a [u8]>,
    /// The values.
    pub data: Data<'a>,
}

/// The buffers of one type. Numbers are little-endian, `wide` offsets have 8 bytes and others 4.
#[derive(Debug, Clone)]
pub enum Data<'a> {
    /// Nothing but nulls.
    Null,
    /// Bits.
    Bool(&'a [u8]),
    /// Whole numbers of 1, 2, 4 or 8 bytes.
    Int {
        /// The numbers.
        bytes: &'a [u8],
        /// Bytes of each.
        width: usize,
        /// Whether they have a sign.
        signed: bool,
    },
    /// Numbers of 4 or 8 bytes.
    Float {
        /// The numbers.
        bytes: &'a [u8],
        /// Bytes of each.
        width: usize,
    },
    /// Strings.
    Text {
        /// Where each begins and ends.
        offsets: Offsets<'a>,
        /// All of them.
        bytes: &'a [u8],
        /// Each string is a JSON value.
        is_json: bool,
    },
    /// Lists.
    List {
        /// Where each begins and ends in `items`.
        offsets: Offsets<'a>,
        /// The items of all.
        items: Box<Column<'a>>,
    },
    /// Lists of one length; the items have no offset of their own.
    Fixed {
        /// The length.
        size: usize,
        /// The items of all.
        items: Box<Column<'a>>,
    },
    /// Objects of the same keys; the fields have no offset of their own.
    Struct(Vec<(String, Column<'a>)>),
    /// Objects of any keys.
    Map {
        /// Where each begins and ends in `keys` and `values`.
        offsets: Offsets<'a>,
        /// The keys of all.
        keys: Box<Column<'a>>,
        /// The values of all.
        values: Box<Column<'a>>,
    },
    /// A type that no row can use, by name.
    Other(String),
}

/// Ends of strings and lists.
#[derive(Debug, Clone, Copy)]
pub struct Offsets<'a> {
    /// Little-endian.
    pub bytes: &'a [u8],
    /// 8 bytes each instead of 4.
    pub wide: bool,
    /// What the first item counts as: items before it were cut off.
    pub base: usize,
}

/// Why there is no value: the row is bad, or the columns contradict themselves (the field, and what was found).
#[derive(Debug)]
pub enum Fault {
    /// A bad row.
    Row(Bad),
    /// A bad input.
    Input(String, String),
}

impl From<Bad> for Fault {
    fn from(bad: Bad) -> Self {
        Self::Row(bad)
    }
}

fn invalid(message: impl Into<String>) -> Fault {
    Fault::Input(String::new(), format!("invalid Arrow data: {}", message.into()))
}

fn number<const N: usize>(bytes: &[u8], i: usize) -> Option<[u8; N]> {
    let start = i.checked_mul(N)?;
    bytes.get(start..start.checked_add(N)?)?.try_into().ok()
}

impl Offsets<'_> {
    fn at(self, i: usize) -> Option<usize> {
        if self.wide {
            usize::try_from(i64::from_le_bytes(number(self.bytes, i)?)).ok()
        } else {
            usize::try_from(i32::from_le_bytes(number(self.bytes, i)?)).ok()
        }
    }

    /// Start and end of value `i`, at most `most`.
    fn range(self, i: usize, most: usize) -> Result<std::ops::Range<usize>, Fault> {
        let at = |i: usize| self.at(i)?.checked_sub(self.base);
        match (at(i), i.checked_add(1).and_then(at)) {
            (Some(start), Some(end)) if start <= end && end <= most => Ok(start..end),
            _ => Err(invalid("offsets do not rise inside their buffer")),
        }
    }
}

fn bit(bits: &[u8], i: usize) -> Result<bool, Fault> {
    match bits.get(i / 8) {
        Some(byte) => Ok(byte >> (i % 8) & 1 == 1),
        None => Err(invalid("a bitmap is too short")),
    }
}

/// What reading a row needs and finds.
struct Context<'l> {
    limits: &'l Limits,
    /// Keys of structs that hold null are kept.
    keep_nulls: bool,
    findings: Findings,
    /// List items that may still be built: lists of nulls have no buffer that would bound them.
    items_left: usize,
}

impl Context<'_> {
    fn limit(&mut self, name: &'static str, message: impl FnOnce() -> String) {
        if self.findings.limit.is_none() {
            self.findings.limit = Some((name, message()));
        }
    }
}

impl<'a> Column<'a> {
    /// Value `i`, `depth` levels below the row. Same as the value of the same object as JSON, borrowed.
    fn value(
        &'a self,
        i: usize,
        depth: usize,
        context: &mut Context<'_>,
    ) -> Result<Value<'a>, Fault> {
        let most = context.limits.max_depth;
        if depth > most {
            context.limit("max_depth", || format!("a value is nested more than {most} deep"));
            return Ok(Value::Null);
        }
        if i >= self.len {
            return Err(invalid("a column is shorter than its table"));
        }
        let Some(at) = self.offset.checked_add(i) else {
            return Err(invalid("an offset is too large"));
        };
        if let Some(validity) = self.validity
            && !bit(validity, at)?
        {
            return Ok(Value::Null);
        }
        let short = || invalid("a buffer is too short");
        match &self.data {
            Data::Null => Ok(Value::Null),
            Data::Bool(bits) => Ok(Value::Bool(bit(bits, at)?)),
            Data::Int { bytes, width, signed } => Ok(Value::Int(
                match (width, signed) {
                    (1, true) => number(bytes, at).map(|b| i128::from(i8::from_le_bytes(b))),
                    (2, true) => number(bytes, at).map(|b| i128::from(i16::from_le_bytes(b))),
                    (4, true) => number(bytes, at).map(|b| i128::from(i32::from_le_bytes(b))),
                    (8, true) => number(bytes, at).map(|b| i128::from(i64::from_le_bytes(b))),
                    (1, false) => number(bytes, at).map(|b| i128::from(u8::from_le_bytes(b))),
                    (2, false) => number(bytes, at).map(|b| i128::from(u16::from_le_bytes(b))),
                    (4, false) => number(bytes, at).map(|b| i128::from(u32::from_le_bytes(b))),
                    (8, false) => number(bytes, at).map(|b| i128::from(u64::from_le_bytes(b))),
                    _ => None,
                }
                .ok_or_else(short)?,
            )),
            Data::Float { bytes, width } => Ok(Value::Float(
                match width {
                    4 => number(bytes, at).map(|b| f64::from(f32::from_le_bytes(b))),
                    8 => number(bytes, at).map(f64::from_le_bytes),
                    _ => None,
                }
                .ok_or_else(short)?,
            )),
            Data::Text { offsets, bytes, is_json } => {
                let range = offsets.range(at, bytes.len())?;
                let text = text(bytes.get(range).unwrap_or_default())?;
                if !is_json {
                    return Ok(Value::Str(text.into()));
                }
                let (value, findings) = parse(text, context.limits)
                    .map_err(|fault| Bad::new(Reason::BadJson, "", fault.message))?;
                context.findings.duplicate =
                    context.findings.duplicate.take().or(findings.duplicate);
                context.findings.limit = context.findings.limit.take().or(findings.limit);
                Ok(value)
            }
            Data::List { offsets, items } => {
                items.list(offsets.range(at, items.len)?, depth, context)
            }
            Data::Fixed { size, items } => {
                let start = i.checked_mul(*size);
                match start.and_then(|start| Some(start..start.checked_add(*size)?)) {
                    Some(range) if range.end <= items.len => items.list(range, depth, context),
                    _ => Err(invalid("a list ends behind its items")),
                }
            }
            Data::Struct(fields) => {
                let most = context.limits.max_keys;
                if fields.len() > most {
                    context.limit("max_keys", || format!("an object has more than {most} keys"));
                }
                let mut out = Vec::with_capacity(fields.len().min(most));
                for (name, field) in fields.iter().take(most) {
                    // Where another row's struct has the key, this one has it too, and null.
                    let value = field.value(i, depth + 1, context)?;
                    if value != Value::Null || context.keep_nulls {
                        out.push((name.as_str().into(), value));
                    }
                }
                Ok(Value::Object(out))
            }
            Data::Map { offsets, keys, values } => {
                let mut range = offsets.range(at, keys.len.min(values.len))?;
                let most = context.limits.max_keys;
                if range.len() > most {
                    context.limit("max_keys", || format!("an object has more than {most} keys"));
                    range.end = range.start + most;
                }
                let mut out = Vec::with_capacity(range.len());
                for at in range {
                    let key = match keys.value(at, depth + 1, context)? {
                        Value::Str(key) => key,
                        other => {
                            let message =
                                format!("expected strings as keys, found {}", other.kind());
                            return Err(Bad::new(Reason::WrongType, "", message).into());
                        }
                    };
                    if context.findings.duplicate.is_none()
                        && out.iter().any(|(other, _)| *other == key)
                    {
                        context.findings.duplicate = Some(key.clone().into_owned());
                    }
                    out.push((key, values.value(at, depth + 1, context)?));
                }
                Ok(Value::Object(out))
            }
            Data::Other(name) => {
                let message = format!(
                    "expected text, a list, a struct or a number, found the Arrow type {name}"
                );
                Err(Bad::new(Reason::WrongType, "", message).into())
            }
        }
    }

    /// Whether value `i` is neither null nor an empty list; nothing of it is read.
    fn holds(&self, i: usize) -> bool {
        let at = self.offset.saturating_add(i);
        let is_null = self.validity.is_some_and(|validity| !bit(validity, at).unwrap_or(false));
        let is_empty = match &self.data {
            Data::Null => true,
            Data::List { offsets, items } => {
                offsets.range(at, items.len).is_ok_and(|range| range.is_empty())
            }
            Data::Fixed { size, .. } => *size == 0,
            Data::Text { offsets, bytes, .. } => {
                offsets.range(at, bytes.len()).is_ok_and(|range| range.is_empty())
            }
            _ => false,
        };
        i < self.len && !is_null && !is_empty
    }

    fn list(
        &'a self,
        mut range: std::ops::Range<usize>,
        depth: usize,
        context: &mut Context<'_>,
    ) -> Result<Value<'a>, Fault> {
        let most = context.limits.max_row_tokens;
        let allowed = most.min(context.items_left);
        if range.len() > allowed {
            context.limit("max_row_tokens", || format!("lists have more than {most} items"));
            range.end = range.start + allowed;
        }
        context.items_left -= range.len();
        range
            .map(|at| self.value(at, depth + 1, context))
            .collect::<Result<_, _>>()
            .map(Value::List)
    }
}

/// Lists of the greatest length that one row may hold.
const LISTS: usize = 8;

/// The named values of row `i`.
///
/// # Errors
/// [`Fault`], with the field's name.
pub fn fields_at<'a>(
    columns: &'a [Option<Column<'a>>],
    names: &[&str],
    i: usize,
    rules: &Rules<'_>,
) -> Result<(Fields<'a>, Findings), Fault> {
    let Rules { limits, keep_nulls, .. } = *rules;
    let items_left = limits.max_row_tokens.saturating_mul(LISTS);
    let findings = Findings::default();
    let mut context = Context { limits, keep_nulls, findings, items_left };
    let mut out = Vec::with_capacity(columns.len());
    for (slot, (column, name)) in columns.iter().zip(names).enumerate() {
        let is_media = slot < FIELDS && MEDIA.contains(name);
        if let Some(column) = column.as_ref().filter(|_| is_media) {
            out.push(Some(Value::Bool(column.holds(i))));
            continue;
        }
        let value = column.as_ref().map(|column| column.value(i, 1, &mut context)).transpose();
        out.push(value.map_err(|fault| match fault {
            Fault::Row(mut bad) => {
                bad.field.get_or_insert_with(|| (*name).to_owned());
                bad.byte = None;
                Fault::Row(bad)
            }
            Fault::Input(_, message) => Fault::Input((*name).to_owned(), message),
        })?);
    }
    Ok((out, context.findings))
}
