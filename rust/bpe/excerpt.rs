//! The part of a vocabulary that the texts of the self-check can come to: the `tokenizers` crate takes as long to load a
//! whole one as everything else that loading does, four times over.

use super::check::check_texts;
use super::model::Bpe;
use super::normal;
use super::symbols::Symbols;

/// Which bytes stand beside which in some texts.
///
/// A token has its place in the ids of a text only if the text holds it. Then all its neighbours stand beside each other
/// there too, so a token with others can be left out, with every merge that makes it or is made of it, and no text's ids
/// change.
pub(crate) struct Excerpt {
    symbols: Symbols,
    /// A bit for each three bytes.
    triples: Vec<u64>,
    pairs: Vec<u64>,
}

impl Excerpt {
    /// That of the texts that this engine is checked with.
    pub(crate) fn of(bpe: &Bpe) -> Self {
        let mut excerpt =
            Self { symbols: Symbols::new(), triples: vec![0; 1 << 18], pairs: vec![0; 1 << 10] };
        for text in check_texts(&bpe.sample) {
            excerpt.add(text.as_bytes());
            if bpe.nfc {
                excerpt.add(normal::nfc(&text).as_bytes());
            }
        }
        excerpt
    }

    fn add(&mut self, text: &[u8]) {
        for pair in text.windows(2) {
            set(&mut self.pairs, place(pair));
        }
        for triple in text.windows(3) {
            set(&mut self.triples, place(triple));
        }
    }

    /// Whether a token of the vocabulary, spelt in symbols, may be in the ids of a text; every single byte may.
    pub(crate) fn may_hold(&self, token: &str) -> bool {
        let (mut last, mut length) = ([0; 3], 0);
        for c in token.chars() {
            let Some(byte) = self.symbols.byte(c) else { return false };
            last = [last[1], last[2], byte];
            length += 1;
            let known = match length {
                1 => true,
                2 => has(&self.pairs, place(&last[1..])),
                _ => has(&self.triples, place(&last)),
            };
            if !known {
                return false;
            }
        }
        length > 0
    }
}

fn place(bytes: &[u8]) -> usize {
    bytes.iter().fold(0, |place, byte| place << 8 | usize::from(*byte))
}

fn set(bits: &mut [u64], place: usize) {
    bits[place / 64] |= 1 << (place % 64);
}

fn has(bits: &[u64], place: usize) -> bool {
    bits[place / 64] >> (place % 64) & 1 == 1
}
