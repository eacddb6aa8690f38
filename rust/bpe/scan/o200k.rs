//! With `P` = `[^\r\n\p{L}\p{N}]`, `U` = `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`, `L` = `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`, `C` the
//! case-blind contractions: `P?U*L+C?|P?U+L*C?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+`

use super::cl100k::digits;
use super::scanner::Scan;
use super::text::Text;
use super::word::Word;
use crate::bpe::classes::{END, LETTER, LOWER, MARK, NEWLINE, NUMBER, SPACE, UPPER};

/// o200k (`DIGITS` 3, `CONTRACTIONS`) and tekken (`DIGITS` 1, none).
#[derive(Debug, Clone, Copy)]
pub(crate) struct O200k<const DIGITS: usize, const CONTRACTIONS: bool>;

impl<const DIGITS: usize, const CONTRACTIONS: bool> Scan for O200k<DIGITS, CONTRACTIONS> {
    #[inline]
    fn word(self, text: &Text<'_>, i: usize) -> Word {
        let (class, len) = text.at(i);
        if class & NUMBER != 0 {
            return digits::<DIGITS>(text, i + len);
        }
        let is_prefix = class & (NEWLINE | LETTER | END) == 0;
        let start = if is_prefix { i + len } else { i };
        let body = Body::scan(text, start);
        if let Some(end) = body.small_end {
            return Self::suffix(text, end, body.reach);
        }
        if class & MARK != 0 {
            // `P` gives the mark back, and `L+` takes it alone.
            return Self::suffix(text, start, body.reach);
        }
        if body.capitals_end > start {
            return Self::suffix(text, body.capitals_end, body.reach);
        }
        let other = SPACE | LETTER | NUMBER;
        let after_space = text.byte(i) == Some(b' ') && text.at(start).0 & (other | END) == 0;
        if class & SPACE != 0 && !after_space {
            return text.white(i, true);
        }
        let end = tail(text, text.run_without(start, other));
        Word { end, reach: end }
    }
}

impl<const DIGITS: usize, const CONTRACTIONS: bool> O200k<DIGITS, CONTRACTIONS> {
    /// `C?` after a word that ends at `end`.
    #[inline]
    fn suffix(text: &Text<'_>, end: usize, reach: usize) -> Word {
        if !CONTRACTIONS || text.byte(end) != Some(b'\'') {
            return Word { end, reach };
        }
        let len = text.contraction(end, true);
        // At most the two characters after the quote were looked at; `reach` is the start of the last one.
        let after_quote = text.at(end + 1).1;
        Word { end: end + len, reach: reach.max(end + 1 + after_quote) }
    }
}

/// `U*L+` and `U+L*` from one place, in one pass.
struct Body {
    /// End of `U*L+`, if it matches.
    small_end: Option<usize>,
    /// End of `U+L*` where `U*L+` does not match: then no `L` follows.
    capitals_end: usize,
    reach: usize,
}

impl Body {
    #[inline]
    fn scan(text: &Text<'_>, start: usize) -> Self {
        let mut i = start;
        let mut last_small_end = None;
        loop {
            let (class, len) = text.at(i);
            if class & UPPER == 0 {
                if class & LOWER != 0 {
                    let end = text.run(text.run_of_small(i), LOWER);
                    return Self { small_end: Some(end), capitals_end: i, reach: end };
                }
                break;
            }
            i += len;
            if class & LOWER != 0 {
                last_small_end = Some(i);
            }
        }
        // `U*` ran to `i` and no `L` follows: it backtracks to the last character that is in both.
        Self { small_end: last_small_end, capitals_end: i, reach: i }
    }
}

/// `[\r\n/]*`.
fn tail(text: &Text<'_>, mut i: usize) -> usize {
    while matches!(text.byte(i), Some(b'\r' | b'\n' | b'/')) {
        i += 1;
    }
    i
}
