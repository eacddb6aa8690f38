//! Is this tokenizer.json one of ours? By structure alone, never by name.

use std::collections::HashSet;
use std::fmt;

use serde_json::Value;

use super::added::{AddedToken, AddedTokens};
use super::classes::Classes;
use super::file::{File, FileMerge, FileToken, Ids, Model, parse};
use super::model::{Bpe, next_owner};
use super::normal;
use super::ranks::{Merges, NONE};
use super::refusal::Refusal;
use super::scan::Family;
use super::symbols::Symbols;
use super::whole::{Whole, proven};

/// Ids from here on are not ours: tables are indexed by id.
const MAX_ID: u32 = NONE;
/// Longer added tokens would make every look-ahead as long.
const MAX_ADDED_BYTES: usize = 4096;

impl Bpe {
    /// Reads a tokenizer.json whose structure is known; `truncation` and `padding` blocks are not looked at.
    ///
    /// # Errors
    /// Why the file is not ours. Never a panic, whatever the file holds.
    pub fn recognise(tokenizer_json: &str) -> Result<Self, Refusal> {
        parse(tokenizer_json)?.engine()
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
        let tokens = by_id(vocab);
        let listed = merges(&self.model.merges, vocab, &tokens)?;
        let merges = Merges::new(&byte_ids, &listed);
        let (raw, normal) = added_tokens(&self.added_tokens, vocab, nfc)?;

        let symbols = Symbols::new();
        let bytes = tokens.iter().map(|token| symbols.bytes(token));
        let whole = if self.model.ignore_merges == Some(true) {
            Whole::new(bytes, |_| true)
        } else {
            let proven = proven(tokens.len(), &listed, &merges);
            Whole::new(bytes, |id| proven[id])
        };
        let longest_added = raw.longest().max(normal.longest());
        Ok(Bpe {
            owner: next_owner(),
            family,
            nfc,
            whole,
            merges,
            raw,
            normal,
            longest_added,
            prefix,
            suffix,
            classes,
            sample: sample(vocab, &symbols, &self.added_tokens),
        })
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

/// The tokens by id, empty where an id has none.
fn by_id<'a>(vocab: &'a Ids) -> Vec<&'a str> {
    let mut tokens = vec![""; vocab.values().max().map_or(0, |&id| id as usize + 1)];
    for (token, &id) in vocab {
        tokens[id as usize] = token;
    }
    tokens
}

fn merges(
    merges: &[FileMerge],
    vocab: &Ids,
    tokens: &[&str],
) -> Result<Vec<(u32, u32, u32)>, Refusal> {
    let mut joined = String::new();
    let mut out: Vec<(u32, u32, u32)> = Vec::with_capacity(merges.len());
    // The older form may start with a version line, which has no rank.
    let counted =
        merges.iter().filter(|m| !matches!(m, FileMerge::Joined(s) if s.starts_with("#version")));
    for (rank, merge) in counted.enumerate() {
        if rank >= MAX_ID as usize {
            return Err(Refusal::Merge(rank, "is more than any model has".to_owned()));
        }
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
