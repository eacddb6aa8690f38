//! What every scanner does.

use super::text::Text;
use super::word::Word;

/// A regex, as a function from the start of a word to its end.
pub(crate) trait Scan: Copy {
    /// The word that starts at `i`. `i` is a character's start inside `text`, or the end of an earlier word.
    fn word(self, text: &Text<'_>, i: usize) -> Word;
}
