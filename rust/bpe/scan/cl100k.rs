//! `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+`

use super::scanner::Scan;
use super::text::Text;
use super::word::Word;
use crate::bpe::classes::{END, LETTER, MARK, NEWLINE, NUMBER, SPACE};

/// cl100k and Llama-3 (`DIGITS` 3), Qwen2 (`DIGITS` 1), Qwen3.5 (`DIGITS` 1, `MARKS`: marks count as letters, except
/// before a word).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cl100k<const DIGITS: usize, const MARKS: bool>;

impl<const DIGITS: usize, const MARKS: bool> Scan for Cl100k<DIGITS, MARKS> {
    #[inline]
    fn word(self, text: &Text<'_>, i: usize) -> Word {
        let letter = if MARKS { LETTER | MARK } else { LETTER };
        let (class, len) = text.at(i);
        if class & letter != 0 {
            let end = text.run_of_letters(i + len, letter);
            return Word { end, reach: end };
        }
        if class & NUMBER != 0 {
            return digits::<DIGITS>(text, i + len);
        }
        let first = text.byte(i);
        if first == Some(b'\'') {
            let len = text.contraction(i, true);
            if len > 0 {
                return Word { end: i + len, reach: i + len - 1 };
            }
        }
        let (next, next_len) = text.at(i + len);
        if class & NEWLINE == 0 && next & letter != 0 {
            let end = text.run_of_letters(i + len + next_len, letter);
            return Word { end, reach: end };
        }
        let other = SPACE | letter | NUMBER;
        let end = if class & SPACE == 0 {
            text.run_without(i + len, other)
        } else if first == Some(b' ') && next & (other | END) == 0 {
            text.run_without(i + len + next_len, other)
        } else {
            return text.white(i, true);
        };
        let end = text.run(end, NEWLINE);
        Word { end, reach: end }
    }
}

/// The rest of `\p{N}{1,MAX}` after its first character.
#[inline]
pub(crate) fn digits<const MAX: usize>(text: &Text<'_>, mut i: usize) -> Word {
    for _ in 1..MAX {
        let (class, len) = text.at(i);
        if class & NUMBER == 0 {
            break;
        }
        i += len;
    }
    Word { end: i, reach: i }
}
