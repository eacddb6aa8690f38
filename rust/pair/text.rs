//! A row of strings: two texts with a common beginning.

use std::borrow::Cow;

use super::implicit;
use super::options::{Options, SpecialText};
use super::outcome::{Pair, Warning};
use crate::error::Reason;
use crate::read::bad::Bad;
use crate::read::row::Strings;
use crate::tokenize::Tokenizer;

/// Two texts with a common beginning, the prompt.
pub(super) struct Texts<'a> {
    /// Prompt + chosen and prompt + rejected.
    pub(super) whole: [Cow<'a, str>; 2],
    /// Bytes of the prompt.
    pub(super) cut: usize,
    /// The prompt's own render where it is not the start of both sides; only `boundary="trl"` looks at it.
    pub(super) alone: Option<String>,
    /// Bytes of both texts that lie inside control tokens that must stay text.
    pub(super) marks: Option<[Vec<usize>; 2]>,
    /// Strings get EOS and the surroundings; a template writes its own.
    pub(super) are_strings: bool,
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

/// The texts of a row of strings.
pub(super) fn texts<'a>(
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
            return Err(Bad::new(Reason::EmptyCompletion, key, message));
        }
    }
    if chosen == rejected {
        return Err(Bad::new(
            Reason::IdenticalPair,
            &keys.rejected,
            "expected two completions, found the same one twice",
        ));
    }
    if cut == 0 {
        pair.warn(Warning::EmptyPrompt);
    }
    Ok(Texts { whole, cut, alone: None, marks: None, are_strings: true })
}
