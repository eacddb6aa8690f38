//! `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`

use super::scanner::Scan;
use super::text::Text;
use super::word::Word;
use crate::bpe::classes::{END, LETTER, NUMBER, SPACE};

/// GPT-2 and `NeoX`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gpt2;

impl Scan for Gpt2 {
    #[inline]
    fn word(self, text: &Text<'_>, i: usize) -> Word {
        let first = text.byte(i);
        if first == Some(b'\'') {
            let len = text.contraction(i, false);
            if len > 0 {
                return Word { end: i + len, reach: i + len - 1 };
            }
        }
        let start = if first == Some(b' ') { i + 1 } else { i };
        let (class, len) = text.at(start);
        let end = if class & LETTER != 0 {
            text.run_of_letters(start + len, LETTER)
        } else if class & NUMBER != 0 {
            text.run(start + len, NUMBER)
        } else if class & (SPACE | END) == 0 {
            text.run_without(start + len, SPACE | LETTER | NUMBER)
        } else {
            return text.white(i, false);
        };
        Word { end, reach: end }
    }
}
