//! What is cut, and the rules on ids.

use super::options::{Boundary, Options, TrainOn, Truncation, Useless};
use super::outcome::{Pair, Refusal};
use crate::error::{Reason, Warning};
use crate::read::bad::Bad;
use crate::read::keys::Keys;
use crate::tokenize::Tokenizer;

/// Cuts to `max_length` and applies the rules on ids.
pub(super) fn finish(
    pair: &mut Pair,
    tokenizer: &Tokenizer,
    options: &Options,
) -> Result<(), Refusal> {
    let keys = &options.keys;
    let longest = pair.prompt.len() + pair.chosen.len().max(pair.rejected.len());
    if longest > options.limits.max_row_tokens {
        let message =
            format!("a side has {longest} tokens, more than {}", options.limits.max_row_tokens);
        return Err(Bad::new(Reason::Limit, "max_row_tokens", message).into());
    }
    if pair.prompt.is_empty() {
        pair.warn(Warning::EmptyPrompt);
    }
    let is_single = keys.is_single();
    let drops = options.useless == Useless::Drop && !is_single;
    if drops && pair.chosen == pair.rejected {
        let message = "expected two completions, found the same ids twice";
        return Err(Bad::new(Reason::IdenticalPair, &keys.rejected, message).into());
    }
    let cut = match options.max_length {
        Some(most) if longest > most => Some(most),
        _ => None,
    };
    if let Some(most) = cut {
        if matches!(options.truncation, Truncation::Drop | Truncation::Error) {
            let key = if pair.chosen.len() >= pair.rejected.len() {
                &keys.chosen
            } else {
                &keys.rejected
            };
            let message =
                format!("expected at most {most} tokens with the prompt, found {longest}");
            return Err(Bad::new(Reason::TooLong, key, message).into());
        }
        let before = pair.prompt.len();
        let begin = if options.boundary == Boundary::Trl { 0 } else { begin(pair, tokenizer) };
        // The completion under another prompt may need more of it, so that batches cut it there.
        let whole =
            (is_single && options.truncation == Truncation::KeepStart).then(|| pair.chosen.clone());
        truncate(pair, most, options.truncation, tokenizer.eos(), begin);
        pair.warn(Warning::Truncated);
        if pair.prompt.is_empty() {
            pair.warn(Warning::EmptyPrompt);
        }
        let no_tokens = |key: &str| {
            let message =
                format!("empty after truncation to {most} tokens (the prompt has {before})");
            Bad::new(Reason::NoCompletionTokens, key, message)
        };
        check_scored(pair, keys, no_tokens)?;
        if let Some(whole) = whole {
            pair.chosen = whole;
        } else {
            cut_weights(pair, options.truncation);
        }
        if drops && pair.chosen == pair.rejected {
            let message = format!("both sides have the same ids after truncation to {most} tokens");
            return Err(Bad::new(Reason::IdenticalAfterTruncation, &keys.rejected, message).into());
        }
    } else {
        check_scored(pair, keys, |key| {
            let message = "one token without a prompt before it: nothing predicts it";
            Bad::new(Reason::NoCompletionTokens, key, message)
        })?;
    }
    if options.train_on != TrainOn::Completion {
        check_trained(pair, keys)?;
    }
    if is_single {
        pair.rejected.clear();
    }
    Ok(())
}

/// Cuts weights as their tokens were cut.
fn cut_weights(pair: &mut Pair, how: Truncation) {
    let Some([chosen, rejected]) = &mut pair.weights else { return };
    for (weights, ids) in [(chosen, &pair.chosen), (rejected, &pair.rejected)] {
        if how == Truncation::KeepEnd {
            weights.drain(..weights.len() - ids.len());
        } else {
            weights.truncate(ids.len());
        }
    }
}

/// A side needs a token of the turns that are trained.
fn check_trained(pair: &Pair, keys: &Keys) -> Result<(), Bad> {
    let Some(sides) = &pair.weights else { return Ok(()) };
    let unscored = usize::from(pair.prompt.is_empty());
    for (weights, key) in sides.iter().zip([&keys.chosen, &keys.rejected]) {
        if weights.iter().skip(unscored).all(|weight| *weight == 0.0) {
            let message = "expected a token of the turns that `train_on` names, found none left";
            return Err(Bad::new(Reason::NoCompletionTokens, key, message));
        }
    }
    Ok(())
}

/// A side needs a token that another one precedes.
fn check_scored(pair: &Pair, keys: &Keys, bad: impl Fn(&str) -> Bad) -> Result<(), Bad> {
    for (ids, key) in [(&pair.chosen, &keys.chosen), (&pair.rejected, &keys.rejected)] {
        if ids.len() < 1 + usize::from(pair.prompt.is_empty()) {
            return Err(bad(key));
        }
    }
    Ok(())
}

/// Cuts a pair to `most` tokens a side; the prompt is cut once, for both sides.
///
/// Cuts on the left keep the first `begin` ids.
fn truncate(pair: &mut Pair, most: usize, how: Truncation, eos: Option<u32>, begin: usize) {
    let longest = pair.prompt.len() + pair.chosen.len().max(pair.rejected.len());
    let excess = longest.saturating_sub(most);
    if how == Truncation::KeepStart {
        pair.prompt.truncate(most);
    } else {
        let begin = begin.min(most.saturating_sub(1));
        let end = begin.saturating_add(excess).min(pair.prompt.len());
        pair.prompt.drain(begin.min(end)..end);
    }
    let room = most - pair.prompt.len();
    let mut eos_cut = false;
    for side in [&mut pair.chosen, &mut pair.rejected] {
        if side.len() <= room {
            continue;
        }
        if how == Truncation::KeepEnd {
            side.drain(..side.len() - room);
        } else {
            let lost = side.split_off(room);
            eos_cut |= eos.is_some_and(|eos| lost.contains(&(eos as i32)));
        }
    }
    if eos_cut {
        pair.warn(Warning::EosCut);
    }
}

/// How many ids begin every sequence: a model is lost without its BOS.
fn begin(pair: &Pair, tokenizer: &Tokenizer) -> usize {
    let (before, _) = tokenizer.surroundings();
    if pair.prompt.starts_with(before) && !before.is_empty() {
        return before.len();
    }
    let bos = tokenizer.bos().map(|id| id as i32);
    usize::from(bos.is_some() && pair.prompt.first().copied() == bos)
}
