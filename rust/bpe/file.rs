//! A tokenizer.json as it lies on disk.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::models::bpe::{BpeBuilder, Vocab as CrateVocab};
use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PaddingParams, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer, TruncationParams,
};

use super::refusal::Refusal;

/// A tokenizer.json, read once for this engine and for the `tokenizers` crate.
#[derive(Deserialize)]
pub(crate) struct File<'a> {
    pub(super) version: Option<String>,
    // Switched off, but the crate wants them well-formed.
    #[serde(rename = "truncation")]
    pub(super) _truncation: Option<TruncationParams>,
    #[serde(rename = "padding")]
    pub(super) _padding: Option<PaddingParams>,
    #[serde(default)]
    pub(super) added_tokens: Vec<FileToken>,
    pub(super) normalizer: Option<Value>,
    pub(super) pre_tokenizer: Option<Value>,
    pub(super) post_processor: Option<Value>,
    pub(super) decoder: Option<Value>,
    #[serde(borrow)]
    pub(super) model: Model<'a>,
}

#[derive(Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "the file's own fields")]
pub(super) struct FileToken {
    pub(super) id: u32,
    pub(super) content: String,
    pub(super) single_word: bool,
    pub(super) lstrip: bool,
    pub(super) rstrip: bool,
    pub(super) normalized: bool,
    pub(super) special: bool,
}

#[derive(Deserialize)]
pub(super) struct Model<'a> {
    pub(super) r#type: Option<String>,
    pub(super) dropout: Option<f64>,
    pub(super) unk_token: Option<String>,
    pub(super) continuing_subword_prefix: Option<String>,
    pub(super) end_of_word_suffix: Option<String>,
    pub(super) fuse_unk: Option<bool>,
    pub(super) byte_fallback: Option<bool>,
    pub(super) ignore_merges: Option<bool>,
    #[serde(borrow)]
    pub(super) vocab: Vocab<'a>,
    #[serde(borrow)]
    pub(super) merges: Vec<FileMerge<'a>>,
}

/// A JSON string that borrows where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Token to id. Hashing is a good part of loading, hence not the standard library's hash.
pub(super) type Ids<'a> = HashMap<Cow<'a, str>, u32, ahash::RandomState>;

pub(super) struct Vocab<'a>(pub(super) Ids<'a>);

impl<'de: 'a, 'a> Deserialize<'de> for Vocab<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Vocab<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from token to id")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vocab<'de>, A::Error> {
                let mut vocab = Ids::with_capacity_and_hasher(1 << 17, <_>::default());
                while let Some((Text(token), id)) = map.next_entry()? {
                    vocab.insert(token, id);
                }
                Ok(Vocab(vocab))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// A pair `["a", "b"]`, or the older `"a b"`.
pub(super) enum FileMerge<'a> {
    Pair(Cow<'a, str>, Cow<'a, str>),
    Joined(Cow<'a, str>),
}

impl<'de: 'a, 'a> Deserialize<'de> for FileMerge<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = FileMerge<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a pair of strings, or one string with a space")
            }
            fn visit_borrowed_str<E>(self, joined: &'de str) -> Result<FileMerge<'de>, E> {
                Ok(FileMerge::Joined(Cow::Borrowed(joined)))
            }
            fn visit_str<E>(self, joined: &str) -> Result<FileMerge<'de>, E> {
                Ok(FileMerge::Joined(Cow::Owned(joined.to_owned())))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<FileMerge<'de>, A::Error> {
                use serde::de::Error;
                let pair = (seq.next_element::<Text>()?, seq.next_element::<Text>()?);
                match (pair, seq.next_element::<Text>()?) {
                    ((Some(Text(left)), Some(Text(right))), None) => {
                        Ok(FileMerge::Pair(left, right))
                    }
                    _ => Err(A::Error::custom("a merge must have two parts")),
                }
            }
        }
        deserializer.deserialize_any(Either)
    }
}

/// What is left of a vocabulary: whether it has a token with this id.
pub(crate) type Keeps<'a> = &'a dyn Fn(&str, u32) -> bool;

/// Reads the file, or says why it is not even the shape of a tokenizer.json.
pub(crate) fn parse(tokenizer_json: &str) -> Result<File<'_>, Refusal> {
    let file: File =
        serde_json::from_str(tokenizer_json).map_err(|e| Refusal::Json(e.to_string()))?;
    match file.version.as_deref() {
        None | Some("1.0") => Ok(file),
        Some(version) => Err(Refusal::Json(format!("version {version:?}"))),
    }
}

impl File<'_> {
    /// The number of ids, for files that `File::engine` takes.
    pub(crate) fn count(&self) -> usize {
        let vocab = &self.model.vocab.0;
        let new = |token: &&FileToken| !vocab.contains_key(token.content.as_str());
        vocab.len() + self.added_tokens.iter().filter(new).count()
    }

    /// The same file in the `tokenizers` crate, with truncation and padding off and without a cache of words; for files
    /// that `File::engine` takes. With `keeps` only what that says of token and id, and the added tokens.
    ///
    /// Same as `tokenizer_json.parse()`, which builds the whole model as a tree of JSON values first and needs four
    /// times as long.
    pub(crate) fn oracle(&self, keeps: Option<Keeps<'_>>) -> tokenizers::Result<Tokenizer> {
        fn part<T: serde::de::DeserializeOwned>(
            value: Option<&Value>,
        ) -> serde_json::Result<Option<T>> {
            value.map_or(Ok(None), |value| serde_json::from_value(value.clone()))
        }
        let whole = &self.model.vocab.0;
        let mut vocab: CrateVocab = whole
            .iter()
            .filter(|&(token, &id)| keeps.is_none_or(|keeps| keeps(token, id)))
            .map(|(token, &id)| (token.to_string(), id))
            .collect();
        let mut joined = String::new();
        let merges = self.model.merges.iter().filter_map(|merge| {
            let (left, right): (&str, &str) = match merge {
                FileMerge::Pair(left, right) => (left, right),
                FileMerge::Joined(both) if both.starts_with("#version") => return None,
                FileMerge::Joined(both) => both.split_once(' ')?,
            };
            joined.clear();
            joined.extend([left, right]);
            let has = |token: &str| vocab.contains_key(token);
            (keeps.is_none() || (has(left) && has(right) && has(&joined)))
                .then(|| (left.to_owned(), right.to_owned()))
        });
        let merges = merges.collect();
        if keeps.is_some() {
            // The crate numbers what it does not know behind the vocabulary, whose size is another one here.
            vocab.extend(self.added_tokens.iter().map(|token| (token.content.clone(), token.id)));
        }
        let model = BpeBuilder::new()
            .vocab_and_merges(vocab, merges)
            // Its cache belongs to the thread and outlives the tokenizer: 0.9 MB for each that was ever loaded.
            .cache_capacity(0)
            .fuse_unk(self.model.fuse_unk.unwrap_or(false))
            .ignore_merges(self.model.ignore_merges.unwrap_or(false))
            .build()?;
        let mut oracle = Tokenizer::new(model);
        oracle.with_normalizer(part::<NormalizerWrapper>(self.normalizer.as_ref())?)?;
        oracle.with_pre_tokenizer(part::<PreTokenizerWrapper>(self.pre_tokenizer.as_ref())?);
        oracle.with_post_processor(part::<PostProcessorWrapper>(self.post_processor.as_ref())?);
        oracle.with_decoder(part::<DecoderWrapper>(self.decoder.as_ref())?);
        let added = self.added_tokens.iter().map(|token| {
            tokenizers::AddedToken::from(token.content.clone(), token.special)
                .single_word(token.single_word)
                .lstrip(token.lstrip)
                .rstrip(token.rstrip)
                .normalized(token.normalized)
        });
        oracle.add_tokens(added.collect::<Vec<_>>())?;
        Ok(oracle)
    }
}
