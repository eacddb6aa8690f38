//! One pair: where the prompt ends, what is cut, and whether the row stays.

mod chat;
mod implicit;

use std::borrow::Cow;
use std::cell::RefCell;

use crate::bpe::{Found, Inside, PairIds};
use crate::error::{Error, Result};
use crate::read::bad::Bad;
use crate::read::keys::Keys;
use crate::read::limits::Limits;
use crate::read::row::{Content, Row, Strings};
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
    TemplateFallback,
    BlankLine,
}

/// The names of the warnings, in the order of [`Warning`].
pub const WARNINGS: [&str; 9] = [
    "boundary_merge",
    "truncated",
    "eos_cut",
    "empty_prompt",
    "special_token_in_text",
    "bos_in_text",
    "no_turn_boundary",
    "template_fallback",
    "blank_line",
];

/// The ids of a pair, and what was noticed on the way. Its memory is reused from row to row.
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

thread_local! {
    static PAIR_IDS: RefCell<PairIds> = RefCell::default();
}

/// Turns one row into the ids of `pair`, whose former content is lost.
///
/// # Errors
/// [`Refusal`]; `pair` then holds nothing of use.
pub fn encode(
    row: Row<'_>,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<(), Refusal> {
    pair.prompt.clear();
    pair.chosen.clear();
    pair.rejected.clear();
    pair.warned = 0;
    pair.ref_logps = row.ref_logps;
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
        Content::Text(strings) => {
            let text = text_row(strings, tokenizer, options, pair)?;
            boundary(text, tokenizer, options, true, pair)?;
        }
        Content::Chat(chat) => {
            let text = chat::texts(chat, tokenizer, options, pair)?;
            boundary(text, tokenizer, options, false, pair)?;
        }
    }
    finish(pair, tokenizer, options)
}

/// Two texts with a common beginning, the prompt.
struct Texts<'a> {
    /// Prompt + chosen and prompt + rejected.
    whole: [Cow<'a, str>; 2],
    /// Bytes of the prompt.
    cut: usize,
    /// The prompt's own render where it is not the start of both sides; only `boundary="trl"` looks at it.
    alone: Option<String>,
    /// Bytes of both texts that lie inside control tokens that must stay text.
    marks: Option<[Vec<usize>; 2]>,
}

impl Texts<'_> {
    fn prompt(&self) -> &str {
        self.whole[0].get(..self.cut).unwrap_or_default()
    }
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
    strings: Strings<'a>,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<Texts<'a>, Bad> {
    let Strings { prompt, chosen, rejected } = strings;
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
    let (whole, cut) = if let Some(prompt) = prompt {
        let cut = prompt.len();
        let room = tokenizer.eos_text().map_or(0, str::len);
        let joined = |side: &str| {
            let mut whole = String::with_capacity(cut + side.len() + room);
            whole.push_str(&prompt);
            whole.push_str(side);
            Cow::Owned(whole)
        };
        ([joined(&chosen), joined(&rejected)], cut)
    } else {
        let (cut, at_turn) = implicit::split(&chosen, &rejected);
        if !at_turn {
            pair.warn(Warning::NoTurnBoundary);
        }
        ([chosen, rejected], cut)
    };
    let [chosen, rejected] = whole.each_ref().map(|whole| whole.get(cut..).unwrap_or_default());
    for (text, key) in [(chosen, &keys.chosen), (rejected, &keys.rejected)] {
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
    if cut == 0 {
        pair.warn(Warning::EmptyPrompt);
    }
    Ok(Texts { whole, cut, alone: None, marks: None })
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

/// Gives text rows EOS, as its text where that is a token, unless the surroundings bring it. Returns what is to be put
/// behind the ids of each side.
fn append_eos(
    whole: &mut [Cow<'_, str>; 2],
    cut: usize,
    tokenizer: &Tokenizer,
    options: &Options,
) -> [Option<i32>; 2] {
    let (_, behind) = tokenizer.surroundings();
    let Some(eos) = tokenizer.eos().map(|id| id as i32) else { return [None; 2] };
    let brought = options.boundary != Boundary::Trl && behind.last() == Some(&eos);
    let tail = (!brought).then_some(eos);
    whole.each_mut().map(|whole| {
        let Some(spelt) = tokenizer.eos_text() else { return tail };
        let ends_with_eos = whole.get(cut..).is_some_and(|side| side.ends_with(spelt));
        if options.special_text == SpecialText::Text {
            if ends_with_eos {
                let end = whole.len() - spelt.len();
                match whole {
                    Cow::Borrowed(text) => *text = text.get(..end).unwrap_or_default(),
                    Cow::Owned(text) => text.truncate(end),
                }
            }
            return tail;
        }
        if !brought && !ends_with_eos {
            whole.to_mut().push_str(spelt);
        }
        None
    })
}

/// Encodes both texts, of which `boundary="separate"` leaves the prompt away.
fn encode_both(
    texts: &Texts<'_>,
    as_text: bool,
    tokenizer: &Tokenizer,
    options: &Options,
    ids: &mut PairIds,
) -> Result<()> {
    let cut = texts.cut;
    let start = if options.boundary == Boundary::Separate { cut } else { 0 };
    let both = texts.whole.each_ref().map(|whole| whole.get(start..).unwrap_or_default());
    let [first, second] = both;
    let ((first, first_ends), (second, second_ends)) = if as_text {
        let keep = |found: &Found| !tokenizer.control().has(found.id);
        (tokenizer.encode_as_text(first, &keep)?, tokenizer.encode_as_text(second, &keep)?)
    } else if let Some([marks, rejected_marks]) = &texts.marks {
        (
            encode_marked(first, start, marks, tokenizer)?,
            encode_marked(second, start, rejected_marks, tokenizer)?,
        )
    } else {
        return tokenizer.encode_pair(both, cut, ids);
    };
    let inside = [Inside::of(&first_ends, cut), Inside::of(&second_ends, cut)];
    *ids = PairIds { first, second, inside, reused: 0 };
    Ok(())
}

/// Encodes a prompt and two completions by the rule of the options. Text rows get EOS and the surroundings.
fn boundary(
    mut texts: Texts<'_>,
    tokenizer: &Tokenizer,
    options: &Options,
    is_text: bool,
    pair: &mut Pair,
) -> Result<(), Refusal> {
    let as_text = is_text && options.special_text == SpecialText::Text;
    let tails = if is_text {
        append_eos(&mut texts.whole, texts.cut, tokenizer, options)
    } else {
        [None; 2]
    };
    PAIR_IDS.with_borrow_mut(|ids| {
        encode_both(&texts, as_text, tokenizer, options, ids)?;
        match options.boundary {
            Boundary::Trl => trl_sides(&texts, ids, tails, tokenizer, is_text, pair)?,
            _ => own_sides(&texts, ids, tails, tokenizer, options, is_text, pair)?,
        }
        Ok(())
    })
}

/// The sides of `boundary="trl"`: what the encodings of prompt and whole texts have in common.
fn trl_sides(
    texts: &Texts<'_>,
    ids: &mut PairIds,
    tails: [Option<i32>; 2],
    tokenizer: &Tokenizer,
    is_text: bool,
    pair: &mut Pair,
) -> Result<()> {
    let (before, behind) = surroundings(tokenizer, is_text);
    let around = |ids: &[i32]| [before, ids, behind].concat();
    let alone = texts.alone.as_deref().unwrap_or(texts.prompt());
    let prompt = around(&tokenizer.encode_plain(alone)?);
    ids.first.extend(tails[0]);
    ids.second.extend(tails[1]);
    let (first, second) = (around(&ids.first), around(&ids.second));
    let count = common_ids(&prompt, &first).min(common_ids(&prompt, &second));
    if count < prompt.len() {
        pair.warn(Warning::BoundaryMerge);
    }
    pair.prompt.extend_from_slice(prompt.get(..count).unwrap_or_default());
    pair.chosen.extend_from_slice(first.get(count..).unwrap_or_default());
    pair.rejected.extend_from_slice(second.get(count..).unwrap_or_default());
    Ok(())
}

fn surroundings(tokenizer: &Tokenizer, is_text: bool) -> (&[i32], &[i32]) {
    if is_text { tokenizer.surroundings() } else { (&[], &[]) }
}

/// The sides of the boundaries `joint` and `separate`.
fn own_sides(
    texts: &Texts<'_>,
    ids: &PairIds,
    tails: [Option<i32>; 2],
    tokenizer: &Tokenizer,
    options: &Options,
    is_text: bool,
    pair: &mut Pair,
) -> Result<()> {
    let separate;
    let (prompt, skip) = if options.boundary == Boundary::Separate {
        separate = separate_prompt(texts, tokenizer, options, is_text)?;
        (&separate[..], 0)
    } else {
        let count = ids.joint_prompt();
        let covered = if count == ids.inside[0].ids {
            ids.inside[0].end
        } else {
            end_of(texts, count, tokenizer, options, is_text)?
        };
        if covered < texts.cut {
            pair.warn(Warning::BoundaryMerge);
        }
        (ids.first.get(..count).unwrap_or_default(), count)
    };
    let (before, behind) = surroundings(tokenizer, is_text);
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
    pair.prompt.extend_from_slice(before);
    pair.prompt.extend_from_slice(prompt);
    let eos = tokenizer.eos().map(|id| id as i32);
    let sides = [(&mut pair.chosen, &ids.first), (&mut pair.rejected, &ids.second)];
    for ((side, ids), tail) in sides.into_iter().zip(tails) {
        let rest = ids.get(skip..).unwrap_or_default();
        // EOS once: the surroundings' own is not put behind one that the text spells.
        let behind = match behind.split_first() {
            Some((first, others)) if Some(*first) == eos && rest.last() == Some(first) => others,
            _ => behind,
        };
        side.extend_from_slice(rest);
        side.extend(tail);
        side.extend_from_slice(behind);
    }
    Ok(())
}

/// The ids of the prompt alone.
fn separate_prompt(
    texts: &Texts<'_>,
    tokenizer: &Tokenizer,
    options: &Options,
    is_text: bool,
) -> Result<Vec<i32>> {
    if is_text && options.special_text == SpecialText::Text {
        let keep = |found: &Found| !tokenizer.control().has(found.id);
        return Ok(tokenizer.encode_as_text(texts.prompt(), &keep)?.0);
    }
    match &texts.marks {
        Some([marks, _]) => Ok(encode_marked(texts.prompt(), 0, marks, tokenizer)?.0),
        None => tokenizer.encode_plain(texts.prompt()),
    }
}

/// Where the first `count` ids of the first text end.
fn end_of(
    texts: &Texts<'_>,
    count: usize,
    tokenizer: &Tokenizer,
    options: &Options,
    is_text: bool,
) -> Result<usize> {
    let text = &texts.whole[0];
    let ends = if is_text && options.special_text == SpecialText::Text {
        tokenizer.encode_as_text(text, &|found: &Found| !tokenizer.control().has(found.id))?.1
    } else if let Some([marks, _]) = &texts.marks {
        encode_marked(text, 0, marks, tokenizer)?.1
    } else {
        return tokenizer.end_of(text, count);
    };
    Ok(count.checked_sub(1).and_then(|i| ends.get(i)).map_or(0, |end| *end as usize))
}

/// Cuts to `max_length` and applies the rules on ids.
fn finish(pair: &mut Pair, tokenizer: &Tokenizer, options: &Options) -> Result<(), Refusal> {
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
        truncate(pair, most, options.truncation, tokenizer.eos());
        pair.warn(Warning::Truncated);
        let no_tokens = |key: &str| {
            let message =
                format!("empty after truncation to {most} tokens (the prompt has {before})");
            Bad::new("no_completion_tokens", key, message)
        };
        check_scored(pair, keys, no_tokens)?;
        if pair.chosen == pair.rejected {
            let message = format!("both sides have the same ids after truncation to {most} tokens");
            return Err(Bad::new("identical_after_truncation", &keys.rejected, message).into());
        }
    } else {
        check_scored(pair, keys, |key| {
            let message = "one token without a prompt before it: nothing predicts it";
            Bad::new("no_completion_tokens", key, message)
        })?;
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
