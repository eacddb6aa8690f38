//! Why one row is dropped.

use super::json::{Findings, Value};
use crate::error::{Error, Place, Reason};

/// Why one row is dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bad {
    /// What kind of fault it is.
    pub reason: Reason,
    /// The field, or the name of the limit.
    pub field: Option<String>,
    /// Byte offset inside the row's text.
    pub byte: Option<usize>,
    /// Expected, then found.
    pub message: String,
}

impl Bad {
    /// A bad row; `field` may be empty for none.
    pub fn new(reason: Reason, field: &str, message: impl Into<String>) -> Self {
        let field = (!field.is_empty()).then(|| field.to_owned());
        Self { reason, field, byte: None, message: message.into() }
    }

    /// The error of this row, which is at `place`.
    pub fn at(self, place: Place) -> Error {
        let Self { reason, message, .. } = self;
        match reason {
            Reason::Limit => Error::Limit { place, message },
            _ => Error::Data { place, reason, message },
        }
    }
}

pub(super) fn missing(name: &str) -> Bad {
    Bad::new(Reason::MissingField, name, "expected this field, found none")
}

pub(super) fn required<'a>(value: Option<Value<'a>>, name: &str) -> Result<Value<'a>, Bad> {
    value.ok_or_else(|| missing(name))
}

pub(super) fn wrong(name: &str, expected: &str, found: &Value<'_>) -> Bad {
    Bad::new(Reason::WrongType, name, format!("expected {expected}, found {}", found.kind()))
}

/// A value whose limit was noted but not acted on: the reasons before `limit` come first.
pub(super) fn check_limit(findings: &Findings) -> Result<(), Bad> {
    match &findings.limit {
        Some((name, found)) => Err(Bad::new(Reason::Limit, name, found.clone())),
        None => Ok(()),
    }
}
