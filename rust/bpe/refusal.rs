//! Why a file is not ours.

use std::fmt;

/// Why a tokenizer.json is not served by the engine `bpe`. It may still be a good file for the `tokenizers` crate.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Not JSON, or not the shape of a tokenizer.json.
    Json(String),
    /// The model is not a plain byte-level BPE: the field and what it holds.
    Model(&'static str, String),
    /// The normalizer is neither absent nor NFC.
    Normalizer(String),
    /// The pre-tokenizer is no known sequence of splits and `ByteLevel`.
    PreTokenizer(String),
    /// The regexes of the splits belong to no known family.
    Regex(Vec<String>),
    /// The post-processor does more than put ids before and after.
    PostProcessor(String),
    /// A byte of UTF-8 has no symbol in the vocabulary; the `tokenizers` crate drops it in silence.
    MissingByte(u8),
    /// An id is used twice or is too large.
    Id(u32, &'static str),
    /// A merge names a token that is not in the vocabulary, or is not a pair.
    Merge(usize, String),
    /// An added token: its content and what is not ours about it.
    AddedToken(String, &'static str),
    /// The linked regex engine could not be asked for its character classes.
    Classes(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Json(message) => write!(f, "not a tokenizer.json: {message}"),
            Self::Model(field, found) => write!(f, "`model.{field}` is {found}"),
            Self::Normalizer(found) => write!(f, "`normalizer` is not null or NFC: {found}"),
            Self::PreTokenizer(found) => write!(f, "`pre_tokenizer` is not byte-level: {found}"),
            Self::Regex(found) => write!(f, "`pre_tokenizer` has an unknown regex: {found:?}"),
            Self::PostProcessor(found) => write!(f, "`post_processor` is not a template: {found}"),
            Self::MissingByte(byte) => write!(f, "byte {byte} has no symbol in the vocabulary"),
            Self::Id(id, what) => write!(f, "token id {id} {what}"),
            Self::Merge(rank, found) => write!(f, "merge {rank}: {found}"),
            Self::AddedToken(content, what) => write!(f, "added token {content:?} {what}"),
            Self::Classes(message) => write!(f, "character classes: {message}"),
        }
    }
}

impl std::error::Error for Refusal {}
