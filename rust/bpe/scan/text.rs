//! What the scanners share: a text with its classes, runs, white space, contractions.

use super::word::Word;
use crate::bpe::classes::{Classes, END, LETTER, NEWLINE, SPACE, decode};

const ONES: u64 = 0x0101_0101_0101_0101;
const HIGH: u64 = 0x8080_8080_8080_8080;

/// UTF-8 bytes with the class table. Borders of the slice are borders of the regex's subject.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Text<'a> {
    bytes: &'a [u8],
    classes: &'a Classes,
}

impl<'a> Text<'a> {
    pub(crate) fn new(text: &'a str, classes: &'a Classes) -> Self {
        Self { bytes: text.as_bytes(), classes }
    }

    pub(crate) fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Classes and length of the character at `i`: `END` and 0 at the end.
    #[inline]
    pub(crate) fn at(&self, i: usize) -> (u16, usize) {
        match self.bytes.get(i) {
            None => (END, 0),
            Some(&byte) if byte < 128 => (self.classes.of_ascii(byte), 1),
            Some(_) => self.at_wide(i),
        }
    }

    #[cold]
    fn at_wide(&self, i: usize) -> (u16, usize) {
        let (code_point, len) = decode(self.bytes, i);
        (self.classes.of(code_point), len)
    }

    #[inline]
    pub(crate) fn byte(&self, i: usize) -> Option<u8> {
        self.bytes.get(i).copied()
    }

    /// End of the run of characters from `i` that have a class of `mask`.
    #[inline]
    pub(crate) fn run(&self, mut i: usize, mask: u16) -> usize {
        loop {
            let (class, len) = self.at(i);
            if class & mask == 0 || len == 0 {
                return i;
            }
            i += len;
        }
    }

    /// End of the run of characters from `i` that have no class of `mask`.
    #[inline]
    pub(crate) fn run_without(&self, mut i: usize, mask: u16) -> usize {
        loop {
            let (class, len) = self.at(i);
            if class & (mask | END) != 0 {
                return i;
            }
            i += len;
        }
    }

    /// End of the run of letters (or of `mask`, which holds the letters) from `i`.
    ///
    /// Same as `run(i, mask)`, eight ASCII letters at a time.
    #[inline]
    pub(crate) fn run_of_letters(&self, mut i: usize, mask: u16) -> usize {
        debug_assert!(mask & LETTER != 0);
        while let Some(eight) = self.eight(i) {
            let letters = ascii_letters(eight);
            let n = (!letters & HIGH).trailing_zeros() as usize / 8;
            i += n;
            if n < 8 {
                if self.bytes[i] < 128 {
                    return i;
                }
                break;
            }
        }
        self.run(i, mask)
    }

    /// End of the run of `a` to `z` from `i`.
    #[inline]
    pub(crate) fn run_of_small(&self, mut i: usize) -> usize {
        while let Some(eight) = self.eight(i) {
            let n = (!ascii_small(eight) & HIGH).trailing_zeros() as usize / 8;
            i += n;
            if n < 8 {
                return i;
            }
        }
        while self.byte(i).is_some_and(|b| b.is_ascii_lowercase()) {
            i += 1;
        }
        i
    }

    #[inline]
    fn eight(&self, i: usize) -> Option<u64> {
        self.bytes.get(i..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
    }

    /// `\s*[\r\n]+|\s+(?!\S)|\s+` (the first only if `newlines`) from `i`, where white space stands.
    ///
    /// All three read the whole run: the first gives back what follows its last line end, the second its last
    /// character if anything follows.
    #[inline]
    pub(crate) fn white(&self, i: usize, newlines: bool) -> Word {
        self.white_until(i, newlines, Self::at)
    }

    /// [`Self::white`] with another notion of where the text ends.
    #[inline]
    pub(crate) fn white_until(
        &self,
        i: usize,
        newlines: bool,
        at: impl Fn(&Self, usize) -> (u16, usize),
    ) -> Word {
        let (mut end, mut last, mut newline_end) = (i, i, i);
        let next = loop {
            let (class, len) = at(self, end);
            if class & SPACE == 0 {
                break class;
            }
            last = end;
            end += len;
            if class & NEWLINE != 0 {
                newline_end = end;
            }
        };
        let word_end = if newlines && newline_end > i {
            newline_end
        } else if next & END != 0 || last == i {
            end
        } else {
            last
        };
        Word { end: word_end, reach: end }
    }

    /// Length of `'s|'t|'re|'ve|'m|'ll|'d` at `i`, where `'` stands; 0 if none. With `fold` case-blind, which to the
    /// regex engine makes U+017F an s.
    #[inline]
    pub(crate) fn contraction(&self, i: usize, fold: bool) -> usize {
        let lower = |b: u8| if fold { b.to_ascii_lowercase() } else { b };
        let (Some(first), second) = (self.byte(i + 1), self.byte(i + 2)) else { return 0 };
        let second = second.map(lower);
        match lower(first) {
            b's' | b't' | b'm' | b'd' => 2,
            b'r' | b'v' if second == Some(b'e') => 3,
            b'l' if second == Some(b'l') => 3,
            0xc5 if fold && second == Some(0xbf) => 3,
            _ => 0,
        }
    }
}

/// The high bit of every byte that is an ASCII letter.
#[inline]
fn ascii_letters(eight: u64) -> u64 {
    ascii_small(eight | (ONES * 0x20)) & !eight
}

/// The high bit of every byte in `a` to `z`.
#[inline]
fn ascii_small(eight: u64) -> u64 {
    let low = eight & !HIGH;
    let from_a = low + ONES * (0x80 - 0x61);
    let past_z = low + ONES * (0x80 - 0x7b);
    from_a & !past_z & !eight & HIGH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bytes_at_once_equal_one_at_a_time() {
        for byte in 0..=255u8 {
            for place in 0..8 {
                let mut bytes = [b'q'; 8];
                bytes[place] = byte;
                let eight = u64::from_le_bytes(bytes);
                let bit = |mask: u64| mask.to_le_bytes()[place] == 0x80;
                assert_eq!(bit(ascii_letters(eight)), byte.is_ascii_alphabetic(), "{byte}");
                assert_eq!(bit(ascii_small(eight)), byte.is_ascii_lowercase(), "{byte}");
            }
        }
    }
}
