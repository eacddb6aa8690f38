//! The load-time check against the `tokenizers` crate.

use std::fmt;

use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, Tokenizer};

use super::encode::Scratch;
use super::model::Bpe;
use super::scan::{Scan, Text, with_scanner};

/// A text on which this engine and the `tokenizers` crate differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// The text.
    pub text: String,
    /// What this engine gives: ids, or ends of words.
    pub ours: Vec<u32>,
    /// What the `tokenizers` crate gives, or its error as text.
    pub theirs: Result<Vec<u32>, String>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text: String = self.text.escape_debug().take(80).collect();
        write!(
            f,
            "the self-check differs on \"{text}\": {:?}, and the `tokenizers` crate ",
            self.ours
        )?;
        match &self.theirs {
            Ok(ids) => write!(f, "{ids:?}"),
            Err(error) => write!(f, "fails: {error}"),
        }
    }
}

impl std::error::Error for Mismatch {}

/// What the random texts are made of: everything that a pre-tokenizer looks at.
const PARTS: &[&str] = &[
    " ",
    "  ",
    "   ",
    "\n",
    "\r\n",
    "\n\n",
    "\t",
    " \n ",
    "\u{a0}",
    "\u{2003}",
    "\u{3000}",
    "\u{85}",
    "\u{2028}",
    "'s",
    "'S",
    "'t",
    "'RE",
    "'ve",
    "'m",
    "'ll",
    "'LL",
    "'d",
    "'\u{17f}",
    "\u{2019}s",
    "'",
    "''",
    "'x",
    "1",
    "12",
    "123",
    "1234567",
    "\u{664}",
    "\u{bd}",
    "\u{2167}",
    "\u{b2}",
    "a",
    "A",
    "the",
    " The",
    "camelCase",
    "HTTPServer",
    "ABC",
    "\u{e9}",
    "e\u{301}",
    "\u{301}",
    "\u{df}",
    "\u{1c5}",
    "\u{2b0}",
    "\u{aa}",
    "\u{3b1}\u{3b2}",
    "\u{416}",
    "\u{5d0}",
    "\u{627}\u{644}",
    "\u{4e2d}\u{6587}",
    "\u{3042}",
    "\u{30ab}",
    "\u{9fa5}",
    "\u{9fa6}",
    "\u{ac00}",
    "\u{1100}\u{1161}",
    "\u{915}\u{94d}\u{937}",
    "\u{e01}\u{e33}",
    ".",
    ",",
    "!",
    "?",
    "...",
    "//",
    "/",
    "\\",
    "_",
    "__",
    "-",
    "(",
    ")",
    "{",
    "}",
    "<",
    ">",
    "<|",
    "|>",
    "@",
    "#",
    "$",
    "%",
    "&",
    "+",
    "=",
    "~",
    "`",
    "^",
    "|",
    "\"",
    ";",
    ":",
    "\u{2026}",
    "\u{20ac}",
    "\u{201c}",
    "\u{3001}",
    "\u{1f600}",
    "\u{1f468}\u{200d}\u{1f469}",
    "\u{1f1e6}\u{1f1fa}",
    "\u{200b}",
    "\u{200d}",
    "\u{feff}",
    "\u{0}",
    "\u{7}",
    "\u{7f}",
    "\u{e000}",
    "\u{fffd}",
    "\u{10ffff}",
    "\u{378}",
    "\u{1c89}",
];

/// Random texts of 1 to `longest` parts, the same for the same seed.
pub(super) fn nasty(seed: u64, longest: u64, more: &[&str]) -> impl Iterator<Item = String> {
    let parts: Vec<String> = PARTS.iter().chain(more).map(|&p| p.to_owned()).collect();
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut below = move |n: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    std::iter::repeat_with(move || {
        let n = 1 + below(longest);
        (0..n).map(|_| parts[below(parts.len() as u64) as usize].as_str()).collect()
    })
}

/// Characters between whose UTF-8 bytes every byte value of valid text occurs, in short groups.
fn every_byte() -> impl Iterator<Item = String> {
    let scalars = (0u32..128)
        .chain((128..0x800).step_by(61))
        .chain((0x800..0x1_0000).step_by(0x3c1))
        .chain((0x1_0000..0x11_0000).step_by(0xa_0c1))
        .chain((0x80..0xc0).map(|c| c + 0x100));
    let chars: Vec<char> = scalars.filter_map(char::from_u32).collect();
    chars.chunks(8).map(|chunk| chunk.iter().collect()).collect::<Vec<String>>().into_iter()
}

/// The texts whose ids are compared, with a file's own `sample`.
pub(super) fn check_texts(sample: &[String]) -> impl Iterator<Item = String> {
    let few = ["a", " b\n"].map(str::to_owned);
    every_byte().chain(sample.iter().cloned()).chain(nasty(0, 12, &[]).take(1200)).chain(few)
}

impl Bpe {
    /// Compares this engine with the `tokenizers` crate on a few thousand texts: both sides of every border between
    /// character classes (by words), every byte, the file's added tokens, a sample of its vocabulary, white space,
    /// contractions, digits, scripts, emoji, combining marks, control characters. About 0.1 s.
    ///
    /// `oracle` is the same file in the `tokenizers` crate, with truncation and padding off.
    ///
    /// # Errors
    /// The first text on which they differ.
    pub fn self_check(&self, oracle: &Tokenizer) -> Result<(), Mismatch> {
        self.check_words(oracle)?;
        self.check_texts(oracle)
    }

    /// The half of [`Self::self_check`] that compares ids.
    pub(crate) fn check_texts(&self, oracle: &Tokenizer) -> Result<(), Mismatch> {
        let mut scratch = Scratch::default();
        for text in check_texts(&self.sample) {
            self.check_ids(&text, oracle, false, &mut scratch)?;
        }
        for text in ["", "a", " b\n"] {
            self.check_ids(text, oracle, true, &mut scratch)?;
        }
        Ok(())
    }

    fn check_ids(
        &self,
        text: &str,
        oracle: &Tokenizer,
        special: bool,
        scratch: &mut Scratch,
    ) -> Result<(), Mismatch> {
        let mut ids = if special { self.prefix.clone() } else { Vec::new() };
        let encoded = self.encode_into(text, None, scratch, &mut ids);
        if special {
            ids.extend(&self.suffix);
        }
        let ours = ids.iter().map(|&id| id as u32).collect();
        let theirs = oracle
            .encode_fast(text, special)
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| e.to_string());
        if encoded.is_ok() && theirs.as_ref() == Ok(&ours) {
            Ok(())
        } else {
            Err(Mismatch { text: text.to_owned(), ours, theirs })
        }
    }

    /// Ends of the words of a text that is taken as it is.
    fn word_ends(&self, text: &str) -> Vec<u32> {
        let text = Text::new(text, self.classes);
        let mut ends = Vec::new();
        let mut i = 0;
        with_scanner!(self.family, scan => while i < text.len() {
            i = scan.word(&text, i).end;
            ends.push(i as u32);
        });
        ends
    }

    /// The other half: the words of texts that tell the classes of their characters apart, whatever the merges are.
    pub(crate) fn check_words(&self, oracle: &Tokenizer) -> Result<(), Mismatch> {
        let texts: Vec<String> = self
            .classes
            .borders()
            .flat_map(|(before, first)| [before, first])
            .map(|c| format!("!{c}a {c}1A{c}b{c}B\n{c}"))
            .collect();
        for group in texts.chunks(32) {
            let text = group.concat();
            let ours = self.word_ends(&text);
            let theirs = oracle_word_ends(oracle, &text);
            if theirs.as_ref() != Ok(&ours) {
                return Err(Mismatch { text, ours, theirs });
            }
        }
        Ok(())
    }
}

fn oracle_word_ends(oracle: &Tokenizer, text: &str) -> Result<Vec<u32>, String> {
    let mut words = PreTokenizedString::from(text);
    if let Some(pre_tokenizer) = oracle.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words).map_err(|e| e.to_string())?;
    }
    let splits = words.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.iter().map(|(_, (_, end), _)| *end as u32).collect())
}
