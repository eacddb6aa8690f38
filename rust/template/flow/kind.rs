//! What an expression may give.

/// A set of things that an expression may give.
pub(super) type Kind = u8;
/// Nothing of a content: decided by roles, positions and the template's own variables.
pub(super) const CLEAN: Kind = 1;
/// The list of messages, or some of them.
pub(super) const MESSAGES: Kind = 2;
/// One message.
pub(super) const MESSAGE: Kind = 4;
/// The content of a message, white space at its ends perhaps cut off.
pub(super) const CONTENT: Kind = 8;
/// Text with a whole content in it.
pub(super) const TEXT: Kind = 16;
/// A list with one content in it, and perhaps empty strings.
pub(super) const PARTS: Kind = 32;
/// A namespace.
pub(super) const SPACE: Kind = 64;

pub(super) const PRINTED: Kind = CLEAN | CONTENT | TEXT;

/// Why a template cannot be compiled.
pub(super) type Refusal = String;

pub(super) type Out = Result<Kind, Refusal>;

pub(super) fn refuse(what: &str) -> Out {
    Err(what.to_owned())
}

pub(super) fn only(kind: Kind, allowed: Kind, what: &str) -> Out {
    if kind & !allowed == 0 { Ok(kind) } else { refuse(what) }
}
