//! DeepSeek-V3: three splits in sequence. `\p{N}{1,3}`; runs of Han and kana; then, in what is left between them,
//! ``[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+``
//! A border of a piece is an end of text for the last split, and what no alternative matches is one word per gap.

use super::cl100k::digits;
use super::scanner::Scan;
use super::text::Text;
use super::word::Word;
use crate::bpe::classes::{CJK, END, LETTER, MARK, NEWLINE, NUMBER, PUNCTUATION, SPACE};

/// DeepSeek-V3 and R1.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeepSeek;

impl Scan for DeepSeek {
    #[inline]
    fn word(self, text: &Text<'_>, i: usize) -> Word {
        let (class, len) = text.at(i);
        if class & NUMBER != 0 {
            return digits::<3>(text, i + len);
        }
        if class & CJK != 0 {
            let end = text.run(i + len, CJK);
            return Word { end, reach: end };
        }
        if let Some(word) = matched(text, i) {
            return word;
        }
        let mut end = i + len;
        while piece_at(text, end).0 & END == 0 && matched(text, end).is_none() {
            end += piece_at(text, end).1;
        }
        // Whether a word starts at `end` was decided by at most the character there and the next.
        Word { end, reach: end + text.at(end).1 }
    }
}

/// The character at `i` as the third split sees it: a number, Han or kana is the end.
#[inline]
fn piece_at(text: &Text<'_>, i: usize) -> (u16, usize) {
    let (class, len) = text.at(i);
    if class & (NUMBER | CJK) != 0 { (END, 0) } else { (class, len) }
}

/// End of the run of characters from `i` inside the piece that have a class of `mask`.
#[inline]
fn run(text: &Text<'_>, mut i: usize, mask: u16) -> usize {
    loop {
        let (class, len) = piece_at(text, i);
        if class & mask == 0 {
            return i;
        }
        i += len;
    }
}

/// The third split's match at `i`.
#[inline]
fn matched(text: &Text<'_>, i: usize) -> Option<Word> {
    const WORD: u16 = LETTER | MARK;
    let (class, len) = piece_at(text, i);
    let at_end = |end| Some(Word { end, reach: end });
    let word_end = |i| run(text, i, WORD);
    if class & WORD != 0 {
        return at_end(word_end(i + len));
    }
    let next = piece_at(text, i + len).0;
    let first = text.byte(i)?;
    if first.is_ascii_punctuation() && text.byte(i + 1).is_some_and(|b| b.is_ascii_alphabetic()) {
        let mut end = i + 2;
        while text.byte(end).is_some_and(|b| b.is_ascii_alphabetic()) {
            end += 1;
        }
        return at_end(end);
    }
    if class & (NEWLINE | PUNCTUATION | END) == 0 && next & WORD != 0 {
        return at_end(word_end(i + len));
    }
    let start = if first == b' ' { i + len } else { i };
    let end = run(text, start, PUNCTUATION);
    if end > start {
        return at_end(run(text, end, NEWLINE));
    }
    (class & SPACE != 0).then(|| text.white_until(i, true, piece_at))
}
