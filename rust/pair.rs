//! One pair: where the prompt ends, what is cut, and whether the row stays.

mod chat;
mod implicit;

use std::borrow::Cow;

use crate::bpe::{Found, PairIds};
use crate::error::{Error, Result};
use crate::read::limits::Limits;
use crate::read::row::{Bad, Content, Keys, Row};
use crate::template::Now;
use crate::tokenize::Tokenizer;

/// What happens to a side that is longer than `max_length`. One decision a pair: both sides keep the same prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncation {
    /// The first `max_length` ids of each side.
    KeepStart,
    /// The last ids: the prompt is cut from the left, the same on both sides, then each completion from the left.
    KeepEnd,
    /// The prompt is cut from the left as far as needed, then completions at their end.
    KeepCompletions,
    /// The pair is dropped and counted.
    Drop,
    /// The row is bad.
    Error,
}

/// Where the prompt's ids end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Prompt and completion encoded as one text; a token across the border belongs to the completion.
    Joint,
    /// Prompt and completion encoded apart.
    Separate,
    /// TRL 1.16: the common id prefix of the prompt alone and of the joint text, the shorter one of both sides.
    Trl,
}

/// What text that spells a control token means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialText {
    /// The token.
    Special,
    /// Text: in contents control tokens are never tokens, so that data cannot forge a turn.
    Text,
    /// A bad row.
    Error,
}

/// How rows become pairs.
#[derive(Debug, Clone)]
pub struct Options {
    /// Longest side in tokens, `None` for no bound.
    pub max_length: Option<usize>,
    /// What happens beyond it.
    pub truncation: Truncation,
    /// Where the prompt ends.
    pub boundary: Boundary,
    /// What a spelt control token means.
    pub special_text: SpecialText,
    /// Names of the fields.
    pub keys: Keys,
    /// Limits on input.
    pub limits: Limits,
    /// The time that templates see.
    pub now: Now,
}

/// What is counted but kept; the index into a report's `warned`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // each is documented where users meet it, in `dpo_ext.Report`
pub enum Warning {
    BoundaryMerge,
    Truncated,
    EosCut,
    EmptyPrompt,
    SpecialTokenInText,
    BosInText,
    NoTurnBoundary,
    BlankLine,
}

/// The names of the warnings, in the order of [`Warning`].
pub const WARNINGS: [&str; 8] = [
    "boundary_merge",
    "truncated",
    "eos_cut",
    "empty_prompt",
    "special_token_in_text",
    "bos_in_text",
    "no_turn_boundary",
    "blank_line",
];

/// The ids of a pair, and what was noticed on the way.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pair {
    /// Shared by both sides.
    pub prompt: Vec<i32>,
    /// The preferred completion.
    pub chosen: Vec<i32>,
    /// The other completion.
    pub rejected: Vec<i32>,
    /// Log-probs under the reference, where the row has them.
    pub ref_logps: Option<[f64; 2]>,
    /// Set bits are [`Warning`]s.
    pub warned: u32,
}

impl Pair {
    fn has(&self, warning: Warning) -> bool {
        self.warned & 1 << warning as u32 != 0
    }

    fn warn(&mut self, warning: Warning) {
        self.warned |= 1 << warning as u32;
    }
}

/// Why a row gives no pair: it is bad, or the whole call fails.
#[derive(Debug)]
pub enum Refusal {
    /// The row is dropped, or raised with `on_bad="error"`.
    Row(Bad),
    /// The tokenizer cannot be used at all.
    Call(Error),
}

impl From<Bad> for Refusal {
    fn from(bad: Bad) -> Self {
        Self::Row(bad)
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

/// Turns one row into ids.
///
/// # Errors
/// [`Refusal`].
pub fn encode(row: Row<'_>, tokenizer: &Tokenizer, options: &Options) -> Result<Pair, Refusal> {
    let mut pair = Pair { ref_logps: row.ref_logps, ..Pair::default() };
    match row.content {
        Content::Ids { prompt, chosen, rejected } => {
            for (ids, name) in [(&chosen, "chosen_ids"), (&rejected, "rejected_ids")] {
                if ids.is_empty() {
                    return Err(Bad::new(
                        "empty_completion",
                        name,
                        "expected at least one id, found none",
                    )
                    .into());
                }
            }
            (pair.prompt, pair.chosen, pair.rejected) = (prompt, chosen, rejected);
        }
        Content::Text { prompt, chosen, rejected } => {
            let text = text_row(prompt, chosen, rejected, tokenizer, options, &mut pair)?;
            boundary(&text, tokenizer, options, true, &mut pair)?;
        }
        Content::Chat { prompt, chosen, rejected, tools, kwargs } => {
            let chat = chat::Chat { prompt, chosen, rejected, tools, kwargs };
            let text = chat::texts(chat, tokenizer, options, &mut pair)?;
            boundary(&text, tokenizer, options, false, &mut pair)?;
        }
    }
    finish(pair, tokenizer, options)
}

/// A prompt and two completions, as text.
struct Texts<'a> {
    prompt: Cow<'a, str>,
    chosen: Cow<'a, str>,
    rejected: Cow<'a, str>,
    /// The prompt's own render where it is not the start of both sides; only `boundary="trl"` looks at it.
    alone: Option<String>,
    /// Bytes of prompt + chosen and of prompt + rejected that lie inside control tokens that must stay text.
    marks: Option<[Vec<usize>; 2]>,
}

/// Notes control tokens that contents spell; an error where the options say so.
fn check_special(
    text: &str,
    field: &str,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<(), Bad> {
    if tokenizer.control().occurs_in(text) {
        if options.special_text == SpecialText::Error {
            let message = "expected plain text, found the spelling of a control token";
            return Err(Bad::new("special_token_in_text", field, message));
        }
        pair.warn(Warning::SpecialTokenInText);
    }
    Ok(())
}

fn is_blank(text: &str) -> bool {
    // `char::is_whitespace` is Unicode's White_Space, like the `\s` of tokenizers' regexes but for U+001C..U+001F.
    text.chars().all(|c| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

fn text_row<'a>(
    prompt: Option<Cow<'a, str>>,
    chosen: Cow<'a, str>,
    rejected: Cow<'a, str>,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<Texts<'a>, Bad> {
    let eos = tokenizer.eos_text();
    let body = |text: &str| eos.and_then(|eos| text.strip_suffix(eos)).unwrap_or(text).len();
    let keys = &options.keys;
    let parts = [
        (prompt.as_deref().unwrap_or_default(), &keys.prompt),
        (chosen.get(..body(&chosen)).unwrap_or_default(), &keys.chosen),
        (rejected.get(..body(&rejected)).unwrap_or_default(), &keys.rejected),
    ];
    for (text, key) in parts {
        check_special(text, key, tokenizer, options, pair)?;
    }
    let (prompt, chosen, rejected) = if let Some(prompt) = prompt {
        (prompt, chosen, rejected)
    } else {
        let (cut, at_turn) = implicit::split(&chosen, &rejected);
        if !at_turn {
            pair.warn(Warning::NoTurnBoundary);
        }
        let (prompt, c) = chosen.split_at(cut);
        let (_, r) = rejected.split_at(cut);
        (prompt.to_owned().into(), c.to_owned().into(), r.to_owned().into())
    };
    for (text, key) in [(&chosen, &keys.chosen), (&rejected, &keys.rejected)] {
        if is_blank(text.get(..body(text)).unwrap_or_default()) {
            let message = "expected a completion, found none but white space";
            return Err(Bad::new("empty_completion", key, message));
        }
    }
    if chosen == rejected {
        return Err(Bad::new(
            "identical_pair",
            &keys.rejected,
            "expected two completions, found the same one twice",
        ));
    }
    if prompt.is_empty() {
        pair.warn(Warning::EmptyPrompt);
    }
    Ok(Texts { prompt, chosen, rejected, alone: None, marks: None })
}

fn common_ids(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Encodes text in which the control tokens around the bytes `marks` stay text; `marks` are relative to `start`.
fn encode_marked(
    text: &str,
    start: usize,
    marks: &[usize],
    tokenizer: &Tokenizer,
) -> Result<(Vec<i32>, Vec<u32>)> {
    tokenizer.encode_as_text(text, &|found: &Found| {
        let inside = start + found.start..start + found.end;
        let first = marks.partition_point(|mark| *mark <= inside.start);
        !marks.get(first).is_some_and(|mark| inside.contains(mark))
    })
}

/// The completions as they are encoded, with what is put behind their ids.
struct Sides {
    texts: [String; 2],
    tails: [Option<i32>; 2],
}

/// Text rows get EOS, as its text where that is a token, unless the surroundings bring it.
fn sides(texts: &Texts<'_>, tokenizer: &Tokenizer, options: &Options, is_text: bool) -> Sides {
    let (_, behind) = tokenizer.surroundings();
    let eos = tokenizer.eos().map(|id| id as i32);
    let brought =
        options.boundary != Boundary::Trl && behind.last().is_some_and(|id| Some(*id) == eos);
    let side = |text: &str, tail: &mut Option<i32>| {
        let mut joint = String::with_capacity(texts.prompt.len() + text.len() + 16);
        if options.boundary != Boundary::Separate {
            joint.push_str(&texts.prompt);
        }
        if !is_text || eos.is_none() {
            joint.push_str(text);
            return joint;
        }
        match tokenizer.eos_text() {
            Some(spelt) if options.special_text == SpecialText::Text => {
                joint.push_str(text.strip_suffix(spelt).unwrap_or(text));
                *tail = eos.filter(|_| !brought);
            }
            Some(spelt) => {
                joint.push_str(text);
                if !brought && !text.ends_with(spelt) {
                    joint.push_str(spelt);
                }
            }
            None => {
                joint.push_str(text);
                *tail = eos.filter(|_| !brought);
            }
        }
        joint
    };
    let (mut chosen_tail, mut rejected_tail) = (None, None);
    let texts = [side(&texts.chosen, &mut chosen_tail), side(&texts.rejected, &mut rejected_tail)];
    Sides { texts, tails: [chosen_tail, rejected_tail] }
}

/// Encodes a prompt and two completions by the rule of the options. Text rows get EOS and the surroundings.
fn boundary(
    texts: &Texts<'_>,
    tokenizer: &Tokenizer,
    options: &Options,
    is_text: bool,
    pair: &mut Pair,
) -> Result<(), Refusal> {
    let (before, behind) = if is_text { tokenizer.surroundings() } else { (&[][..], &[][..]) };
    let Sides { texts: [first, second], tails } = sides(texts, tokenizer, options, is_text);
    let as_text = is_text && options.special_text == SpecialText::Text;
    let cut = texts.prompt.len();
    let start = if options.boundary == Boundary::Separate { cut } else { 0 };
    let mut ids = if as_text {
        let keep = |found: &Found| !tokenizer.control().has(found.id);
        let (first, first_ends) = tokenizer.encode_as_text(&first, &keep)?;
        let (second, second_ends) = tokenizer.encode_as_text(&second, &keep)?;
        PairIds { first, first_ends, second, second_ends, reused: 0 }
    } else if let Some([marks, rejected_marks]) = &texts.marks {
        let (first, first_ends) = encode_marked(&first, start, marks, tokenizer)?;
        let (second, second_ends) = encode_marked(&second, start, rejected_marks, tokenizer)?;
        PairIds { first, first_ends, second, second_ends, reused: 0 }
    } else {
        tokenizer.encode_pair(&first, &second)?
    };
    let (prompt, skip) = match options.boundary {
        Boundary::Joint => {
            let common = common_ids(&ids.first, &ids.second);
            let inside = |ends: &[u32]| {
                ends.iter().take(common).take_while(|end| **end as usize <= cut).count()
            };
            let count = inside(&ids.first_ends).min(inside(&ids.second_ends));
            let covered = count.checked_sub(1).and_then(|i| ids.first_ends.get(i)).copied();
            if (covered.unwrap_or(0) as usize) < cut {
                pair.warn(Warning::BoundaryMerge);
            }
            (ids.first.get(..count).unwrap_or_default().to_vec(), count)
        }
        Boundary::Separate if as_text => {
            let keep = |found: &Found| !tokenizer.control().has(found.id);
            (tokenizer.encode_as_text(&texts.prompt, &keep)?.0, 0)
        }
        Boundary::Separate => match &texts.marks {
            Some([marks, _]) => (encode_marked(&texts.prompt, 0, marks, tokenizer)?.0, 0),
            None => (tokenizer.encode_plain(&texts.prompt)?, 0),
        },
        Boundary::Trl => {
            let alone = texts.alone.as_deref().unwrap_or(&texts.prompt);
            let around = |ids: &[i32]| [before, ids, behind].concat();
            let prompt = around(&tokenizer.encode_plain(alone)?);
            ids.first.extend(tails[0]);
            ids.second.extend(tails[1]);
            let (first, second) = (around(&ids.first), around(&ids.second));
            let count = common_ids(&prompt, &first).min(common_ids(&prompt, &second));
            if count < prompt.len() {
                pair.warn(Warning::BoundaryMerge);
            }
            pair.prompt = prompt.get(..count).unwrap_or_default().to_vec();
            pair.chosen = first.get(count..).unwrap_or_default().to_vec();
            pair.rejected = second.get(count..).unwrap_or_default().to_vec();
            return Ok(());
        }
    };
    // BOS once: text that brings its own gets no second one.
    let bos = tokenizer.bos().map(|id| id as i32);
    let begins = prompt.first().or(ids.first.first()).copied();
    let before = match before.split_last() {
        Some((last, rest)) if Some(*last) == bos && begins == bos => {
            pair.warn(Warning::BosInText);
            rest
        }
        _ => before,
    };
    let eos = tokenizer.eos().map(|id| id as i32);
    let side = |ids: &[i32], tail: Option<i32>| -> Vec<i32> {
        let rest = ids.get(skip..).unwrap_or_default();
        // EOS once: the surroundings' own is not put behind one that the text spells.
        let behind = match behind.split_first() {
            Some((first, others)) if Some(*first) == eos && rest.last() == Some(first) => others,
            _ => behind,
        };
        [rest, tail.as_slice(), behind].concat()
    };
    pair.chosen = side(&ids.first, tails[0]);
    pair.rejected = side(&ids.second, tails[1]);
    pair.prompt = [before, &prompt].concat();
    Ok(())
}

/// Cuts to `max_length` and applies the rules on ids.
fn finish(mut pair: Pair, tokenizer: &Tokenizer, options: &Options) -> Result<Pair, Refusal> {
    let keys = &options.keys;
    let longest = pair.prompt.len() + pair.chosen.len().max(pair.rejected.len());
    if longest > options.limits.max_row_tokens {
        let message =
            format!("a side has {longest} tokens, more than {}", options.limits.max_row_tokens);
        return Err(Bad::new("limit", "max_row_tokens", message).into());
    }
    if pair.prompt.is_empty() {
        pair.warn(Warning::EmptyPrompt);
    }
    if pair.chosen == pair.rejected {
        let message = "expected two completions, found the same ids twice";
        return Err(Bad::new("identical_pair", &keys.rejected, message).into());
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
            return Err(Bad::new("too_long", key, message).into());
        }
        let before = pair.prompt.len();
        truncate(&mut pair, most, options.truncation, tokenizer.eos());
        pair.warn(Warning::Truncated);
        let no_tokens = |key: &str| {
            let message =
                format!("empty after truncation to {most} tokens (the prompt has {before})");
            Bad::new("no_completion_tokens", key, message)
        };
        check_scored(&pair, keys, no_tokens)?;
        if pair.chosen == pair.rejected {
            let message = format!("both sides have the same ids after truncation to {most} tokens");
            return Err(Bad::new("identical_after_truncation", &keys.rejected, message).into());
        }
    } else {
        check_scored(&pair, keys, |key| {
            let message = "one token without a prompt before it: nothing predicts it";
            Bad::new("no_completion_tokens", key, message)
        })?;
    }
    Ok(pair)
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
fn truncate(pair: &mut Pair, most: usize, how: Truncation, eos: Option<u32>) {
    let longest = pair.prompt.len() + pair.chosen.len().max(pair.rejected.len());
    let excess = longest.saturating_sub(most);
    if how == Truncation::KeepStart {
        pair.prompt.truncate(most);
    } else {
        pair.prompt.drain(..excess.min(pair.prompt.len()));
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
