//! Why a text is not JSON.

/// Why a text is not JSON, and at which byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Byte offset in the text.
    pub pos: usize,
    /// Expected, then found.
    pub message: String,
    /// A byte-order mark stands where a value should: a fault of the encoding.
    pub is_encoding: bool,
    /// The field that holds a number which is none, where that is all that is wrong.
    pub field: Option<String>,
}

impl Fault {
    /// Something else was `expected` at `pos` of `text`.
    pub(super) fn expected(text: &str, pos: usize, expected: &str) -> Self {
        let rest = text.get(pos..).unwrap_or_default();
        let found = match rest.chars().next() {
            None => "the end of the line".to_owned(),
            Some(c) => format!("`{}`", c.escape_debug()),
        };
        let is_encoding = rest.starts_with('\u{feff}');
        Self {
            pos,
            message: format!("expected {expected}, found {found}"),
            is_encoding,
            field: None,
        }
    }

    /// `message` says what was expected at `pos` of `text`, or at its end.
    pub(super) fn at(text: &str, pos: usize, message: impl Into<String>) -> Self {
        Self { pos: pos.min(text.len()), message: message.into(), is_encoding: false, field: None }
    }
}
