//! Is this tokenizer.json one of ours? By structure alone, never by name.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use tokenizers::models::bpe::{BpeBuilder, Vocab as CrateVocab};
use tokenizers::{
    DecoderWrapper, NormalizerWrapper, PaddingParams, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer, TruncationParams,
};

use super::added::{AddedToken, AddedTokens};
use super::classes::Classes;
use super::merge::Merges;
use super::normal;
use super::scan::Family;
use super::{Bpe, next_owner};

/// Ids from here on are not ours: tables are indexed by id.
const MAX_ID: u32 = 1 << 24;
/// Longer added tokens would make every look-ahead as long.
const MAX_ADDED_BYTES: usize = 4096;

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

/// A tokenizer.json, read once for this engine and for the `tokenizers` crate.
#[derive(Deserialize)]
pub(crate) struct File<'a> {
    version: Option<String>,
    // Switched off, but the crate wants them well-formed.
    #[serde(rename = "truncation")]
    _truncation: Option<TruncationParams>,
    #[serde(rename = "padding")]
    _padding: Option<PaddingParams>,
    #[serde(default)]
    added_tokens: Vec<FileToken>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    #[serde(borrow)]
    model: Model<'a>,
}

#[derive(Deserialize)]
#[expect(clippy::struct_excessive_bools, reason = "the file's own fields")]
struct FileToken {
    id: u32,
    content: String,
    single_word: bool,
    lstrip: bool,
    rstrip: bool,
    normalized: bool,
    special: bool,
}

#[derive(Deserialize)]
struct Model<'a> {
    r#type: Option<String>,
    dropout: Option<f64>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    fuse_unk: Option<bool>,
    byte_fallback: Option<bool>,
    ignore_merges: Option<bool>,
    #[serde(borrow)]
    vocab: Vocab<'a>,
    #[serde(borrow)]
    merges: Vec<FileMerge<'a>>,
}

/// A JSON string that borrows where it has no escapes.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// Token to id. Hashing is a good part of loading, hence not the standard library's hash.
type Ids<'a> = HashMap<Cow<'a, str>, u32, ahash::RandomState>;

struct Vocab<'a>(Ids<'a>);

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
enum FileMerge<'a> {
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
    /// Builds the engine, or says why not.
    pub(crate) fn engine(&self) -> Result<Bpe, Refusal> {
        let nfc = normalizer(self.normalizer.as_ref())?;
        let family = pre_tokenizer(self.pre_tokenizer.as_ref())?;
        let (prefix, suffix) = post_processor(self.post_processor.as_ref())?;
        plain(&self.model)?;
        let classes = Classes::linked().map_err(Refusal::Classes)?;

        let vocab = &self.model.vocab.0;
        check_ids(vocab)?;
        let byte_ids = byte_ids(vocab)?;
        let merges = Merges::new(&byte_ids, &merges(&self.model.merges, vocab)?);
        let (raw, normal) = added_tokens(&self.added_tokens, vocab, nfc)?;

        let symbols = Symbols::new();
        let mut token_bytes = vec![0; vocab.values().max().map_or(0, |&id| id as usize + 1)];
        let mut whole_words = HashMap::new();
        for (token, &id) in vocab {
            // Every symbol is one byte. Tokens of other characters are never made, so their length does not matter.
            token_bytes[id as usize] = token.chars().count() as u32;
            if self.model.ignore_merges == Some(true)
                && let Some(bytes) = symbols.bytes(token)
            {
                whole_words.insert(bytes.into(), id as i32);
            }
        }
        let longest_added = raw.longest().max(normal.longest());
        Ok(Bpe {
            owner: next_owner(),
            family,
            nfc,
            whole_words,
            merges,
            raw,
            normal,
            longest_added,
            prefix,
            suffix,
            token_bytes,
            classes,
            sample: sample(vocab, &symbols, &self.added_tokens),
        })
    }

    /// The same file in the `tokenizers` crate, with truncation and padding off; for files that [`Self::engine`] takes.
    ///
    /// Same as `tokenizer_json.parse()`, which builds the whole model as a tree of JSON values first and needs four
    /// times as long.
    pub(crate) fn oracle(&self) -> tokenizers::Result<Tokenizer> {
        fn part<T: serde::de::DeserializeOwned>(
            value: Option<&Value>,
        ) -> serde_json::Result<Option<T>> {
            value.map_or(Ok(None), |value| serde_json::from_value(value.clone()))
        }
        let vocab: CrateVocab =
            self.model.vocab.0.iter().map(|(token, id)| (token.to_string(), *id)).collect();
        let merges = self.model.merges.iter().filter_map(|merge| match merge {
            FileMerge::Pair(left, right) => Some((left.to_string(), right.to_string())),
            FileMerge::Joined(both) if both.starts_with("#version") => None,
            FileMerge::Joined(both) => {
                both.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()))
            }
        });
        let model = BpeBuilder::new()
            .vocab_and_merges(vocab, merges.collect())
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

fn check_ids(vocab: &Ids) -> Result<(), Refusal> {
    let mut used = Vec::new();
    for &id in vocab.values() {
        check_id(id)?;
        if used.len() <= id as usize {
            used.resize(id as usize + 1, false);
        }
        if std::mem::replace(&mut used[id as usize], true) {
            return Err(Refusal::Id(id, "belongs to two tokens"));
        }
    }
    Ok(())
}

fn check_id(id: u32) -> Result<(), Refusal> {
    if id < MAX_ID { Ok(()) } else { Err(Refusal::Id(id, "is larger than any vocabulary")) }
}

fn plain(model: &Model) -> Result<(), Refusal> {
    let refuse = |field, found: &dyn fmt::Debug| Err(Refusal::Model(field, format!("{found:?}")));
    match model {
        Model { r#type, .. } if r#type.as_deref() != Some("BPE") => refuse("type", r#type),
        Model { dropout: Some(p), .. } => refuse("dropout", p),
        Model { unk_token: Some(token), .. } => refuse("unk_token", token),
        Model { continuing_subword_prefix: Some(s), .. } if !s.is_empty() => {
            refuse("continuing_subword_prefix", s)
        }
        Model { end_of_word_suffix: Some(s), .. } if !s.is_empty() => {
            refuse("end_of_word_suffix", s)
        }
        Model { byte_fallback: Some(true), .. } => refuse("byte_fallback", &true),
        _ => Ok(()),
    }
}

fn kind(value: &Value) -> &str {
    value.get("type").and_then(Value::as_str).unwrap_or("")
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

/// Whether the normalizer is NFC (true) or nothing (false).
fn normalizer(value: Option<&Value>) -> Result<bool, Refusal> {
    let Some(value) = value.filter(|v| !v.is_null()) else { return Ok(false) };
    match kind(value) {
        "NFC" => Ok(true),
        "Sequence" => {
            let parts = value.get("normalizers").and_then(Value::as_array);
            let parts = parts.ok_or_else(|| Refusal::Normalizer(short(value)))?;
            parts.iter().try_fold(false, |nfc, part| Ok(nfc | normalizer(Some(part))?))
        }
        _ => Err(Refusal::Normalizer(short(value))),
    }
}

fn pre_tokenizer(value: Option<&Value>) -> Result<Family, Refusal> {
    let Some(value) = value else { return Err(Refusal::PreTokenizer("null".to_owned())) };
    let refuse = || Refusal::PreTokenizer(short(value));
    let parts = match kind(value) {
        "Sequence" => value.get("pretokenizers").and_then(Value::as_array).ok_or_else(refuse)?,
        _ => std::slice::from_ref(value),
    };
    let (last, splits) = parts.split_last().ok_or_else(refuse)?;
    if kind(last) != "ByteLevel" || last.get("add_prefix_space") != Some(&Value::Bool(false)) {
        return Err(refuse());
    }
    let uses_regex = match last.get("use_regex") {
        None => true,
        Some(value) => value.as_bool().ok_or_else(refuse)?,
    };
    if uses_regex {
        return if splits.is_empty() { Ok(Family::Gpt2) } else { Err(refuse()) };
    }
    let mut inverted = false;
    let mut regexes = Vec::with_capacity(splits.len());
    for split in splits {
        let text = split.pointer("/pattern/Regex").and_then(Value::as_str);
        let behavior = split.get("behavior").and_then(Value::as_str);
        let invert = split.get("invert").and_then(Value::as_bool);
        match (kind(split), text, behavior, invert) {
            ("Split", Some(text), Some("Isolated"), Some(false)) => regexes.push(text),
            ("Split", Some(text), Some("Removed"), Some(true)) => {
                inverted = true;
                regexes.push(text);
            }
            _ => return Err(refuse()),
        }
    }
    let unknown = || Refusal::Regex(regexes.iter().map(|&r| r.to_owned()).collect());
    let family = Family::from_regexes(&regexes).ok_or_else(unknown)?;
    if inverted && !family.covers_all() { Err(refuse()) } else { Ok(family) }
}

/// Ids before and after a single text.
fn post_processor(value: Option<&Value>) -> Result<(Vec<i32>, Vec<i32>), Refusal> {
    let nothing = (Vec::new(), Vec::new());
    let Some(value) = value.filter(|v| !v.is_null()) else { return Ok(nothing) };
    match kind(value) {
        "ByteLevel" => Ok(nothing),
        "TemplateProcessing" => template(value).ok_or_else(|| Refusal::PostProcessor(short(value))),
        "Sequence" => {
            let parts = value.get("processors").and_then(Value::as_array);
            let parts = parts.ok_or_else(|| Refusal::PostProcessor(short(value)))?;
            let (mut prefix, mut suffix) = nothing;
            for part in parts {
                let (before, after) = post_processor(Some(part))?;
                prefix.splice(0..0, before);
                suffix.extend(after);
            }
            Ok((prefix, suffix))
        }
        _ => Err(Refusal::PostProcessor(short(value))),
    }
}

fn template(value: &Value) -> Option<(Vec<i32>, Vec<i32>)> {
    let (mut prefix, mut suffix, mut seen) = (Vec::new(), Vec::new(), false);
    for piece in value.get("single")?.as_array()? {
        if let Some(special) = piece.get("SpecialToken") {
            let name = special.get("id")?.as_str()?;
            let ids = value.get("special_tokens")?.get(name)?.get("ids")?.as_array()?;
            for id in ids {
                let id = u32::try_from(id.as_u64()?).ok().filter(|&id| id < MAX_ID)?;
                if seen { &mut suffix } else { &mut prefix }.push(id as i32);
            }
        } else {
            if seen || piece.pointer("/Sequence/id")?.as_str()? != "A" {
                return None;
            }
            seen = true;
        }
    }
    seen.then_some((prefix, suffix))
}

/// GPT-2's printable characters of the 256 bytes.
///
/// Source: openai/gpt-2, `src/encoder.py`, `bytes_to_unicode`.
struct Symbols {
    of_byte: [char; 256],
    byte_of: HashMap<char, u8>,
}

impl Symbols {
    fn new() -> Self {
        let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let mut others = (256u32..).filter_map(char::from_u32);
        let mut symbols = Self { of_byte: ['\0'; 256], byte_of: HashMap::new() };
        for byte in 0..=255u8 {
            let other = if printable(byte) { None } else { others.next() };
            let symbol = other.unwrap_or(char::from(byte));
            symbols.of_byte[byte as usize] = symbol;
            symbols.byte_of.insert(symbol, byte);
        }
        symbols
    }

    /// The bytes of a token, if it is made of symbols.
    fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        token.chars().map(|c| self.byte_of.get(&c).copied()).collect()
    }
}

fn byte_ids(vocab: &Ids) -> Result<[u32; 256], Refusal> {
    let mut ids = [0; 256];
    for (byte, symbol) in (0..=255u8).zip(Symbols::new().of_byte) {
        match vocab.get(symbol.encode_utf8(&mut [0; 4]) as &str) {
            Some(&id) => ids[byte as usize] = id,
            // No UTF-8 text holds these; NeoX lacks their symbols.
            None if matches!(byte, 0xc0 | 0xc1 | 0xf5..) => {}
            None => return Err(Refusal::MissingByte(byte)),
        }
    }
    Ok(ids)
}

fn merges(merges: &[FileMerge], vocab: &Ids) -> Result<Vec<(u32, u32, u32)>, Refusal> {
    let mut joined = String::new();
    let mut out: Vec<(u32, u32, u32)> = Vec::with_capacity(merges.len());
    let mut tokens = vec![""; vocab.len()];
    for (token, id) in vocab {
        if let Some(place) = tokens.get_mut(*id as usize) {
            *place = token;
        }
    }
    // The older form may start with a version line, which has no rank.
    let counted =
        merges.iter().filter(|m| !matches!(m, FileMerge::Joined(s) if s.starts_with("#version")));
    for (rank, merge) in counted.enumerate() {
        let (left, right) = match merge {
            FileMerge::Pair(left, right) => (&**left, &**right),
            FileMerge::Joined(both) => match both.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => (left, right),
                _ => return Err(Refusal::Merge(rank, format!("{both:?} is not a pair"))),
            },
        };
        joined.clear();
        joined.extend([left, right]);
        let id = |token: &str| {
            let missing = || Refusal::Merge(rank, format!("{token:?} is not in the vocabulary"));
            vocab.get(token).copied().ok_or_else(missing)
        };
        // Mostly a merge makes the token with the id behind that of the merge before.
        let next = out.last().map_or(0, |merge| merge.2 + 1);
        let result =
            if tokens.get(next as usize) == Some(&joined.as_str()) { next } else { id(&joined)? };
        out.push((id(left)?, id(right)?, result));
    }
    Ok(out)
}

/// The tokens found in raw text, and those found in normalised text, with the ids that the `tokenizers` crate gives.
fn added_tokens(
    tokens: &[FileToken],
    vocab: &Ids,
    nfc: bool,
) -> Result<(AddedTokens, AddedTokens), Refusal> {
    let (mut raw, mut normal) = (Vec::new(), Vec::new());
    let (mut contents, mut ids) = (HashSet::new(), HashSet::new());
    let mut next_id = vocab.len() as u32;
    for token in tokens {
        let refuse = |what| Err(Refusal::AddedToken(token.content.clone(), what));
        if token.lstrip || token.rstrip || token.single_word {
            return refuse("has `lstrip`, `rstrip` or `single_word`");
        }
        if token.content.is_empty() || token.content.len() > MAX_ADDED_BYTES {
            return refuse("is empty or very long");
        }
        let content = if token.normalized && nfc {
            normal::nfc(&token.content)
        } else {
            token.content.clone()
        };
        if !contents.insert((token.normalized, content.clone())) {
            return refuse("occurs twice");
        }
        // The crate ignores the `id` of the file: known tokens keep theirs, new ones are numbered in order.
        let id = vocab.get(&*token.content).copied().unwrap_or_else(|| {
            next_id += 1;
            next_id - 1
        });
        if id != token.id {
            return refuse("has an id that the `tokenizers` crate would change");
        }
        check_id(id)?;
        if !ids.insert(id) {
            return refuse("shares its id with another");
        }
        let list = if token.normalized { &mut normal } else { &mut raw };
        list.push(AddedToken { content, id: id as i32, special: token.special });
    }
    Ok((AddedTokens::new(&raw), AddedTokens::new(&normal)))
}

/// Texts of the file's own for the self-check: added tokens in two surroundings, and every so-manieth token.
fn sample(vocab: &Ids, symbols: &Symbols, added: &[FileToken]) -> Vec<String> {
    let mut texts = Vec::new();
    for token in added.iter().take(256) {
        texts.push(format!("a{0} b{0}{0}\n{0}c", token.content));
        texts.push(format!("  {} ", token.content));
    }
    let step = (vocab.len() / 1000).max(1) as u32;
    let mut chosen: Vec<_> = vocab.iter().filter(|(_, id)| **id % step == 0).collect();
    chosen.sort_unstable_by_key(|(_, id)| **id);
    for (token, _) in chosen {
        texts.extend(symbols.bytes(token).and_then(|bytes| String::from_utf8(bytes).ok()));
    }
    texts
}
