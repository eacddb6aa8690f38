//! The tokenizer engine `bpe`: byte-level BPE for the published families, in safe Rust.
//!
//! Same ids as the `tokenizers` crate for every text, or [`Bpe::recognise`] refuses the file, or [`Bpe::self_check`]
//! reports the difference. What it does not do: `SentencePiece`, Unigram, `WordPiece`, dropout, other normalizers, unknown
//! regexes.
//!
//! A text goes through `added` (added tokens), `normal` (NFC, only where needed), `scan` (words), `cache` and `merge`
//! (tokens of a word); `encode` leads it. `classes` are the character classes, `pair` encodes two texts with a common
//! beginning, `recognise` reads tokenizer.json, `check` is the self-check.

mod added;
mod cache;
mod check;
mod classes;
mod encode;
mod merge;
mod normal;
mod pair;
mod recognise;
mod scan;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

pub use check::Mismatch;
pub use encode::{Found, Keep, Scratch, not_special};
pub use pair::{Inside, PairIds};
pub use recognise::Refusal;
pub(crate) use recognise::parse;
pub use scan::Family;

use crate::error::Result;
use added::AddedTokens;
use classes::Classes;
use encode::Walk;
use merge::Merges;
use pair::{Border, Cut};

/// Longest text in bytes: offsets inside are 32 bits wide.
pub const MAX_TEXT_BYTES: usize = i32::MAX as usize;

/// A byte-level BPE model. Immutable; share it between threads, with one [`Scratch`] each.
///
/// ```
/// let json = std::fs::read_to_string("tokenizer.json").unwrap_or_default();
/// match dpo_ext::bpe::Bpe::recognise(&json) {
///     Ok(bpe) => println!("{:?}", bpe.family()),
///     Err(refusal) => println!("not ours: {refusal}"),
/// }
/// ```
#[derive(Debug)]
pub struct Bpe {
    owner: u64,
    family: Family,
    nfc: bool,
    /// With `ignore_merges`: words that are tokens without any merge. Empty otherwise.
    whole_words: HashMap<Box<[u8]>, i32>,
    merges: Merges,
    /// Added tokens that are sought in the text as given.
    raw: AddedTokens,
    /// Added tokens that are sought after normalisation.
    normal: AddedTokens,
    longest_added: usize,
    prefix: Vec<i32>,
    suffix: Vec<i32>,
    token_bytes: Vec<u32>,
    classes: &'static Classes,
    /// Texts of this file's own for the self-check.
    sample: Vec<String>,
}

fn next_owner() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Bpe {
    /// Reads a tokenizer.json whose structure is known; `truncation` and `padding` blocks are not looked at.
    ///
    /// # Errors
    /// Why the file is not ours. Never a panic, whatever the file holds.
    pub fn recognise(tokenizer_json: &str) -> std::result::Result<Self, Refusal> {
        parse(tokenizer_json)?.engine()
    }

    /// Which pre-tokenizer the file has.
    pub fn family(&self) -> Family {
        self.family
    }

    /// One more than the largest id of the model, without added tokens.
    pub(crate) fn model_size(&self) -> usize {
        self.token_bytes.len()
    }

    /// Ids that the post-processor puts before a text.
    pub fn prefix(&self) -> &[i32] {
        &self.prefix
    }

    /// Ids that the post-processor puts after a text.
    pub fn suffix(&self) -> &[i32] {
        &self.suffix
    }

    /// Appends the ids of `text` to `ids`, without those of the post-processor.
    ///
    /// Same as `tokenizers::Tokenizer::encode_fast(text, false)`; with `keep = Some(&not_special)`, as after
    /// `set_encode_special_tokens(true)`.
    ///
    /// # Errors
    /// [`crate::Error::Limit`] for more than [`MAX_TEXT_BYTES`].
    pub fn encode_into(
        &self,
        text: &str,
        keep: Keep<'_>,
        scratch: &mut Scratch,
        ids: &mut Vec<i32>,
    ) -> Result<()> {
        let (cut, border) = (Cut::none(), Border::none());
        Walk { bpe: self, keep, scratch, ids, ends: None, cut, border }.text(text, 0, false)
    }

    /// [`Self::encode_into`], and for each id the end of its bytes in `text`.
    ///
    /// Where NFC changed the text, an id that ends inside a changed character gets that character's end.
    ///
    /// # Errors
    /// [`crate::Error::Limit`] for more than [`MAX_TEXT_BYTES`].
    pub fn encode_with_ends(
        &self,
        text: &str,
        keep: Keep<'_>,
        scratch: &mut Scratch,
        ids: &mut Vec<i32>,
        ends: &mut Vec<u32>,
    ) -> Result<()> {
        let (ends, cut, border) = (Some(ends), Cut::none(), Border::none());
        Walk { bpe: self, keep, scratch, ids, ends, cut, border }.text(text, 0, false)
    }
}
