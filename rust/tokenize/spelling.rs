//! Which bytes a token of a byte-level vocabulary is, for the crate alone, which gives none.

use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

/// The bytes of every token, in one arena.
pub(super) struct Spelling {
    bytes: Vec<u8>,
    offsets: Vec<u32>,
}

impl Spelling {
    /// Bytes are known for added tokens and for tokens written in the alphabet of byte-level vocabularies. Others are
    /// left empty; [`Spelling::ends`] then finds that the ids do not spell the text. `None` where no text would be found
    /// spelt: the vocabulary is none of bytes, or begins a text with a space of its own.
    pub(super) fn of(inner: &tokenizers::Tokenizer, vocab_size: usize) -> Option<Self> {
        let normalised = inner.get_normalizer().is_some_and(makes_bytes);
        (normalised || inner.get_pre_tokenizer().is_some_and(splits_bytes))
            .then(|| Self::new(inner, vocab_size))
    }

    fn new(inner: &tokenizers::Tokenizer, vocab_size: usize) -> Self {
        let added = inner.get_added_tokens_decoder();
        let alphabet = alphabet();
        let mut tokens: Vec<Option<String>> = vec![None; vocab_size];
        for (token, id) in inner.get_vocab(true) {
            if let Some(slot) = tokens.get_mut(id as usize) {
                *slot = Some(token);
            }
        }
        let mut spelling = Self { bytes: Vec::new(), offsets: vec![0] };
        for (id, token) in tokens.into_iter().enumerate() {
            if let Some(token) = token {
                let start = spelling.bytes.len();
                if added.contains_key(&(id as u32)) {
                    spelling.bytes.extend_from_slice(token.as_bytes());
                } else {
                    for c in token.chars() {
                        let Some(byte) = alphabet.get(c as usize).copied().flatten() else {
                            spelling.bytes.truncate(start);
                            break;
                        };
                        spelling.bytes.push(byte);
                    }
                }
            }
            spelling.offsets.push(u32::try_from(spelling.bytes.len()).unwrap_or(u32::MAX));
        }
        spelling
    }

    fn get(&self, id: i32) -> Option<&[u8]> {
        let id = usize::try_from(id).ok()?;
        let start = *self.offsets.get(id)? as usize;
        let end = *self.offsets.get(id + 1)? as usize;
        self.bytes.get(start..end)
    }

    /// Where each id ends, if the ids spell exactly `text`.
    pub(super) fn ends(&self, text: &[u8], ids: &[i32]) -> Option<Vec<u32>> {
        let mut at = 0;
        let mut ends = Vec::with_capacity(ids.len());
        for id in ids {
            let bytes = self.get(*id).filter(|bytes| !bytes.is_empty())?;
            if text.get(at..at + bytes.len())? != bytes {
                return None;
            }
            at += bytes.len();
            ends.push(u32::try_from(at).ok()?);
        }
        (at == text.len()).then_some(ends)
    }
}

fn makes_bytes(normalizer: &NormalizerWrapper) -> bool {
    match normalizer {
        NormalizerWrapper::ByteLevel(_) => true,
        NormalizerWrapper::Sequence(parts) => parts.as_ref().iter().any(makes_bytes),
        _ => false,
    }
}

fn splits_bytes(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    match pre_tokenizer {
        PreTokenizerWrapper::ByteLevel(bytes) => !bytes.add_prefix_space,
        PreTokenizerWrapper::Sequence(parts) => parts.as_ref().iter().any(splits_bytes),
        _ => false,
    }
}

/// The byte of each character of GPT-2's printable alphabet.
fn alphabet() -> Vec<Option<u8>> {
    let mut table = vec![None; 512];
    let mut next = 256;
    for byte in 0..=255_u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable {
            usize::from(byte)
        } else {
            next += 1;
            next - 1
        };
        if let Some(slot) = table.get_mut(code) {
            *slot = Some(byte);
        }
    }
    table
}
