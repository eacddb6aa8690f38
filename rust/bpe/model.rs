//! The model: what a recognised tokenizer.json holds, in the form that encoding wants.

use std::sync::atomic::{AtomicU64, Ordering};

use super::added::AddedTokens;
use super::classes::Classes;
use super::ranks::Merges;
use super::scan::Family;
use super::whole::Whole;

/// A byte-level BPE model. Immutable; share it between threads, with one [`Scratch`](super::Scratch) each.
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
    pub(super) owner: u64,
    pub(super) family: Family,
    pub(super) nfc: bool,
    /// Words that are one token: with `ignore_merges` every token.
    pub(super) whole: Whole,
    pub(super) merges: Merges,
    /// Added tokens that are sought in the text as given.
    pub(super) raw: AddedTokens,
    /// Added tokens that are sought after normalisation.
    pub(super) normal: AddedTokens,
    pub(super) longest_added: usize,
    pub(super) prefix: Vec<i32>,
    pub(super) suffix: Vec<i32>,
    pub(super) classes: &'static Classes,
    /// Texts of this file's own for the self-check.
    pub(super) sample: Vec<String>,
}

pub(super) fn next_owner() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Bpe {
    /// Which pre-tokenizer the file has.
    pub fn family(&self) -> Family {
        self.family
    }

    /// One more than the largest id of the model, without added tokens.
    pub(crate) fn model_size(&self) -> usize {
        self.whole.ids()
    }

    /// Ids that the post-processor puts before a text.
    pub fn prefix(&self) -> &[i32] {
        &self.prefix
    }

    /// Ids that the post-processor puts after a text.
    pub fn suffix(&self) -> &[i32] {
        &self.suffix
    }
}
