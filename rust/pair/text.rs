//! A row of strings: two texts with a common beginning.

use std::borrow::Cow;
use std::ops::Range;

use super::factors::{Factors, in_bytes};
use super::implicit;
use super::options::{Boundary, Options, SpecialText, TrainOn, Useless};
use super::outcome::Pair;
use crate::error::{Reason, Warning};
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::keys::Field;
use crate::read::layouts::Layout;
use crate::read::said::Strings;
use crate::tokenize::Tokenizer;

/// Two texts with a common beginning, the prompt.
pub(super) struct Texts<'a> {
    /// Prompt + chosen and prompt + rejected.
    pub(super) whole: [Cow<'a, str>; 2],
    /// Bytes of the prompt.
    pub(super) cut: usize,
    /// The prompt's own render where it is not the start of both sides; only `boundary="trl"` looks at it.
    pub(super) alone: Option<String>,
    /// Where both texts have the control tokens that may stand, if others must stay text.
    pub(super) kept: Option<[Vec<Range<usize>>; 2]>,
    /// Words of strings may become control tokens that the options refuse.
    pub(super) is_suspect: bool,
    /// Strings get EOS and the surroundings; a template writes its own.
    pub(super) are_strings: bool,
    /// What the tokens of each text weigh, by all factors of each, where some are weighed.
    pub(super) factors: Option<[Vec<Factors>; 2]>,
}

impl Texts<'_> {
    pub(super) fn prompt(&self) -> &str {
        self.whole[0].get(..self.cut).unwrap_or_default()
    }
}

/// Notes control tokens that contents spell; an error where the options say so.
pub(super) fn check_special(
    text: &str,
    field: &str,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<(), Bad> {
    if tokenizer.control().occurs_in(text) {
        if options.special_text == SpecialText::Error {
            let message = "expected plain text, found the spelling of a control token";
            return Err(Bad::new(Reason::SpecialTokenInText, field, message));
        }
        pair.warn(Warning::SpecialTokenInText);
    }
    Ok(())
}

pub(super) fn is_blank(text: &str) -> bool {
    // `char::is_whitespace` is Unicode's White_Space, like the `\s` of tokenizers' regexes but for U+001C..U+001F.
    text.chars().all(|c| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// Whether a text is more than a word, with which any answer may begin.
fn is_a_prompt(text: &str) -> bool {
    let text = text.trim();
    text.contains(char::is_whitespace)
        || text.chars().next_back().is_some_and(|last| !last.is_alphanumeric())
}

/// A text without its first bytes.
fn behind(text: Cow<'_, str>, bytes: usize) -> Cow<'_, str> {
    match text {
        Cow::Borrowed(text) => text.get(bytes..).unwrap_or_default().into(),
        Cow::Owned(mut text) => text.split_off(bytes).into(),
    }
}

/// The texts of a row of strings.
pub(super) fn texts<'a>(
    strings: Strings<'a>,
    given: &[Option<Value<'_>>; 2],
    layout: Layout,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<Texts<'a>, Bad> {
    let Strings { prompt, mut chosen, mut rejected } = strings;
    let eos = tokenizer.eos_text();
    let body = |text: &str| eos.and_then(|eos| text.strip_suffix(eos)).unwrap_or(text).len();
    let keys = &options.keys;
    let parts = [
        (prompt.as_deref().unwrap_or_default(), &keys.prompt),
        (chosen.get(..body(&chosen)).unwrap_or_default(), &keys.chosen),
        (rejected.get(..body(&rejected)).unwrap_or_default(), &keys.rejected),
    ];
    let mut is_suspect = false;
    for (text, key) in parts {
        check_special(text, key, tokenizer, options, pair)?;
        is_suspect |= tokenizer.control().is_telling(text);
    }
    is_suspect &= options.special_text != SpecialText::Special;
    // The engine that cannot keep them as text may find none.
    let as_text =
        is_suspect && options.special_text == SpecialText::Text && tokenizer.refusal().is_none();
    let different = || {
        let message = "expected the same prompt on both sides, found texts that part in what is asked\nhint: DPO \
                       compares answers to one prompt; where the prompts differ Z(x) does not cancel";
        Bad::new(Reason::DifferentPrompts, &keys.rejected, message)
    };
    // Where the field of a side begins in the whole text.
    let mut base = 0;
    let (whole, cut) = if let Some(prompt) = prompt {
        base = prompt.len();
        let mut cut = prompt.len();
        if is_a_prompt(&prompt) && chosen.starts_with(&*prompt) && rejected.starts_with(&*prompt) {
            pair.warn(Warning::PromptInSides);
            // TRL trains on what stands there twice.
            if options.boundary != Boundary::Trl {
                (chosen, rejected) = (behind(chosen, cut), behind(rejected, cut));
                base = 0;
            }
        }
        if options.boundary != Boundary::Trl
            && !keys.is_single()
            && implicit::begins_asked(&chosen)
            && implicit::begins_asked(&rejected)
        {
            let split = implicit::split(&chosen, &rejected);
            if split.is_asked {
                return Err(different());
            }
            cut += if split.at_turn { split.cut } else { 0 };
        }
        let room = tokenizer.eos_text().map_or(0, str::len);
        let joined = |side: &str| {
            let mut whole = String::with_capacity(prompt.len() + side.len() + room);
            whole.push_str(&prompt);
            whole.push_str(side);
            Cow::Owned(whole)
        };
        ([joined(&chosen), joined(&rejected)], cut)
    } else {
        let split = implicit::split(&chosen, &rejected);
        if split.is_asked {
            return Err(different());
        }
        if !split.at_turn {
            pair.warn(Warning::NoTurnBoundary);
        }
        let cut = split.cut;
        ([chosen, rejected], cut)
    };
    let factors = factors(given, &whole, base, cut, options)?;
    let [chosen, rejected] = whole.each_ref().map(|whole| whole.get(cut..).unwrap_or_default());
    let drops = options.useless == Useless::Drop;
    for (text, key) in [(chosen, &keys.chosen), (rejected, &keys.rejected)] {
        if drops && is_blank(text.get(..body(text)).unwrap_or_default()) {
            let message = "expected a completion, found none but white space";
            return Err(Bad::new(Reason::EmptyCompletion, key, message));
        }
    }
    if drops && !keys.is_single() && chosen == rejected {
        return Err(Bad::new(
            Reason::IdenticalPair,
            &keys.rejected,
            "expected two completions, found the same one twice",
        ));
    }
    if cut == 0 {
        if layout == Layout::Implicit {
            let message = "expected a beginning that both sides share, found none";
            return Err(Bad::new(Reason::MissingPrompt, &keys.prompt, message));
        }
        pair.warn(Warning::EmptyPrompt);
    }
    let kept = as_text.then(<[Vec<Range<usize>>; 2]>::default);
    Ok(Texts { whole, cut, alone: None, kept, are_strings: true, is_suspect, factors })
}

/// What the tokens of both texts weigh, if the row or the options say so. The row counts the characters of its own
/// fields, which begin at the byte `base`.
fn factors(
    given: &[Option<Value<'_>>; 2],
    whole: &[Cow<'_, str>; 2],
    base: usize,
    cut: usize,
    options: &Options,
) -> Result<Option<[Vec<Factors>; 2]>, Bad> {
    let keys = &options.keys;
    if options.train_on != TrainOn::Completion {
        for (whole, key) in whole.iter().zip([&keys.chosen, &keys.rejected]) {
            if whole.get(cut..).is_some_and(implicit::asks) {
                return Err(options.train_on.unknown(key, "a text with a question in it"));
            }
        }
    }
    if given.iter().all(Option::is_none) {
        return Ok(None);
    }
    let mut out = [Vec::new(), Vec::new()];
    let fields = [Field::ChosenWeights, Field::RejectedWeights].map(|field| keys.name(field));
    for (((out, value), whole), name) in out.iter_mut().zip(given).zip(whole).zip(fields) {
        if let Some(value) = value {
            let mut spans = in_bytes(value, name, whole.get(base..).unwrap_or_default())?;
            for (bytes, _) in &mut spans {
                *bytes = base + bytes.start..base + bytes.end;
            }
            out.push(Factors::of(spans));
        }
    }
    Ok(Some(out))
}
