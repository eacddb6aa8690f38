//! Our own engine, the crate that it is checked against, and what is asked of the crate once.

use once_cell::race::OnceBox;
use tokenizers::{AddedToken, Encoding, ModelWrapper, PostProcessor, PostProcessorWrapper, Token};

use super::guard::guarded;
use super::source::Added;
use crate::bpe::{self, Bpe, Excerpt};
use crate::error::{Error, Result};

/// Ids below a vocabulary's size, which is below 2^31.
pub(super) fn signed(ids: &[u32]) -> Vec<i32> {
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

/// Our own engine, what the crate needs of the same file to be compared with it and to answer for the tokens that
/// `wanted` names, and the number of ids.
pub(super) fn excerpt(
    json: &str,
    wanted: impl Fn(&str, u32) -> bool,
) -> std::result::Result<(Bpe, tokenizers::Tokenizer, usize), String> {
    let file = bpe::parse(json).map_err(|e| e.to_string())?;
    let bpe = file.engine().map_err(|e| e.to_string())?;
    let excerpt = Excerpt::of(&bpe);
    let keeps = |token: &str, id: u32| excerpt.may_hold(token) || wanted(token, id);
    let part =
        guarded("tokenizer.json", || file.oracle(Some(&keeps))).map_err(|e| e.to_string())?;
    Ok((bpe, part, file.count()))
}

/// A file in the crate: without its cache of words if our own engine takes it.
pub(super) fn whole(json: &str, is_ours: bool) -> Result<tokenizers::Tokenizer> {
    guarded("tokenizer.json", || match bpe::parse(json) {
        Ok(file) if is_ours => file.oracle(None),
        _ => tokenizers::Tokenizer::from_bytes(json.as_bytes()),
    })
}

pub(super) fn recognised(json: &str) -> std::result::Result<Bpe, String> {
    Bpe::recognise(json).map_err(|e| e.to_string())
}

/// Our own engine, if it agrees with the crate.
pub(super) fn checked(
    bpe: Bpe,
    oracle: &tokenizers::Tokenizer,
) -> std::result::Result<Bpe, String> {
    // What encodes does it aside: the crate caches words by thread, and that cache ends with the thread alone.
    let (texts, words) = beside(
        || guarded("self-check", || Ok(bpe.check_texts(oracle))),
        || guarded("self-check", || Ok(bpe.check_words(oracle))),
    );
    for result in [words, texts] {
        result.map_err(|e| e.to_string())?.map_err(|mismatch| mismatch.to_string())?;
    }
    Ok(bpe)
}

/// Refuses a model that leaves merges out at random.
pub(super) fn check_dropout(inner: &tokenizers::Tokenizer) -> Result<()> {
    match inner.get_model() {
        ModelWrapper::BPE(bpe) if bpe.dropout.is_some_and(|p| p != 0.0) => {
            let found = bpe.dropout.unwrap_or_default();
            Err(Error::Tokenizer(format!(
                "tokenizer.json, `model.dropout`: expected null or 0, found {found}: a text would have other ids each \
                 time that it is encoded\nhint: set it to null; it is for training a model, which needs no stored ids"
            )))
        }
        _ => Ok(()),
    }
}

/// Switches off what cuts and fills texts, and adds tokens, or gives those that are there these flags; true if that
/// changed anything.
pub(super) fn prepare(
    inner: &mut tokenizers::Tokenizer,
    tokens: &[Added],
) -> tokenizers::Result<bool> {
    inner.with_truncation(None)?;
    inner.with_padding(None);
    let tokens = tokens.iter().map(|added| {
        AddedToken::from(added.content.clone(), added.special)
            .lstrip(added.lstrip)
            .rstrip(added.rstrip)
            .single_word(added.single_word)
            .normalized(added.normalized)
    });
    Ok(inner.add_tokens(tokens.collect::<Vec<_>>())? > 0)
}

/// For encoding: nothing around a text, and special tokens as they are wanted.
pub(super) fn finish(inner: &mut tokenizers::Tokenizer, split_special: bool) {
    inner.set_encode_special_tokens(split_special);
    inner.with_post_processor(None::<PostProcessorWrapper>);
}

/// A tokenizer in the crate.
pub(super) enum InCrate {
    /// Encodes.
    Here(Box<tokenizers::Tokenizer>),
    /// Is made where our own engine encodes and somebody decodes.
    Later { json: String, added: Vec<Added>, made: OnceBox<tokenizers::Tokenizer> },
}

impl InCrate {
    pub(super) fn get(&self, split_special: bool) -> Result<&tokenizers::Tokenizer> {
        match self {
            Self::Here(inner) => Ok(inner),
            Self::Later { json, added, made } => made.get_or_try_init(|| {
                let mut inner = whole(json, true)?;
                guarded("tokenizer.json", || prepare(&mut inner, added))?;
                finish(&mut inner, split_special);
                Ok(Box::new(inner))
            }),
        }
    }

    /// Whether special tokens stay text, of what encodes.
    pub(super) fn split_special(&mut self, split: bool) {
        if let Self::Here(inner) = self {
            inner.set_encode_special_tokens(split);
        }
    }
}

/// What the post-processor puts before and behind one sequence.
pub(super) fn surroundings(post: Option<&PostProcessorWrapper>) -> Result<(Vec<i32>, Vec<i32>)> {
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
