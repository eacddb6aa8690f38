//! One pair: where the prompt ends, what is cut, and whether the row stays.

use std::borrow::Cow;

use minijinja::Value as Jinja;

use crate::error::{Error, Result};
use crate::read::json::Value;
use crate::read::limits::Limits;
use crate::read::row::{Bad, Content, Keys, Row};
use crate::template::{Now, RenderError, message_to_jinja, to_jinja};
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
            let chat = Chat { prompt, chosen, rejected, tools, kwargs };
            let text = chat_row(chat, tokenizer, options, &mut pair)?;
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
}

/// Notes control tokens that the contents spell; an error where the options say so.
fn check_special(
    texts: [(&str, &str); 3],
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<(), Bad> {
    for (text, field) in texts {
        if tokenizer.control().occurs_in(text) {
            if options.special_text == SpecialText::Error {
                let message = "expected plain text, found the spelling of a control token";
                return Err(Bad::new("special_token_in_text", field, message));
            }
            pair.warn(Warning::SpecialTokenInText);
        }
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
    {
        let (c, r) = (chosen.get(..body(&chosen)), rejected.get(..body(&rejected)));
        let texts = [
            (prompt.as_deref().unwrap_or_default(), keys.prompt.as_str()),
            (c.unwrap_or_default(), keys.chosen.as_str()),
            (r.unwrap_or_default(), keys.rejected.as_str()),
        ];
        check_special(texts, tokenizer, options, pair)?;
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
    Ok(Texts { prompt, chosen, rejected, alone: None })
}

/// Where a prompt ends that nobody marked.
mod implicit {
    /// Ends of what stands before an assistant's answer. White space after a marker belongs to the answer, unless the
    /// format fixes it.
    const TURNS: [&str; 14] = [
        "\n\nAssistant:",
        "<|im_start|>assistant\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|header_start|>assistant<|header_end|>\n\n",
        "<start_of_turn>model\n",
        "<|assistant|>",
        "<|Assistant|>",
        "<\u{ff5c}Assistant\u{ff5c}>",
        "[/INST]",
        "### Response:",
        "### Assistant:",
        "ASSISTANT:",
        "\nAssistant:",
        "\nAI:",
    ];

    /// The byte where the prompt ends, and whether the last turn of both texts begins there.
    pub fn split(chosen: &str, rejected: &str) -> (usize, bool) {
        let mut common = chosen.bytes().zip(rejected.bytes()).take_while(|(a, b)| a == b).count();
        while !chosen.is_char_boundary(common) || !rejected.is_char_boundary(common) {
            common -= 1;
        }
        let start = chosen.get(..common).unwrap_or_default();
        let last =
            |text: &str| TURNS.iter().filter_map(|turn| Some(text.rfind(turn)? + turn.len())).max();
        match last(start) {
            Some(cut) => (cut, last(chosen) == Some(cut) && last(rejected) == Some(cut)),
            None => (word(start, chosen, rejected), false),
        }
    }

    /// The start of the word in which the common text ends, less the white space before it.
    fn word(start: &str, chosen: &str, rejected: &str) -> usize {
        let goes_on = |text: &str| {
            text.get(start.len()..)
                .and_then(|rest| rest.chars().next())
                .is_some_and(char::is_whitespace)
        };
        let head = if goes_on(chosen) && goes_on(rejected) {
            start
        } else {
            start.trim_end_matches(|c: char| !c.is_whitespace())
        };
        head.trim_end().len()
    }
}

/// The messages of one row.
struct Chat<'a> {
    prompt: Option<Vec<Value<'a>>>,
    chosen: Vec<Value<'a>>,
    rejected: Vec<Value<'a>>,
    tools: Option<Value<'a>>,
    kwargs: Vec<(Cow<'a, str>, Value<'a>)>,
}

/// The text inside a message: its content, or the text parts of it.
fn message_texts<'v>(message: &'v Value<'_>) -> Vec<&'v str> {
    match message.get("content") {
        Some(Value::Str(text)) => vec![text],
        Some(Value::List(parts)) => parts
            .iter()
            .filter_map(|part| match part {
                Value::Str(text) => Some(text.as_ref()),
                part => match part.get("text") {
                    Some(Value::Str(text)) => Some(text.as_ref()),
                    _ => None,
                },
            })
            .collect(),
        _ => Vec::new(),
    }
}

fn says_something(message: &Value<'_>) -> bool {
    matches!(message.get("tool_calls"), Some(Value::List(calls)) if !calls.is_empty())
        || message_texts(message).iter().any(|text| !is_blank(text))
}

fn chat_row(
    chat: Chat<'_>,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<Texts<'static>, Refusal> {
    let Chat { prompt, mut chosen, mut rejected, tools, kwargs } = chat;
    let keys = &options.keys;
    let prompt = prompt.unwrap_or_else(|| {
        let common = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
        // A side always keeps its last message.
        let common = common.min(chosen.len() - 1).min(rejected.len() - 1);
        rejected.drain(..common);
        chosen.drain(..common).collect()
    });
    for (messages, key) in
        [(&prompt, &keys.prompt), (&chosen, &keys.chosen), (&rejected, &keys.rejected)]
    {
        for text in messages.iter().flat_map(message_texts) {
            check_special([(text, key), ("", ""), ("", "")], tokenizer, options, pair)?;
        }
    }
    let template = tokenizer.template()?;
    let failed = |key: &str, message: String| Bad::new("template_error", key, message);
    let mut variables: Vec<(&str, Jinja)> = Vec::with_capacity(16);
    let tools =
        tools.as_ref().map_or(Ok(Jinja::from(())), to_jinja).map_err(|e| failed("tools", e))?;
    variables.push(("messages", Jinja::UNDEFINED));
    variables.push(("add_generation_prompt", Jinja::from(false)));
    variables.push(("tools", tools));
    variables.push(("documents", Jinja::from(())));
    for (name, text) in tokenizer.named() {
        variables.push((name, Jinja::from(text.as_str())));
    }
    for (name, value) in &kwargs {
        variables.push((name, to_jinja(value).map_err(|e| failed("chat_template_kwargs", e))?));
    }
    let convert = |messages: &[Value<'_>], key: &str| -> Result<Vec<Jinja>, Bad> {
        messages.iter().map(|m| message_to_jinja(m).map_err(|e| failed(key, e))).collect()
    };
    let first = convert(&prompt, &keys.prompt)?;
    let mut render = |rest: Option<&[Value<'_>]>, key: &str| -> Result<String, Refusal> {
        let mut messages = first.clone();
        messages.extend(convert(rest.unwrap_or_default(), key)?);
        let count = messages.len();
        let bytes = prompt
            .iter()
            .chain(rest.unwrap_or_default())
            .flat_map(message_texts)
            .map(str::len)
            .sum();
        for (name, value) in &mut variables {
            match *name {
                "messages" => *value = Jinja::from(std::mem::take(&mut messages)),
                "add_generation_prompt" => *value = Jinja::from(rest.is_none()),
                _ => {}
            }
        }
        let cap = options.limits.max_rendered_bytes;
        match template.render(&variables, options.now, count, bytes, cap) {
            Ok(text) => Ok(text),
            Err(RenderError::Template(message)) => Err(failed(key, message).into()),
            Err(RenderError::TooLong) => {
                let message = format!("the rendered conversation has more than {cap} bytes");
                Err(Bad::new("limit", "max_rendered_bytes", message).into())
            }
        }
    };
    let alone = render(None, &keys.prompt)?;
    let whole_chosen = render(Some(&chosen), &keys.chosen)?;
    let whole_rejected = render(Some(&rejected), &keys.rejected)?;
    for (messages, key) in [(&chosen, &keys.chosen), (&rejected, &keys.rejected)] {
        if !messages.iter().any(says_something) {
            let message = "expected a completion, found none but white space";
            return Err(Bad::new("empty_completion", key, message).into());
        }
    }
    if chosen == rejected || whole_chosen == whole_rejected {
        let message = "expected two completions, found the same one twice";
        return Err(Bad::new("identical_pair", &keys.rejected, message).into());
    }
    let mut cut = common_prefix(&alone, &whole_chosen).min(common_prefix(&alone, &whole_rejected));
    while !alone.is_char_boundary(cut) {
        cut -= 1;
    }
    let alone = if cut < alone.len() {
        pair.warn(Warning::NoTurnBoundary);
        Some(alone)
    } else {
        None
    };
    if cut == 0 {
        pair.warn(Warning::EmptyPrompt);
    }
    let (prompt, chosen) = whole_chosen.split_at(cut);
    let (_, rejected) = whole_rejected.split_at(cut);
    Ok(Texts {
        prompt: Cow::Owned(prompt.to_owned()),
        chosen: Cow::Owned(chosen.to_owned()),
        rejected: Cow::Owned(rejected.to_owned()),
        alone,
    })
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count()
}

fn common_ids(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Ids below the vocabulary's size, which is below 2^31.
fn signed(ids: &[u32]) -> impl Iterator<Item = i32> + '_ {
    ids.iter().map(|id| *id as i32)
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
    let completion = |text: &str| -> (String, Vec<u32>) {
        let mut joint = String::with_capacity(texts.prompt.len() + text.len() + 16);
        if options.boundary != Boundary::Separate {
            joint.push_str(&texts.prompt);
        }
        joint.push_str(text);
        let mut tail = Vec::new();
        let surrounded = behind.last().is_some_and(|last| Some(*last) == tokenizer.eos());
        if is_text && let Some(eos) = tokenizer.eos() {
            match tokenizer.eos_text() {
                Some(spelt) if text.ends_with(spelt) => {}
                // The surroundings bring EOS already.
                _ if surrounded && options.boundary != Boundary::Trl => {}
                Some(spelt) => joint.push_str(spelt),
                None => tail.push(eos),
            }
        }
        (joint, tail)
    };
    let (chosen_text, chosen_tail) = completion(&texts.chosen);
    let (rejected_text, rejected_tail) = completion(&texts.rejected);
    let mut chosen = tokenizer.encode_plain(&chosen_text)?;
    let mut rejected = tokenizer.encode_plain(&rejected_text)?;
    let bytes = texts.prompt.len();
    let (prompt, cut) = match options.boundary {
        Boundary::Joint => {
            let common = common_ids(&chosen, &rejected);
            let inside = |text: &str, ids: &[u32]| -> Result<(usize, usize)> {
                let ends = tokenizer.ends(text, ids)?;
                let count = ends.iter().take(common).take_while(|end| **end <= bytes).count();
                let covered = count.checked_sub(1).and_then(|i| ends.get(i)).copied().unwrap_or(0);
                Ok((count, covered))
            };
            let (a, a_end) = inside(&chosen_text, &chosen)?;
            let (b, b_end) = inside(&rejected_text, &rejected)?;
            if (if a <= b { a_end } else { b_end }) < bytes {
                pair.warn(Warning::BoundaryMerge);
            }
            (chosen.iter().take(a.min(b)).copied().collect(), a.min(b))
        }
        Boundary::Separate => (tokenizer.encode_plain(&texts.prompt)?, 0),
        Boundary::Trl => {
            let alone = texts.alone.as_deref().unwrap_or(&texts.prompt);
            let around = |ids: &[u32]| [before, ids, behind].concat();
            let prompt = around(&tokenizer.encode_plain(alone)?);
            chosen.extend(&chosen_tail);
            rejected.extend(&rejected_tail);
            let (whole_c, whole_r) = (around(&chosen), around(&rejected));
            let cut = common_ids(&prompt, &whole_c).min(common_ids(&prompt, &whole_r));
            if cut < prompt.len() {
                pair.warn(Warning::BoundaryMerge);
            }
            pair.prompt = signed(prompt.get(..cut).unwrap_or_default()).collect();
            pair.chosen = signed(whole_c.get(cut..).unwrap_or_default()).collect();
            pair.rejected = signed(whole_r.get(cut..).unwrap_or_default()).collect();
            return Ok(());
        }
    };
    // BOS once: text that brings its own gets no second one.
    let before = match (before.split_last(), tokenizer.bos()) {
        (Some((last, rest)), Some(bos)) if *last == bos && prompt.first() == Some(&bos) => {
            pair.warn(Warning::BosInText);
            rest
        }
        _ => before,
    };
    pair.prompt = signed(before).chain(signed(&prompt)).collect();
    let side = |ids: &[u32], tail: &[u32]| -> Vec<i32> {
        let rest = ids.get(cut..).unwrap_or_default();
        // The surroundings' EOS is not put behind one that the text spells.
        let doubled = !behind.is_empty() && behind.first() == rest.last();
        let behind = if doubled && behind.first().copied() == tokenizer.eos() {
            behind.get(1..).unwrap_or_default()
        } else {
            behind
        };
        signed(rest).chain(signed(tail)).chain(signed(behind)).collect()
    };
    pair.chosen = side(&chosen, &chosen_tail);
    pair.rejected = side(&rejected, &rejected_tail);
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
