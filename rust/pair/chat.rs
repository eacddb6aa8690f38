//! A row of messages: three renders of the template.

use std::borrow::Cow;

use super::options::{Options, SpecialText};
use super::outcome::{Pair, Refusal, Warning};
use super::text::{Texts, check_special, is_blank};
use crate::error::{Error, Reason, Result};
use crate::read::bad::Bad;
use crate::read::chat::Chat;
use crate::read::json::Value;
use crate::template::{Conversation, RenderError, Rendered, Template, concatenate, roles};
use crate::tokenize::Tokenizer;

/// Calls `see` with every string of a message but its role.
fn strings<'v>(value: &'v Value<'_>, see: &mut impl FnMut(&'v str)) {
    match value {
        Value::Str(text) => see(text),
        Value::List(items) => items.iter().for_each(|item| strings(item, see)),
        Value::Object(items) => {
            items.iter().filter(|(key, _)| key != "role").for_each(|(_, item)| strings(item, see));
        }
        _ => {}
    }
}

/// The same value with every string but a role changed.
fn changed<'v>(value: &Value<'v>, change: &impl Fn(&str) -> String) -> Value<'v> {
    match value {
        Value::Str(text) => Value::Str(change(text).into()),
        Value::List(items) => Value::List(items.iter().map(|item| changed(item, change)).collect()),
        Value::Object(items) => Value::Object(
            items
                .iter()
                .map(|(key, item)| {
                    let item = if key == "role" { item.clone() } else { changed(item, change) };
                    (key.clone(), item)
                })
                .collect(),
        ),
        other => other.clone(),
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

/// A template with everything but the messages filled in.
struct Renderer<'t> {
    template: &'t Template,
    tokenizer: &'t Tokenizer,
    variables: Vec<(&'t str, &'t Value<'t>)>,
    options: &'t Options,
}

impl Renderer<'_> {
    /// The text of `prompt` and then `rest`; without `rest`, of the prompt and what begins an answer.
    fn render(
        &self,
        prompt: &[Value<'_>],
        rest: Option<&[Value<'_>]>,
        key: &str,
        pair: &mut Pair,
    ) -> Result<String, Refusal> {
        let messages: Vec<&Value<'_>> = prompt.iter().chain(rest.unwrap_or_default()).collect();
        let cap = self.options.limits.max_rendered_bytes;
        let conversation = Conversation {
            messages: &messages,
            named: self.tokenizer.named(),
            variables: &self.variables,
            generation: rest.is_none(),
            now: self.options.now,
            cap,
        };
        let rendered = concatenate(self.template, &conversation)
            .unwrap_or_else(|| self.template.render(&conversation));
        match rendered {
            Ok(Rendered { text, fallback }) => {
                if fallback {
                    pair.warn(Warning::TemplateFallback);
                }
                Ok(text)
            }
            Err(RenderError::Template(message)) => Err(failed(key, message).into()),
            Err(RenderError::Lacks(construct)) => Err(Error::Tokenizer(construct).into()),
            Err(RenderError::Value(field, message)) => {
                let field = match field.as_str() {
                    "messages" => key,
                    "tools" => "tools",
                    _ => "chat_template_kwargs",
                };
                Err(failed(field, message).into())
            }
            Err(RenderError::TooLong) => {
                let message = format!("the rendered conversation has more than {cap} bytes");
                Err(Bad::new(Reason::Limit, "max_rendered_bytes", message).into())
            }
        }
    }
}

fn failed(key: &str, message: String) -> Bad {
    Bad::new(Reason::TemplateError, key, message)
}

/// The texts of a row of messages.
pub(super) fn texts(
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
    let parts = [(&prompt, &keys.prompt), (&chosen, &keys.chosen), (&rejected, &keys.rejected)];
    for (messages, key) in parts {
        let mut result = Ok(());
        for message in messages {
            strings(message, &mut |text| {
                if result.is_ok() {
                    result = check_special(text, key, tokenizer, options, pair);
                }
            });
        }
        result?;
    }
    let template = tokenizer.template(tools.is_some())?;
    let mut variables: Vec<(&str, &Value<'_>)> = Vec::new();
    variables.extend(tools.as_ref().map(|tools| ("tools", tools)));
    variables.extend(kwargs.iter().map(|(name, value)| (name.as_ref(), value)));
    let renderer = Renderer { template, tokenizer, variables, options };
    for (messages, key) in parts {
        if let Some(role) = roles::unknown(template, tokenizer.named(), messages, options.now) {
            let role: String = role.escape_debug().take(80).collect();
            let message =
                format!("the chat template knows no role `{role}` and would drop its message");
            return Err(Bad::new(Reason::BadMessages, key, message).into());
        }
    }
    let alone = renderer.render(&prompt, None, &keys.prompt, pair)?;
    let whole_chosen = renderer.render(&prompt, Some(&chosen), &keys.chosen, pair)?;
    let whole_rejected = renderer.render(&prompt, Some(&rejected), &keys.rejected, pair)?;
    for (messages, key) in [(&chosen, &keys.chosen), (&rejected, &keys.rejected)] {
        if !messages.iter().any(says_something) {
            let message = "expected a completion, found none but white space";
            return Err(Bad::new(Reason::EmptyCompletion, key, message).into());
        }
    }
    if chosen == rejected || whole_chosen == whole_rejected {
        let message = "expected two completions, found the same one twice";
        return Err(Bad::new(Reason::IdenticalPair, &keys.rejected, message).into());
    }
    let marks = if options.special_text == SpecialText::Text
        && pair.has(Warning::SpecialTokenInText)
    {
        let mark = |side: &[Value<'_>], key: &str, plain: &str| -> Result<Vec<usize>, Refusal> {
            marks(&renderer, tokenizer, [&prompt, side], key, plain)
        };
        Some([
            mark(&chosen, &keys.chosen, &whole_chosen)?,
            mark(&rejected, &keys.rejected, &whole_rejected)?,
        ])
    } else {
        None
    };
    let mut cut = if whole_chosen.starts_with(&alone) && whole_rejected.starts_with(&alone) {
        alone.len()
    } else {
        common_prefix(&alone, &whole_chosen).min(common_prefix(&alone, &whole_rejected))
    };
    while !alone.is_char_boundary(cut) {
        cut -= 1;
    }
    let alone = if cut < alone.len() {
        pair.warn(Warning::NoTurnBoundary);
        Some(alone)
    } else {
        None
    };
    let whole = [Cow::Owned(whole_chosen), Cow::Owned(whole_rejected)];
    Ok(Texts { whole, cut, alone, marks, are_strings: false })
}

/// Where in the render `plain` control tokens come from contents: found by rendering contents with a private character
/// inside each.
fn marks(
    renderer: &Renderer<'_>,
    tokenizer: &Tokenizer,
    [prompt, side]: [&[Value<'_>]; 2],
    key: &str,
    plain: &str,
) -> Result<Vec<usize>, Refusal> {
    let lost = || {
        let message = "the template changes contents that spell a control token, so they cannot be kept as text";
        Refusal::from(failed(key, message.to_owned()))
    };
    let mark = ('\u{e000}'..='\u{f8ff}').find(|mark| !plain.contains(*mark)).ok_or_else(lost)?;
    let marked = |messages: &[Value<'_>]| -> Vec<Value<'static>> {
        let change = |text: &str| tokenizer.control().marked(text, mark);
        messages.iter().map(|message| changed(message, &change).into_owned()).collect()
    };
    let text = renderer.render(&marked(prompt), Some(&marked(side)), key, &mut Pair::default())?;
    let mut at = Vec::new();
    let mut bare = String::with_capacity(plain.len());
    for c in text.chars() {
        if c == mark {
            at.push(bare.len());
        } else {
            bare.push(c);
        }
    }
    if bare == plain { Ok(at) } else { Err(lost()) }
}

fn common_prefix(a: &str, b: &str) -> usize {
    a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count()
}
