//! Text to ids by one of two engines: our byte-level BPE where it recognises the file and its self-check agrees, else
//! the `tokenizers` crate, made safe to call and able to say which bytes a token covers.

mod control;
mod engine;
mod guard;
mod outline;
mod seams;
mod source;
mod spelling;
mod warm;

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;

use once_cell::race::OnceBox;
use tokenizers::Encoding;

use crate::bpe::{Bpe, Found, Inside, Keep, PairIds, Scratch, not_special};
use crate::error::{Error, Result};
use crate::read::chat::RESERVED;
use crate::template::{Fallback, Literals, Template};
use control::Candidate;
pub use control::Control;
use engine::{
    InCrate, check_dropout, checked, excerpt, finish, prepare, recognised, signed, surroundings,
    whole,
};
use guard::guarded;
pub use outline::outline;
pub use source::{Added, Source};
use spelling::Spelling;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Encodes text and renders conversations. Immutable, shared by all threads.
pub struct Tokenizer {
    inner: InCrate,
    fast: std::result::Result<Bpe, String>,
    prefix: Vec<i32>,
    suffix: Vec<i32>,
    /// For the crate alone, where the bytes of its ids say at once where they end.
    spelling: Option<Spelling>,
    named: Vec<(String, String)>,
    vocab_size: usize,
    gaps: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    /// How the EOS id is spelt, if EOS is an added token.
    eos_text: Option<String>,
    /// Whether that spelling stays text.
    eos_is_split: bool,
    template: Option<Template>,
    tool_template: Option<Template>,
    control: Control,
    /// What the templates read, sorted.
    variables: Vec<String>,
    /// A template that minijinja cannot compile may read anything.
    reads_any: bool,
    split_special: bool,
}

/// The bytes that ids cover which end there, one behind the other.
pub fn between(ends: &[u32]) -> Vec<Range<usize>> {
    let mut start = 0;
    let next = |end: &u32| std::mem::replace(&mut start, *end as usize)..*end as usize;
    ends.iter().map(next).collect()
}

/// Ids that no real vocabulary reaches: twice the tokens and this many more.
const GAP_SLACK: usize = 1 << 16;

impl Tokenizer {
    /// Builds a tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]: the crate refuses `tokenizer.json`, an id is out of bounds, a named token is unknown.
    pub fn new(source: Source) -> Result<Self> {
        warm::warm();
        let with_added = |mut inner: tokenizers::Tokenizer| {
            let beyond = guarded("tokenizer.json", || prepare(&mut inner, &source.added))?;
            Ok::<_, Error>((inner, beyond))
        };
        let named = source.named.iter().map(|(_, token)| token.as_str());
        let names: HashSet<&str> =
            named.chain(source.added.iter().map(|added| added.content.as_str())).collect();
        let wanted = |token: &str, id: u32| source.ids.contains(&Some(id)) || names.contains(token);
        let mut ours = None;
        if let Ok((bpe, part, count)) = excerpt(&source.json, wanted) {
            let (part, beyond) = with_added(part)?;
            if !beyond && let Ok(bpe) = checked(bpe, &part) {
                ours = Some((bpe, part, count));
            }
        }
        let is_part = ours.is_some();
        let (fast, mut facts, count) = if let Some((bpe, part, count)) = ours {
            (Ok(bpe), part, count)
        } else {
            let bpe = recognised(&source.json);
            let is_oracle = bpe.is_ok();
            let (mut all, beyond) = with_added(whole(&source.json, is_oracle)?)?;
            check_dropout(&all)?;
            let bpe = if beyond {
                recognised(&guarded("tokenizer.json", || all.to_string(false))?)
            } else {
                bpe
            };
            let fast = bpe.and_then(|bpe| checked(bpe, &all));
            if fast.is_err() && is_oracle {
                // What encodes wants the cache of words that the oracle lacks.
                all = with_added(whole(&source.json, false)?)?.0;
            }
            let count = all.get_vocab_size(true);
            (fast, all, count)
        };
        let decoder = facts.get_added_tokens_decoder();
        let (count, vocab_size) = if let Ok(bpe) = &fast {
            let added = decoder.keys().max().map_or(0, |id| *id as usize + 1);
            (count, bpe.model_size().max(added))
        } else {
            let vocab = facts.get_vocab(true);
            (vocab.len(), vocab.values().max().map_or(0, |id| *id as usize + 1))
        };
        if vocab_size > i32::MAX as usize || vocab_size > 2 * count + GAP_SLACK {
            let message = format!(
                "tokenizer.json: expected ids below about {count}, the number of tokens, found {}",
                vocab_size.saturating_sub(1)
            );
            return Err(Error::Tokenizer(message));
        }
        let named_id = |name: &str, forced: Option<u32>| -> Result<Option<u32>> {
            if let Some(id) = forced {
                if id as usize >= vocab_size {
                    let message =
                        format!("`{name}`: expected an id in 0..{vocab_size}, found {id}");
                    return Err(Error::Tokenizer(message));
                }
                return Ok(Some(id));
            }
            Ok(source.named.iter().find(|(n, _)| n == name).and_then(|(_, t)| facts.token_to_id(t)))
        };
        let [bos, eos, pad] = source.ids;
        let bos = named_id("bos_token", bos)?;
        let eos = named_id("eos_token", eos)?;
        let pad = named_id("pad_token", pad)?;
        let (prefix, suffix) = surroundings(facts.get_post_processor())?;
        let template = source.template.as_deref().map(Template::new);
        let tool_template = source.tool_template.as_deref().map(Template::new);
        let mut reads_any = false;
        let eos_token = eos.and_then(|id| Some((facts.id_to_token(id)?, decoder.get(&id)?)));
        let eos_is_split =
            eos_token.as_ref().is_some_and(|(_, t)| source.split_special && t.special);
        let eos_text = eos_token.map(|(text, _)| text);
        let normalises = facts.get_normalizer().is_some();
        let spelling = if fast.is_err() { Spelling::of(&facts, vocab_size) } else { None };
        let inner = if is_part {
            InCrate::Later { json: source.json, added: source.added, made: OnceBox::new() }
        } else {
            // Behind the self-check, which compares without it.
            finish(&mut facts, source.split_special);
            InCrate::Here(Box::new(facts))
        };
        let mut tokenizer = Self {
            variables: Vec::new(),
            reads_any,
            spelling,
            control: Control::default(),
            fast,
            inner,
            prefix,
            suffix,
            named: source.named,
            vocab_size,
            gaps: vocab_size - count.min(vocab_size),
            bos,
            eos,
            pad,
            eos_text,
            eos_is_split,
            template,
            tool_template,
            split_special: source.split_special,
        };
        let templates = [&tokenizer.template, &tokenizer.tool_template];
        let templates: Vec<&Template> = templates.into_iter().flatten().collect();
        let literals: Vec<_> = templates.iter().map(|template| template.literals()).collect();
        let sources: Vec<_> =
            templates.iter().map(|template| template.source().to_owned()).collect();
        let mut variables = Vec::new();
        for template in templates {
            match template.reads() {
                Some(names) => variables.extend(names),
                None => reads_any = true,
            }
        }
        variables.sort();
        variables.dedup();
        (tokenizer.variables, tokenizer.reads_any) = (variables, reads_any);
        tokenizer.control = tokenizer.control_of(decoder, normalises, &literals, &sources);
        Ok(tokenizer)
    }

    /// What steers a model, by what templates write; special tokens do not where their spelling stays text.
    fn control_of(
        &mut self,
        added: impl IntoIterator<Item = (u32, tokenizers::AddedToken)>,
        normalises: bool,
        literals: &[Literals],
        sources: &[String],
    ) -> Control {
        let mut tokens = Vec::new();
        for (id, token) in added {
            if !(self.split_special && token.special) {
                let normalised = normalises && token.normalized;
                let raw = !token.normalized && !token.single_word && !self.split_special;
                let (id, text, special) = (id as i32, token.content, token.special);
                tokens.push(Candidate { id, text, special, normalised, raw });
            }
        }
        tokens.sort_by_key(|token| token.id);
        // The normaliser of our own engine is NFC.
        let is_ours = self.fast.is_ok();
        let mut control = Control::new(tokens, literals, &self.named, sources, is_ours);
        control.test_marks(|text| self.encode_plain(text).unwrap_or_default());
        if is_ours {
            let as_text = |text: &str| {
                let ids = self.encode_as_text(text, &|found: &Found| !control.has(found.id));
                ids.map(|(ids, _)| ids).unwrap_or_default()
            };
            control.merged = control.merges(as_text, |_| true);
        } else {
            // The crate can leave special tokens as text, and no others.
            self.inner.split_special(true);
            let as_text = |text: &str| self.encode_plain(text).unwrap_or_default();
            control.merged = control.merges(as_text, |token| token.special);
            self.inner.split_special(self.split_special);
        }
        control
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Ids below `vocab_size` that no token has.
    pub fn gaps(&self) -> usize {
        self.gaps
    }

    /// Begin of sequence.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Padding.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// The text that becomes the EOS id, if EOS is an added token.
    pub fn eos_text(&self) -> Option<&str> {
        self.eos_text.as_deref().filter(|_| !self.eos_is_split)
    }

    /// How EOS is spelt, be it text that becomes the id or text that stays text.
    pub fn eos_spelling(&self) -> Option<&str> {
        self.eos_text.as_deref()
    }

    /// Ids that `add_special_tokens` puts before and behind a text.
    pub fn surroundings(&self) -> (&[i32], &[i32]) {
        (&self.prefix, &self.suffix)
    }

    /// Named tokens, as templates know them.
    pub fn named(&self) -> &[(String, String)] {
        &self.named
    }

    /// The chat template of conversations with or without tools.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none.
    pub fn template(&self, with_tools: bool) -> Result<&Template> {
        let template =
            self.tool_template.as_ref().filter(|_| with_tools).or(self.template.as_ref());
        template.ok_or_else(|| {
            Error::Tokenizer(
                "the tokenizer has no chat template\nhint: give `chat_template=`, or rows of strings".to_owned(),
            )
        })
    }

    /// The variables that some template reads, sorted; without those that every template has.
    pub fn variables(&self) -> Vec<&str> {
        self.variables.iter().map(String::as_str).filter(|name| !RESERVED.contains(name)).collect()
    }

    /// Whether some template reads a variable, as far as that is known.
    pub fn reads(&self, name: &str) -> bool {
        self.reads_any || self.variables.binary_search_by(|known| known.as_str().cmp(name)).is_ok()
    }

    /// Renders elsewhere what minijinja cannot; `make` is given the text of each template.
    #[must_use]
    pub fn with_fallback(mut self, make: impl Fn(&str) -> Fallback) -> Self {
        let give = |template: Template| {
            let fallback = make(template.source());
            template.with_fallback(fallback)
        };
        self.template = self.template.map(give);
        self.tool_template = self.tool_template.map(give);
        self
    }

    /// Whether minijinja compiles every chat template.
    pub fn renders_here(&self) -> bool {
        [&self.template, &self.tool_template].into_iter().flatten().all(Template::compiles)
    }

    /// Control tokens and how to find them in text.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The text of `ids`, control tokens spelt out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for an id outside the vocabulary, or if the crate fails.
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        let known =
            |id: &i32| u32::try_from(*id).ok().filter(|id| (*id as usize) < self.vocab_size);
        let ids: Option<Vec<u32>> = ids.iter().map(known).collect();
        let Some(ids) = ids else {
            let message = format!("decode: expected ids in 0..{}", self.vocab_size);
            return Err(Error::Tokenizer(message));
        };
        let inner = self.inner.get(self.split_special)?;
        guarded("decode", || inner.decode(&ids, false))
    }

    /// Which added tokens text may spell, where not all.
    fn keep(&self) -> Keep<'static> {
        self.split_special.then_some(&not_special)
    }

    /// Why the engine is not `bpe`, if it is not.
    pub fn refusal(&self) -> Option<&str> {
        self.fast.as_ref().err().map(String::as_str)
    }

    /// The ids of `text`, with the surroundings if asked for.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the crate fails, [`Error::Limit`] for more than 2 GiB.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<i32>> {
        let mut ids = Vec::new();
        self.encode_onto(text, add_special_tokens, &mut ids)?;
        Ok(ids)
    }

    /// Appends to `ids` what [`Self::encode`] gives.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_onto(
        &self,
        text: &str,
        add_special_tokens: bool,
        ids: &mut Vec<i32>,
    ) -> Result<()> {
        if add_special_tokens {
            ids.extend_from_slice(&self.prefix);
        }
        match &self.fast {
            Ok(bpe) => {
                SCRATCH
                    .with_borrow_mut(|scratch| bpe.encode_into(text, self.keep(), scratch, ids))?;
            }
            Err(_) => ids.extend(self.encode_slowly(text)?),
        }
        if add_special_tokens {
            ids.extend_from_slice(&self.suffix);
        }
        Ok(())
    }

    /// The ids of `text` alone.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<i32>> {
        self.encode(text, false)
    }

    fn encode_slowly(&self, text: &str) -> Result<Vec<i32>> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let inner = self.inner.get(self.split_special)?;
        guarded("encode", || self.ids_of(&inner.encode_fast(text, false)?))
    }

    /// The ids of an encoding by the crate.
    fn ids_of(&self, encoding: &Encoding) -> tokenizers::Result<Vec<i32>> {
        if encoding.get_ids().iter().any(|id| *id as usize >= self.vocab_size) {
            return Err("the tokenizer gave an id outside its vocabulary".into());
        }
        Ok(signed(encoding.get_ids()))
    }

    /// The ids of two texts that begin alike, and how much of either ends at or before byte `border`. `out` is emptied
    /// first.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_pair(&self, texts: [&str; 2], border: usize, out: &mut PairIds) -> Result<()> {
        if let Ok(bpe) = &self.fast {
            return SCRATCH.with_borrow_mut(|scratch| {
                bpe.encode_pair(texts, border, self.keep(), scratch, out)
            });
        }
        let [first, second] = texts;
        out.reused = 0;
        let (first, first_ends) = self.encode_slowly_with_ends(first)?;
        let (second, second_ends) = self.encode_slowly_with_ends(second)?;
        (out.first, out.second) = (first, second);
        out.inside = [Inside::of(&first_ends, border), Inside::of(&second_ends, border)];
        Ok(())
    }

    /// Where the first `count` ids of `text` end.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn end_of(&self, text: &str, count: usize) -> Result<usize> {
        let ends = if let Ok(bpe) = &self.fast {
            let (mut ids, mut ends) = (Vec::new(), Vec::new());
            SCRATCH.with_borrow_mut(|scratch| {
                bpe.encode_with_ends(text, self.keep(), scratch, &mut ids, &mut ends)
            })?;
            ends
        } else {
            self.encode_slowly_with_ends(text)?.1
        };
        let last = count.checked_sub(1).and_then(|i| ends.get(i));
        Ok(last.map_or(0, |end| *end as usize))
    }

    /// The bytes of `text` that each of its ids covers; those of one character may share its bytes.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn covered(&self, text: &str) -> Result<Vec<Range<usize>>> {
        if let Ok(bpe) = &self.fast {
            let (mut ids, mut ends) = (Vec::new(), Vec::new());
            SCRATCH.with_borrow_mut(|scratch| {
                bpe.encode_with_ends(text, self.keep(), scratch, &mut ids, &mut ends)
            })?;
            return self.aligned(text, &ids, &ends);
        }
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let inner = self.inner.get(self.split_special)?;
        let offsets = guarded("encode", || Ok(inner.encode(text, false)?.get_offsets().to_vec()))?;
        // An id of no byte, such as the space that some put before a text, belongs to what comes behind it.
        Ok(offsets.into_iter().map(|(start, end)| start..end.max(start + 1)).collect())
    }

    /// The bytes of `text` that its `ids` cover, which end at `ends`; where the normaliser changed a text, character by
    /// character, as the `tokenizers` crate aligns them.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn aligned(&self, text: &str, ids: &[i32], ends: &[u32]) -> Result<Vec<Range<usize>>> {
        if self.fast.as_ref().is_ok_and(|bpe| bpe.leaves(text)) {
            return Ok(between(ends));
        }
        let inner = self.inner.get(self.split_special)?;
        let found = guarded("encode", || inner.encode(text, false))?;
        if found.get_ids().iter().map(|id| i64::from(*id)).eq(ids.iter().map(|id| i64::from(*id))) {
            return Ok(found.get_offsets().iter().map(|&(a, b)| a..b.max(a + 1)).collect());
        }
        // Control tokens that stay text: what was changed belongs to all ids that it became.
        let mut last = 0..0;
        let shared = |bytes: Range<usize>| {
            if !bytes.is_empty() {
                last = bytes;
            }
            last.clone()
        };
        Ok(between(ends).into_iter().map(shared).collect())
    }

    /// The ids of `text` and where they end, with the control tokens that `keep` refuses left as text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the engine is not `bpe`, which alone can do it.
    pub fn encode_as_text(
        &self,
        text: &str,
        keep: &dyn Fn(&Found) -> bool,
    ) -> Result<(Vec<i32>, Vec<u32>)> {
        let bpe = self.fast.as_ref().map_err(|why| {
            Error::Tokenizer(format!(
                "`special_tokens_in_text=\"text\"` needs the engine bpe: {why}"
            ))
        })?;
        let keep = |found: &Found| keep(found) && !(self.split_special && found.special);
        let (mut ids, mut ends) = (Vec::new(), Vec::new());
        SCRATCH.with_borrow_mut(|scratch| {
            bpe.encode_with_ends(text, Some(&keep), scratch, &mut ids, &mut ends)
        })?;
        Ok((ids, ends))
    }

    /// The ids of `text` and where they end, by the crate. To align ids with bytes costs it less than to encode twice,
    /// and more than to read their bytes, which a byte-level vocabulary has (unless the normaliser changed the text).
    fn encode_slowly_with_ends(&self, text: &str) -> Result<(Vec<i32>, Vec<u32>)> {
        if let Some(spelling) = &self.spelling {
            let ids = self.encode_slowly(text)?;
            if let Some(ends) = spelling.ends(text.as_bytes(), &ids) {
                return Ok((ids, ends));
            }
        }
        if text.is_empty() {
            return Ok((Vec::new(), Vec::new()));
        }
        let inner = self.inner.get(self.split_special)?;
        guarded("encode", || {
            let encoding = inner.encode(text, false)?;
            let mut last = 0;
            let ends = encoding.get_offsets().iter().map(|(_, end)| {
                last = last.max(*end);
                last as u32
            });
            Ok((self.ids_of(&encoding)?, ends.collect()))
        })
    }
}
