//! Our own engine, the crate that it is checked against, and what is asked of the crate once.

use tokenizers::{AddedToken, Encoding, ModelWrapper, PostProcessor, PostProcessorWrapper, Token};

use super::guard::guarded;
use super::source::Added;
use crate::bpe::{self, Bpe};
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

/// Our own engine and the same file in the crate, from one reading of the text.
pub(super) fn both(json: &str) -> std::result::Result<(Bpe, tokenizers::Tokenizer), String> {
    let file = bpe::parse(json).map_err(|e| e.to_string())?;
    let (oracle, bpe) = beside(|| guarded("tokenizer.json", || file.oracle()), || file.engine());
    Ok((bpe.map_err(|e| e.to_string())?, oracle.map_err(|e| e.to_string())?))
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

/// Adds tokens, or gives those that are there these flags; true if that changed anything.
pub(super) fn add_tokens(
    inner: &mut tokenizers::Tokenizer,
    tokens: &[Added],
) -> tokenizers::Result<bool> {
    let tokens = tokens.iter().map(|added| {
        AddedToken::from(added.content.clone(), added.special)
            .lstrip(added.lstrip)
            .rstrip(added.rstrip)
            .single_word(added.single_word)
            .normalized(added.normalized)
    });
    Ok(inner.add_tokens(tokens.collect::<Vec<_>>())? > 0)
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
