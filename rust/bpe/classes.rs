//! Character classes, probed once per process from the regex engine that the `tokenizers` crate links.
//!
//! A table that is copied from one version of Unicode and a regex engine that knows another disagree in silence. So
//! nothing is copied: every class below is the set of characters that the linked engine itself matches.

use std::sync::OnceLock;

use tokenizers::utils::SysRegex;
use unicode_normalization_alignments::{IsNormalized, char as unicode, is_nfc_quick};

/// `\p{L}`.
pub(crate) const LETTER: u16 = 1;
/// `\p{N}`.
pub(crate) const NUMBER: u16 = 1 << 1;
/// `\s`.
pub(crate) const SPACE: u16 = 1 << 2;
/// `[\r\n]`.
pub(crate) const NEWLINE: u16 = 1 << 3;
/// `\p{M}`.
pub(crate) const MARK: u16 = 1 << 4;
/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`: what may stand in the capital half of an o200k word.
pub(crate) const UPPER: u16 = 1 << 5;
/// `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`: what may stand in the small half of an o200k word.
pub(crate) const LOWER: u16 = 1 << 6;
/// `[\p{P}\p{S}]`.
pub(crate) const PUNCTUATION: u16 = 1 << 7;
/// The Han and kana characters of the second split of `DeepSeek`; none is a number.
pub(crate) const CJK: u16 = 1 << 8;
/// Not surely a border of NFC: not "quick check yes with combining class 0".
pub(crate) const NOT_QUICK: u16 = 1 << 9;
/// No character: the end of the text. Never in the table.
pub(crate) const END: u16 = 1 << 15;

/// General categories that partition what any class above is made of, the classes of their characters, and first what
/// has none of them: it comes in long runs.
const CATEGORIES: [(&str, u16); 11] = [
    (r"[\p{Cn}\p{Co}]+", 0),
    (r"\p{Lu}+", LETTER | UPPER),
    (r"\p{Ll}+", LETTER | LOWER),
    (r"\p{Lt}+", LETTER | UPPER),
    (r"\p{Lm}+", LETTER | UPPER | LOWER),
    (r"\p{Lo}+", LETTER | UPPER | LOWER),
    (r"\p{M}+", MARK | UPPER | LOWER),
    (r"\p{N}+", NUMBER),
    (r"\p{P}+", PUNCTUATION),
    (r"\p{S}+", PUNCTUATION),
    (r"\s+", SPACE),
];

const BLOCK: usize = 128;
const CODE_POINTS: usize = 0x11_0000;

/// A two-level table from code point to classes, and a flat one for bytes below 128.
#[derive(Debug, Clone)]
pub(crate) struct Classes {
    ascii: [u16; 128],
    block_of: Vec<u16>,
    blocks: Vec<[u16; BLOCK]>,
}

impl Classes {
    /// The table of this process, built at the first call.
    ///
    /// # Errors
    /// What the regex engine says about one of the definitions.
    pub(crate) fn linked() -> Result<&'static Self, String> {
        static TABLE: OnceLock<Result<Classes, String>> = OnceLock::new();
        TABLE.get_or_init(Self::probe).as_ref().map_err(Clone::clone)
    }

    /// Same as asking the regex of every class and the normaliser about every character, one at a time: the engine
    /// finds the runs of one category, and only the first character of a run is asked for which.
    fn probe() -> Result<Self, String> {
        let compiled = |pattern: &str| SysRegex::new(pattern).map_err(|e| e.to_string());
        let categories = CATEGORIES.map(|(pattern, class)| (compiled(pattern), class));
        let any = compiled(&CATEGORIES.map(|(pattern, _)| pattern).join("|"))?;
        // Planes 4 to 13 have no assigned character in any version; searching them would be most of the time.
        let text: String =
            (0..0x4_0000).chain(0xe_0000..0xe_1000).filter_map(char::from_u32).collect();
        let mut flat = vec![0u16; CODE_POINTS];
        for (start, end) in any.find_iter(&text) {
            let first = text[start..].chars().next().map_or(0, char::len_utf8);
            for (regex, class) in &categories {
                let regex = regex.as_ref().map_err(Clone::clone)?;
                if regex.find_iter(&text[start..start + first]).next().is_some() {
                    for c in text[start..end].chars() {
                        flat[c as usize] = *class;
                    }
                    break;
                }
            }
        }
        for c in ['\r', '\n'] {
            flat[c as usize] |= NEWLINE;
        }
        for c in ('\u{4e00}'..='\u{9fa5}').chain('\u{3040}'..='\u{30ff}') {
            flat[c as usize] |= CJK;
        }
        for c in text.chars().filter(|c| !c.is_ascii()) {
            let quick = is_nfc_quick(std::iter::once(c)) == IsNormalized::Yes
                && unicode::canonical_combining_class(c) == 0;
            if !quick {
                flat[c as usize] |= NOT_QUICK;
            }
        }
        Ok(Self::compress(&flat))
    }

    fn compress(flat: &[u16]) -> Self {
        let mut ascii = [0; 128];
        ascii.copy_from_slice(&flat[..128]);
        let mut blocks: Vec<[u16; BLOCK]> = Vec::new();
        let mut block_of = Vec::with_capacity(CODE_POINTS / BLOCK);
        for chunk in flat.chunks_exact(BLOCK) {
            let mut block = [0; BLOCK];
            block.copy_from_slice(chunk);
            let index = blocks.iter().rposition(|b| *b == block).unwrap_or_else(|| {
                blocks.push(block);
                blocks.len() - 1
            });
            block_of.push(index as u16);
        }
        Self { ascii, block_of, blocks }
    }

    /// Classes of a code point; 0 beyond the last one.
    #[inline]
    pub(crate) fn of(&self, code_point: u32) -> u16 {
        let code_point = code_point as usize;
        match self.block_of.get(code_point / BLOCK) {
            Some(&block) => self.blocks[block as usize][code_point % BLOCK],
            None => 0,
        }
    }

    /// Classes of a byte below 128.
    #[inline]
    pub(crate) fn of_ascii(&self, byte: u8) -> u16 {
        self.ascii[(byte & 127) as usize]
    }

    /// The first character of every run of characters with the same classes, and the last of the run before.
    pub(crate) fn borders(&self) -> impl Iterator<Item = (char, char)> + '_ {
        let scalars = || (0..CODE_POINTS as u32).filter_map(char::from_u32);
        scalars()
            .zip(scalars().skip(1))
            .filter(|&(a, b)| (self.of(a as u32) ^ self.of(b as u32)) & !NOT_QUICK != 0)
    }

    /// Whether `text` is surely in NFC and stays so whatever is put before or after it: every character is
    /// "quick check yes with combining class 0".
    ///
    /// True only if the normaliser would return `text` unchanged; false does not say that it would change it.
    pub(crate) fn is_quick_nfc(&self, text: &str) -> bool {
        let bytes = text.as_bytes();
        let mut i = 0;
        while i < bytes.len() {
            if let Some(eight) = bytes.get(i..i + 8).and_then(|b| <[u8; 8]>::try_from(b).ok())
                && u64::from_ne_bytes(eight) & 0x8080_8080_8080_8080 == 0
            {
                i += 8;
                continue;
            }
            if bytes[i] < 128 {
                i += 1;
                continue;
            }
            let (code_point, len) = decode(bytes, i);
            if self.of(code_point) & NOT_QUICK != 0 {
                return false;
            }
            i += len;
        }
        true
    }

    #[cfg(test)]
    pub(crate) fn planted(&self, c: char, classes: u16) -> Self {
        let mut flat: Vec<u16> = (0..CODE_POINTS as u32).map(|c| self.of(c)).collect();
        flat[c as usize] = classes;
        Self::compress(&flat)
    }
}

/// The code point at `i` and its length in bytes. `bytes` must be UTF-8 and `i` the start of a character.
///
/// Same as `str::chars`, without its iterator.
#[inline]
pub(crate) fn decode(bytes: &[u8], i: usize) -> (u32, usize) {
    let tail = |k: usize| u32::from(bytes.get(i + k).copied().unwrap_or(0) & 0x3f);
    let lead = u32::from(bytes[i]);
    match lead {
        0..0x80 => (lead, 1),
        0x80..0xe0 => ((lead & 0x1f) << 6 | tail(1), 2),
        0xe0..0xf0 => ((lead & 0x0f) << 12 | tail(1) << 6 | tail(2), 3),
        _ => ((lead & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The classes and the regex whose matches define each.
    const DEFINITIONS: [(u16, &str); 9] = [
        (LETTER, r"\p{L}+"),
        (NUMBER, r"\p{N}+"),
        (SPACE, r"\s+"),
        (NEWLINE, r"[\r\n]+"),
        (MARK, r"\p{M}+"),
        (UPPER, r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"),
        (LOWER, r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"),
        (PUNCTUATION, r"[\p{P}\p{S}]+"),
        (CJK, "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"),
    ];

    fn all() -> impl Iterator<Item = char> {
        (0..0x11_0000).filter_map(char::from_u32)
    }

    #[test]
    fn every_scalar_has_the_classes_that_the_linked_regex_gives_it() {
        let table = Classes::linked().unwrap();
        let text: String = all().collect();
        for (class, pattern) in DEFINITIONS {
            let mut expected = vec![false; CODE_POINTS];
            for (start, end) in SysRegex::new(pattern).unwrap().find_iter(&text) {
                text[start..end].chars().for_each(|c| expected[c as usize] = true);
            }
            for c in all() {
                assert_eq!(
                    table.of(c as u32) & class != 0,
                    expected[c as usize],
                    "{pattern} {c:?}"
                );
            }
        }
    }

    #[test]
    fn the_regex_knows_unicode_16_and_not_17() {
        let table = Classes::linked().unwrap();
        assert_ne!(table.of(0x1c89) & LETTER, 0);
        assert_eq!(table.of(0x11_db0) & LETTER, 0);
        assert_eq!((0..0x11_0000).filter(|&c| table.of(c) & SPACE != 0).count(), 25);
        assert!((0..0x11_0000).all(|c| table.of(c) & CJK == 0 || table.of(c) & NUMBER == 0));
    }

    #[test]
    fn quick_text_is_left_alone_by_the_normaliser() {
        use unicode_normalization_alignments::UnicodeNormalization;
        let table = Classes::linked().unwrap();
        for c in all().filter(|&c| table.is_quick_nfc(c.encode_utf8(&mut [0; 4]))) {
            for before in ['a', '\u{301}', '\u{1100}', '\u{ac00}', '\u{345}', '\u{9c7}'] {
                let text: String = [before, c].iter().collect();
                let normal: String = text.nfc().map(|(c, _)| c).collect();
                let alone: String = before.to_string().nfc().map(|(c, _)| c).collect();
                assert_eq!(normal, format!("{alone}{c}"), "{c:?} after {before:?}");
            }
        }
        assert!(!table.is_quick_nfc("e\u{301}"));
        assert!(table.is_quick_nfc("curly \u{201c}quotes\u{201d} are quick, and \u{e9} is"));
    }

    #[test]
    fn decoding_equals_chars() {
        let text: String = all().step_by(37).collect();
        let mut i = 0;
        for c in text.chars() {
            assert_eq!(decode(text.as_bytes(), i), (c as u32, c.len_utf8()));
            i += c.len_utf8();
        }
    }
}
