//! A row of messages: three renders of the template.

use std::borrow::Cow;
use std::ops::Range;

use super::content::{Side, check_content, in_parts, joined};
use super::factors::{Factors, in_bytes};
use super::forged::{Conversation, Word, all_kept, words, words_of};
use super::options::{EmptyThink, Options, SpecialText, TrainOn, Useless};
use super::outcome::{Pair, Refusal};
use super::places::{ends, places, text_of};
use super::prompt::{Parts, parted};
use super::render::{Renderer, failed};
use super::text::{Texts, check_special, is_blank};
use super::trained::{Render, empty_think};
use crate::bpe::common_prefix;
use crate::error::{Reason, Result, Warning};
use crate::read::bad::Bad;
use crate::read::chat::Chat;
use crate::read::json::Value;
use crate::read::keys::Field;
use crate::read::layouts::Layout;
use crate::tokenize::Tokenizer;

/// Looks at the words of a row for what spells a control token, or may become one.
struct Guard<'g> {
    tokenizer: &'g Tokenizer,
    options: &'g Options,
    is_suspect: bool,
}

impl Guard<'_> {
    /// Looks at the words that `all` gives, which stand in the field `name`.
    fn see<'v>(
        &mut self,
        name: &str,
        pair: &mut Pair,
        all: impl FnOnce(&mut dyn FnMut(Word<'v>)),
    ) -> Result<(), Bad> {
        let Self { tokenizer, options, .. } = *self;
        let is_guarded = options.special_text != SpecialText::Special;
        let mut result = Ok(());
        all(&mut |word| {
            self.is_suspect =
                self.is_suspect || (is_guarded && word.is_suspect(tokenizer.control()));
            if let (Word::Text(text) | Word::Key(text), true) = (word, result.is_ok()) {
                result = check_special(text, name, tokenizer, options, pair);
            }
        });
        result
    }
}

fn says_something(message: &Value<'_>) -> bool {
    if matches!(message.get("tool_calls"), Some(Value::List(calls)) if !calls.is_empty()) {
        return true;
    }
    match message.get("content") {
        Some(Value::Str(text)) => !is_blank(text),
        Some(Value::List(parts)) => {
            parts.iter().any(|part| match part.get("text").unwrap_or(part) {
                Value::Str(text) => !is_blank(text),
                _ => true, // an image, for example
            })
        }
        _ => false,
    }
}

/// The texts of a row of messages.
pub(super) fn texts(
    chat: Chat<'_>,
    given: &[Option<Value<'_>>; 2],
    layout: Layout,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<Texts<'static>, Refusal> {
    let Chat { mut turns, tools, kwargs } = chat;
    let is_single = options.keys.is_single();
    let weights = if is_single { [Vec::new(), Vec::new()] } else { turns.take_weights() };
    let names = turns.fields.map(|field| options.keys.name(field));
    if layout.makes_turns() && tokenizer.template(false).is_err() {
        let name = names[0];
        let message = format!(
            "expected a chat template, which prints rows of `{name}`, found none\nhint: give \
             `chat_template=`, or read the field as text by `prompt_key=\"{name}\"`"
        );
        return Err(failed(name, message).into());
    }
    let mut guard = Guard { tokenizer, options, is_suspect: false };
    for part in
        [turns.prompt.as_deref(), Some(&turns.chosen), Some(&turns.rejected)].iter().zip(names)
    {
        let (Some(messages), name) = part else { continue };
        for message in *messages {
            guard.see(name, pair, |see| words_of(message, see))?;
        }
    }
    if let Some(value) = &tools {
        guard.see("tools", pair, |see| words(value, see))?;
    }
    for (_, value) in &kwargs {
        guard.see("chat_template_kwargs", pair, |see| words(value, see))?;
    }
    let is_suspect = guard.is_suspect;
    let template = tokenizer.template(tools.is_some())?;
    let mut variables: Vec<(&str, &Value<'_>)> = Vec::new();
    variables.extend(tools.as_ref().map(|tools| ("tools", tools)));
    for (name, value) in &kwargs {
        // What is null may be so because another row of its table has it.
        if *value != Value::Null && !tokenizer.reads(name) {
            return Err(unread(name, tokenizer).into());
        }
        variables.push((name.as_ref(), value));
    }
    // What the options say is not the row's.
    let of_row = variables.len();
    for (name, value) in &options.kwargs {
        if !variables.iter().any(|(known, _)| known == name) {
            variables.push((name.as_str(), value));
        }
    }
    let renderer = Renderer { template, tokenizer, variables, options };
    if pair.has(Warning::Images) {
        turns.drop_media();
    }
    in_parts(&mut turns, &renderer);
    joined(&mut turns, &renderer);
    let parts = parted(turns, &renderer, options, pair)?;
    if parts.prompt.is_empty() && parts.chosen != parts.rejected && layout != Layout::Completions {
        let message = "expected turns that both sides share, found none";
        return Err(Bad::new(Reason::MissingPrompt, names[0], message).into());
    }
    let Parts { prompt, chosen, rejected, own, twice, spelt } = parts;
    let alone = match renderer.render(&prompt, None, names[0], pair) {
        Ok(rendered) => rendered.text,
        // Templates need not know how a conversation begins without a turn.
        Err(Refusal::Row(_)) if prompt.is_empty() => String::new(),
        Err(refusal) => return Err(refusal),
    };
    let whole_chosen = renderer.render(&prompt, Some(&chosen), names[1], pair)?;
    // Both sides of a row of one completion are the same.
    let whole_rejected = if is_single {
        None
    } else {
        Some(renderer.render(&prompt, Some(&rejected), names[2], pair)?)
    };
    let printed_rejected = whole_rejected.as_ref().unwrap_or(&whole_chosen);
    let drops = options.useless == Useless::Drop;
    for (messages, key) in [(&chosen, names[1]), (&rejected, names[2])] {
        if drops && !messages.iter().any(says_something) {
            let message = "expected a completion, found none but white space";
            return Err(Bad::new(Reason::EmptyCompletion, key, message).into());
        }
    }
    let identical = || {
        let message = "expected two completions, found the same one twice";
        Refusal::from(Bad::new(Reason::IdenticalPair, names[2], message))
    };
    if drops && !is_single && chosen == rejected {
        return Err(identical());
    }
    let sides = [(&chosen, &whole_chosen, names[1]), (&rejected, printed_rejected, names[2])];
    let several = if is_single { 1 } else { sides.len() };
    for (i, (side, rendered, name)) in sides.into_iter().take(several).enumerate() {
        let given = spelt.get(i).and_then(Option::as_ref);
        let messages = match given {
            Some(turns) => turns.iter().collect(),
            None => prompt.iter().chain(side).collect::<Vec<_>>(),
        };
        // What the prompt says is looked for once.
        let from = if i == 0 || given.is_some() { 0 } else { prompt.len() };
        let names = [names[0], name];
        // Where the prompt ends, if it is printed as it is alone.
        let begin = if from > 0 && rendered.text.starts_with(&alone) { alone.len() } else { 0 };
        let completion = messages.len() - side.len();
        let side =
            Side { messages, from, begin, completion, names, own, twice, spelt: given.is_some() };
        check_content(&side, rendered, &renderer, pair)?;
    }
    let whole_chosen = whole_chosen.text;
    let whole_rejected =
        whole_rejected.map_or_else(|| whole_chosen.clone(), |rendered| rendered.text);
    // What the sides say is printed, and alike.
    if drops && !is_single && whole_chosen == whole_rejected {
        return Err(identical());
    }
    let mut kept = None;
    if is_suspect {
        let find = |side: &[Value<'_>], key: &str, text: &str| {
            let messages = prompt.iter().chain(side).collect();
            let conversation = Conversation { renderer: &renderer, of_row, messages, key, text };
            conversation.kept(options.special_text)
        };
        let first = find(&chosen, names[1], &whole_chosen)?;
        let second =
            if is_single { first.clone() } else { find(&rejected, names[2], &whole_rejected)? };
        if first.is_some() || second.is_some() {
            pair.warn(Warning::SpecialTokenInText);
            let all = |text: &str| all_kept(text, tokenizer);
            kept = Some([
                first.map_or_else(|| all(&whole_chosen), Ok)?,
                second.map_or_else(|| all(&whole_rejected), Ok)?,
            ]);
        }
    }
    let mut cut = if whole_chosen.starts_with(&alone) && whole_rejected.starts_with(&alone) {
        alone.len()
    } else {
        common_prefix(&alone, &whole_chosen).min(common_prefix(&alone, &whole_rejected))
    };
    let alone = if cut < alone.len() {
        pair.warn(Warning::NoTurnBoundary);
        Some(alone)
    } else {
        None
    };
    if options.empty_think == EmptyThink::Prompt && alone.is_none() {
        let ends =
            [&whole_chosen, &whole_rejected].map(|whole| whole.get(cut..).and_then(empty_think));
        if let [Some(end), Some(other)] = ends
            && end == other
        {
            cut += end;
        }
    }
    let mut factors = [Vec::new(), Vec::new()];
    let fields =
        [Field::ChosenWeights, Field::RejectedWeights].map(|field| options.keys.name(field));
    let is_weighed = options.train_on != TrainOn::Completion
        || given.iter().any(Option::is_some)
        || weights.iter().flatten().any(Option::is_some);
    let sides = [(&chosen, &whole_chosen), (&rejected, &whole_rejected)];
    for (i, (side, whole)) in sides.into_iter().enumerate().filter(|_| is_weighed) {
        let render = Render::new(&renderer, &prompt, side, whole, (cut, alone.is_none()));
        let own = weights[i].len().checked_sub(side.len()).and_then(|at| weights[i].get(at..));
        let names = [names[1 + i], fields[i]];
        let weighed =
            weigh(&render, own.unwrap_or_default(), given[i].as_ref(), names, options.train_on)?;
        factors[i].extend(weighed);
    }
    let factors = factors.iter().any(|factors| !factors.is_empty()).then_some(factors);
    let whole = [Cow::Owned(whole_chosen), Cow::Owned(whole_rejected)];
    Ok(Texts { whole, cut, alone, kept, are_strings: false, is_suspect: false, factors })
}

/// What the tokens of a side weigh: by its turns, by the weights in its messages, `own`, and by its field of weights.
fn weigh(
    render: &Render<'_>,
    own: &[Option<Value<'_>>],
    given: Option<&Value<'_>>,
    [name, field]: [&str; 2],
    train_on: TrainOn,
) -> Result<Vec<Factors>, Bad> {
    let mut factors = Vec::new();
    if train_on != TrainOn::Completion {
        let found = "a conversation whose chat template hides them";
        let trained = render.trained(train_on)?.ok_or_else(|| train_on.unknown(name, found))?;
        factors.push(Factors::only(trained));
    }
    let bad = |message: &str| Bad::new(Reason::BadWeights, field, message);
    if own.iter().all(Option::is_none) && given.is_none() {
        return Ok(factors);
    }
    let side = render.messages.get(render.first..).unwrap_or_default();
    let mut spans = vec![Vec::new(); render.messages.len()];
    for (i, turn) in side.iter().enumerate() {
        let own = own.get(i).and_then(Option::as_ref);
        let (value, name) = match (own, given) {
            (Some(_), Some(_)) => {
                return Err(bad("expected weights in one place, found some in a message, too"));
            }
            (Some(value), None) => (value, name),
            (None, Some(value)) if side.len() == 1 => (value, field),
            (None, Some(_)) => {
                return Err(bad(
                    "expected one turn that these weigh, found several\nhint: give each message its own `weights`",
                ));
            }
            (None, None) => continue,
        };
        let text = text_of(turn);
        if let Some(spans) = spans.get_mut(render.first + i) {
            *spans = in_bytes(value, name, &text)?;
        }
    }
    let stretches = stretches(render, &spans).ok_or_else(|| {
        let message = "expected a chat template that prints contents as they are, found one that changes those with \
                       weights";
        Bad::new(Reason::BadWeights, name, message)
    })?;
    factors.push(Factors::of(stretches));
    Ok(factors)
}

/// Where a render has stretches of the texts of its messages, in bytes of each.
fn stretches(
    render: &Render<'_>,
    spans: &[Vec<(Range<usize>, f32)>],
) -> Option<Vec<(Range<usize>, f32)>> {
    let borders = |spans: &[(Range<usize>, f32)]| -> Vec<usize> {
        spans.iter().flat_map(|(bytes, _)| [bytes.start, bytes.end]).collect()
    };
    let at: Vec<Vec<usize>> = spans.iter().map(|spans| borders(spans)).collect();
    let find = |at: &[Vec<usize>]| places(&render.messages, at, render.renderer, render.whole);
    let found = find(&at).or_else(|| {
        // A template may print texts without the white space around them.
        let inner = at.iter().zip(&render.messages).map(|(at, message)| {
            let [start, end] = ends(&text_of(message)).unwrap_or_default();
            at.iter().map(|place| (*place).clamp(start, end)).collect()
        });
        find(&inner.collect::<Vec<_>>())
    })?;
    let mut out = Vec::new();
    for (places, spans) in found.iter().zip(spans) {
        for (pair, (_, factor)) in places.chunks_exact(2).zip(spans) {
            out.push((pair[0]..pair[1], *factor));
        }
    }
    out.retain(|(bytes, _)| !bytes.is_empty());
    out.sort_by_key(|(bytes, _)| bytes.start);
    Some(out)
}

/// The error of a variable that no template reads.
fn unread(name: &str, tokenizer: &Tokenizer) -> Bad {
    let name: String = name.escape_debug().take(80).collect();
    let known = tokenizer.variables().join(", ");
    let message = format!("no chat template reads `{name}`\nhint: it reads {known}");
    Bad::new(Reason::BadMessages, "chat_template_kwargs", message)
}
