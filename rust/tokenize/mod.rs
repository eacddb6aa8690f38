//! Text to ids by one of two engines: our byte-level BPE where it recognises the file and its self-check agrees, else
//! the `tokenizers` crate, made safe to call and able to say which bytes a token covers.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use tokenizers::{AddedToken, Encoding, PostProcessor, PostProcessorWrapper, Token};

use crate::bpe::{self, Bpe, Found, Inside, PairIds, Scratch};
use crate::error::{Error, Result};
use crate::template::{Fallback, Template};

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Runs code of another crate: a panic becomes an error, and nothing is printed.
fn guarded<T>(what: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(false);
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Error::Tokenizer(format!("{what}: {e}"))),
        Err(payload) => {
            let text = crate::pool::panic_text(payload.as_ref());
            Err(Error::Tokenizer(format!("{what}: the `tokenizers` crate panicked: {text}")))
        }
    }
}

/// A token that `tokenizer_config.json` adds to those of `tokenizer.json`.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)] // the flags of the file format
pub struct Added {
    /// Its text.
    pub content: String,
    /// Takes white space on its left along.
    pub lstrip: bool,
    /// Takes white space on its right along.
    pub rstrip: bool,
    /// Only between word borders.
    pub single_word: bool,
    /// Searched in normalised text.
    pub normalized: bool,
    /// A control token.
    pub special: bool,
}

/// What a tokenizer is made of.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// The text of `tokenizer.json`.
    pub json: String,
    /// `bos_token`, `eos_token`, ... as templates know them.
    pub named: Vec<(String, String)>,
    /// Tokens that must be there beside those of `json`.
    pub added: Vec<Added>,
    /// Ids that win over the named tokens.
    pub ids: [Option<u32>; 3],
    /// The chat template.
    pub template: Option<String>,
    /// The chat template of conversations with tools, where that is another one.
    pub tool_template: Option<String>,
}

/// Encodes text and renders conversations. Immutable, shared by all threads.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    fast: std::result::Result<Bpe, String>,
    prefix: Vec<i32>,
    suffix: Vec<i32>,
    /// For the crate alone, which gives no bytes.
    spelling: Option<Spelling>,
    named: Vec<(String, String)>,
    vocab_size: usize,
    gaps: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    /// Text that becomes exactly the EOS id.
    eos_text: Option<String>,
    template: Option<Template>,
    tool_template: Option<Template>,
    control: Control,
}

/// Ids that no real vocabulary reaches: twice the tokens and this many more.
const GAP_SLACK: usize = 1 << 16;

impl Tokenizer {
    /// Builds a tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]: the crate refuses `tokenizer.json`, an id is out of bounds, a named token is unknown.
    pub fn new(source: Source) -> Result<Self> {
        let (mut inner, built) = if let Ok((bpe, oracle)) = both(&source.json) {
            (oracle, Some(bpe))
        } else {
            let json = source.json.as_bytes();
            (guarded("tokenizer.json", || tokenizers::Tokenizer::from_bytes(json))?, None)
        };
        let beyond = guarded("tokenizer.json", || {
            inner.with_truncation(None)?;
            inner.with_padding(None);
            add_tokens(&mut inner, &source.added)
        })?;
        let fast = match built {
            _ if beyond => {
                let json = guarded("tokenizer.json", || inner.to_string(false))?;
                recognised(&json).and_then(|bpe| checked(bpe, &inner))
            }
            Some(bpe) => checked(bpe, &inner),
            None => recognised(&source.json).and_then(|bpe| checked(bpe, &inner)),
        };
        let post = inner.get_post_processor().cloned();
        inner.with_post_processor(None::<PostProcessorWrapper>);

        let (count, vocab_size) = if let Ok(bpe) = &fast {
            let decoder = inner.get_added_tokens_decoder();
            let added = decoder.keys().max().map_or(0, |id| *id as usize + 1);
            (inner.get_vocab_size(true), bpe.model_size().max(added))
        } else {
            let vocab = inner.get_vocab(true);
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
            Ok(source.named.iter().find(|(n, _)| n == name).and_then(|(_, t)| inner.token_to_id(t)))
        };
        let [bos, eos, pad] = source.ids;
        let bos = named_id("bos_token", bos)?;
        let eos = named_id("eos_token", eos)?;
        let pad = named_id("pad_token", pad)?;
        let (prefix, suffix) = surroundings(post.as_ref())?;
        let template = source.template.as_deref().map(Template::new);
        let tool_template = source.tool_template.as_deref().map(Template::new);
        let mut tokenizer = Self {
            spelling: fast.is_err().then(|| Spelling::new(&inner, vocab_size)),
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
            eos_text: None,
            template,
            tool_template,
        };
        tokenizer.eos_text = eos.and_then(|id| {
            let text = tokenizer.inner.id_to_token(id)?;
            tokenizer.inner.get_added_tokens_decoder().contains_key(&id).then_some(text)
        });
        tokenizer.control = Control::new(&tokenizer);
        Ok(tokenizer)
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
        guarded("decode", || self.inner.decode(&ids, false))
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
                SCRATCH.with_borrow_mut(|scratch| bpe.encode_into(text, None, scratch, ids))?;
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
        guarded("encode", || {
            let encoding = self.inner.encode_fast(text, false)?;
            if encoding.get_ids().iter().any(|id| *id as usize >= self.vocab_size) {
                return Err("the tokenizer gave an id outside its vocabulary".into());
            }
            Ok(signed(encoding.get_ids()))
        })
    }

    /// The ids of two texts that begin alike, and how much of either ends at or before byte `border`. `out` is emptied
    /// first.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_pair(&self, texts: [&str; 2], border: usize, out: &mut PairIds) -> Result<()> {
        if let Ok(bpe) = &self.fast {
            return SCRATCH
                .with_borrow_mut(|scratch| bpe.encode_pair(texts, border, None, scratch, out));
        }
        let [first, second] = texts;
        out.reused = 0;
        out.first = self.encode_slowly(first)?;
        out.second = self.encode_slowly(second)?;
        out.inside = [
            Inside::of(&self.ends(first, &out.first)?, border),
            Inside::of(&self.ends(second, &out.second)?, border),
        ];
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
                bpe.encode_with_ends(text, None, scratch, &mut ids, &mut ends)
            })?;
            ends
        } else {
            self.ends(text, &self.encode_slowly(text)?)?
        };
        let last = count.checked_sub(1).and_then(|i| ends.get(i));
        Ok(last.map_or(0, |end| *end as usize))
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
        let (mut ids, mut ends) = (Vec::new(), Vec::new());
        SCRATCH.with_borrow_mut(|scratch| {
            bpe.encode_with_ends(text, Some(keep), scratch, &mut ids, &mut ends)
        })?;
        Ok((ids, ends))
    }

    /// Ids that spell the text byte by byte (every byte-level vocabulary, unless the normaliser changed something)
    /// need no second encoding.
    fn ends(&self, text: &str, ids: &[i32]) -> Result<Vec<u32>> {
        let spelling = self.spelling.as_ref();
        if let Some(ends) = spelling.and_then(|spelling| spelling.ends(text.as_bytes(), ids)) {
            return Ok(ends);
        }
        guarded("encode", || {
            let encoding = self.inner.encode(text, false)?;
            let mut last = 0;
            let ends = encoding.get_offsets().iter().map(|(_, end)| {
                last = last.max(*end);
                last as u32
            });
            Ok(ends.collect())
        })
    }
}

/// Ids below a vocabulary's size, which is below 2^31.
fn signed(ids: &[u32]) -> Vec<i32> {
    ids.iter().map(|id| *id as i32).collect()
}

/// Runs both, on two threads where the system gives another one. A scoped thread is gone when this returns, so it
/// does no harm to a process that forks later.
fn beside<A: Send, B>(aside: impl Fn() -> A + Sync, here: impl FnOnce() -> B) -> (A, B) {
    std::thread::scope(|scope| {
        let spawned = std::thread::Builder::new().spawn_scoped(scope, &aside);
        let here = here();
        match spawned.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(result)) => (result, here),
            // No thread, or a panic outside of what is guarded: then it happens here.
            _ => (aside(), here),
        }
    })
}

/// Our own engine and the same file in the crate, from one reading of the text.
fn both(json: &str) -> std::result::Result<(Bpe, tokenizers::Tokenizer), String> {
    let file = bpe::parse(json).map_err(|e| e.to_string())?;
    let (oracle, bpe) = beside(|| guarded("tokenizer.json", || file.oracle()), || file.engine());
    Ok((bpe.map_err(|e| e.to_string())?, oracle.map_err(|e| e.to_string())?))
}

fn recognised(json: &str) -> std::result::Result<Bpe, String> {
    Bpe::recognise(json).map_err(|e| e.to_string())
}

/// Our own engine, if it agrees with the crate.
fn checked(bpe: Bpe, oracle: &tokenizers::Tokenizer) -> std::result::Result<Bpe, String> {
    let (words, texts) = beside(
        || guarded("self-check", || Ok(bpe.check_words(oracle))),
        || guarded("self-check", || Ok(bpe.check_texts(oracle))),
    );
    for result in [words, texts] {
        result.map_err(|e| e.to_string())?.map_err(|mismatch| mismatch.to_string())?;
    }
    Ok(bpe)
}

/// Adds the tokens that are not there; true if there were any.
fn add_tokens(inner: &mut tokenizers::Tokenizer, tokens: &[Added]) -> tokenizers::Result<bool> {
    let mut beyond = false;
    for added in tokens {
        if inner.get_added_vocabulary().get_vocab().contains_key(&added.content) {
            continue;
        }
        beyond = true;
        let token = AddedToken::from(added.content.clone(), added.special)
            .lstrip(added.lstrip)
            .rstrip(added.rstrip)
            .single_word(added.single_word)
            .normalized(added.normalized);
        if added.special {
            inner.add_special_tokens([token])?;
        } else {
            inner.add_tokens([token])?;
        }
    }
    Ok(beyond)
}

/// What the post-processor puts before and behind one sequence.
fn surroundings(post: Option<&PostProcessorWrapper>) -> Result<(Vec<i32>, Vec<i32>)> {
    const PROBE: u32 = u32::MAX;
    let Some(post) = post else { return Ok((Vec::new(), Vec::new())) };
    let ids = guarded("tokenizer.json, `post_processor`", || {
        let token = Token::new(PROBE, "a".to_owned(), (0, 1));
        let encoding = Encoding::from_tokens(vec![token], 0);
        Ok(post.process(encoding, None, true)?.get_ids().to_vec())
    })?;
    let mut parts = ids.split(|id| *id == PROBE);
    match (parts.next(), parts.next(), parts.next()) {
        (Some(before), Some(behind), None) => Ok((signed(before), signed(behind))),
        _ => Err(Error::Tokenizer(
            "tokenizer.json, `post_processor`: expected one sequence with tokens around it"
                .to_owned(),
        )),
    }
}

/// The bytes of every token, in one arena.
struct Spelling {
    bytes: Vec<u8>,
    offsets: Vec<u32>,
}

impl Spelling {
    /// Bytes are known for added tokens and for tokens written in the alphabet of byte-level vocabularies. Others are
    /// left empty; [`Spelling::ends`] then finds that the ids do not spell the text.
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
    fn ends(&self, text: &[u8], ids: &[i32]) -> Option<Vec<u32>> {
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

/// Tokens that steer a model: special ones, and those that the chat template itself writes between turns.
#[derive(Default)]
pub struct Control {
    finder: Option<aho_corasick::AhoCorasick>,
    ids: Vec<i32>,
}

impl Control {
    fn new(tokenizer: &Tokenizer) -> Self {
        let templates = [&tokenizer.template, &tokenizer.tool_template];
        let structure = |token: &str| {
            templates.iter().copied().flatten().any(|template| template.source().contains(token))
        };
        let mut texts = Vec::new();
        let mut ids = Vec::new();
        for (id, token) in tokenizer.inner.get_added_tokens_decoder() {
            let written = structure(&token.content);
            // `<think>` in an answer is the token that training expects, although templates mention it.
            let reasoning = token.content.contains("think") || token.content.contains("reason");
            if !token.content.is_empty() && (token.special || (written && !reasoning)) {
                texts.push(token.content.clone());
                ids.push(id as i32);
            }
        }
        let finder = aho_corasick::AhoCorasick::builder()
            .match_kind(aho_corasick::MatchKind::LeftmostLongest)
            .build(&texts)
            .ok()
            .filter(|_| !texts.is_empty());
        ids.sort_unstable();
        Self { finder, ids }
    }

    /// Whether `text` spells a control token.
    pub fn occurs_in(&self, text: &str) -> bool {
        self.finder.as_ref().is_some_and(|finder| finder.is_match(text))
    }

    /// Whether `id` is a control token.
    pub fn has(&self, id: i32) -> bool {
        self.ids.binary_search(&id).is_ok()
    }

    /// Puts `mark` inside every control token that `text` spells, behind its first character.
    pub fn marked(&self, text: &str, mark: char) -> String {
        let mut out = String::with_capacity(text.len() + 16);
        let mut done = 0;
        for found in self.finder.iter().flat_map(|finder| finder.find_iter(text)) {
            let spelt = text.get(found.range()).unwrap_or_default();
            let middle = found.start() + spelt.chars().next().map_or(0, char::len_utf8);
            out.push_str(text.get(done..middle).unwrap_or_default());
            out.push(mark);
            done = middle;
        }
        out.push_str(text.get(done..).unwrap_or_default());
        out
    }
}
