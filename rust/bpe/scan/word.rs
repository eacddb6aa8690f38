//! What a scanner finds.

/// A word that starts where the scan was asked to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word {
    /// One past its last byte.
    pub(crate) end: usize,
    /// Start of the furthest character that was looked at to decide `end`; the length of the text if its end was.
    pub(crate) reach: usize,
}
