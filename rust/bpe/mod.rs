//! The tokenizer engine `bpe`: byte-level BPE for the published families, in safe Rust.
//!
//! Same ids as the `tokenizers` crate for every text, or [`Bpe::recognise`] refuses the file, or [`Bpe::self_check`]
//! reports the difference. What it does not do: `SentencePiece`, Unigram, `WordPiece`, dropout, other normalizers, unknown
//! regexes.
//!
//! A text goes through `added` (added tokens), `normal` (NFC, only where needed), `scan` (words), `cache` (words that
//! came before, by their `key`), `whole` (words that are one token) and `merge` with `ranks`, `lowest` and `sweep` (tokens
//! of a word); `encode` leads it. `classes` are the character classes, `pair` encodes two texts with a common beginning, as
//! far as `border` says that they are alike; `file` reads tokenizer.json, `recognise` makes the `model` of it, `check` is
//! the self-check, against an `excerpt` of the file in the crate.

mod added;
mod border;
mod cache;
mod check;
mod classes;
mod encode;
mod excerpt;
mod file;
mod key;
mod lowest;
mod merge;
mod model;
mod normal;
mod pair;
mod ranks;
mod recognise;
mod refusal;
mod scan;
mod sweep;
mod symbols;
mod whole;

#[cfg(test)]
mod tests;

pub use border::Inside;
pub use check::Mismatch;
pub use encode::{Found, Keep, MAX_TEXT_BYTES, Scratch, not_special};
pub(crate) use excerpt::Excerpt;
pub(crate) use file::parse;
pub use model::Bpe;
pub use pair::PairIds;
pub(crate) use pair::common_prefix;
pub use refusal::Refusal;
pub use scan::Family;
