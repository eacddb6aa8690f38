//! Columns that are carried along because the caller named them.

use std::fmt;

use super::bad::{Bad, wrong};
use super::json::Value;
use crate::error::Reason;

/// One value of an extra column.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// A boolean.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Str(String),
}

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Booleans.
    Bool,
    /// Numbers, whole or not.
    Number,
    /// Text.
    Str,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bool => "a boolean",
            Self::Number => "a number",
            Self::Str => "a string",
        })
    }
}

impl Cell {
    /// The kind that the whole column must have.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Bool(_) => Kind::Bool,
            Self::Int(_) | Self::Float(_) => Kind::Number,
            Self::Str(_) => Kind::Str,
        }
    }
}

/// The cell of a value.
///
/// # Errors
/// A bad row for null, lists, objects, and whole numbers of more than 64 bits.
pub(super) fn cell(value: Value<'_>, name: &str) -> Result<Cell, Bad> {
    Ok(match value {
        Value::Bool(flag) => Cell::Bool(flag),
        Value::Float(number) => Cell::Float(number),
        Value::Str(text) => Cell::Str(text.into_owned()),
        Value::Int(number) => match i64::try_from(number) {
            Ok(number) => Cell::Int(number),
            Err(_) => return Err(too_big(name)),
        },
        Value::Huge(_) => return Err(too_big(name)),
        other => return Err(wrong(name, "a number, a boolean or a string", &other)),
    })
}

fn too_big(name: &str) -> Bad {
    Bad::new(
        Reason::WrongType,
        name,
        "expected a whole number of at most 64 bits, found a larger one",
    )
}
