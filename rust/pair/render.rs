//! Messages to text, by the template of a tokenizer.

use std::ops::Range;

use super::options::Options;
use super::outcome::{Pair, Refusal};
use crate::error::{Error, Reason, Warning};
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::template::{Conversation, RenderError, Rendered, Template, concatenate, shows_contents};
use crate::tokenize::Tokenizer;

/// A template with everything but the messages filled in.
pub(super) struct Renderer<'t> {
    pub(super) template: &'t Template,
    pub(super) tokenizer: &'t Tokenizer,
    pub(super) variables: Vec<(&'t str, &'t Value<'t>)>,
    pub(super) options: &'t Options,
}

impl Renderer<'_> {
    fn conversation<'a>(
        &'a self,
        messages: &'a [&'a Value<'a>],
        generation: bool,
    ) -> Conversation<'a> {
        Conversation {
            messages,
            named: self.tokenizer.named(),
            variables: &self.variables,
            generation,
            now: self.options.now,
            cap: self.options.limits.max_rendered_bytes,
        }
    }

    fn run(&self, messages: &[&Value<'_>], generation: bool) -> Result<Rendered, RenderError> {
        let conversation = self.conversation(messages, generation);
        concatenate(self.template, &conversation)
            .unwrap_or_else(|| self.template.render(&conversation))
    }

    /// The text of `prompt` and then `rest`; without `rest`, of the prompt and what begins an answer. Faults are those
    /// of the field `key`.
    pub(super) fn render(
        &self,
        prompt: &[Value<'_>],
        rest: Option<&[Value<'_>]>,
        key: &str,
        pair: &mut Pair,
    ) -> Result<Rendered, Refusal> {
        let messages: Vec<&Value<'_>> = prompt.iter().chain(rest.unwrap_or_default()).collect();
        match self.run(&messages, rest.is_none()) {
            Ok(rendered) => {
                if rendered.fallback {
                    pair.warn(Warning::TemplateFallback);
                }
                Ok(rendered)
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
                let cap = self.options.limits.max_rendered_bytes;
                let message = format!("the rendered conversation has more than {cap} bytes");
                Err(Bad::new(Reason::Limit, "max_rendered_bytes", message).into())
            }
        }
    }

    /// The text of a conversation, if the template takes it.
    pub(super) fn try_render(&self, messages: &[&Value<'_>]) -> Option<String> {
        self.run(messages, false).ok().map(|rendered| rendered.text)
    }

    /// The text of a conversation and what begins an answer, if the template takes it.
    pub(super) fn try_begin(&self, messages: &[&Value<'_>]) -> Option<String> {
        self.run(messages, true).ok().map(|rendered| rendered.text)
    }

    /// What the training tags of the template enclose in the text of a conversation, if it has such tags.
    pub(super) fn regions(&self, messages: &[&Value<'_>], text: &str) -> Option<Vec<Range<usize>>> {
        self.template.regions(&self.conversation(messages, false), text)
    }

    /// The text of a conversation with other tools, if some are given.
    pub(super) fn try_render_with(
        &self,
        messages: &[&Value<'_>],
        tools: Option<&Value<'_>>,
    ) -> Option<String> {
        let Some(tools) = tools else { return self.try_render(messages) };
        let other = |(name, value): &(_, _)| (*name, if *name == "tools" { tools } else { *value });
        let variables: Vec<(&str, &Value<'_>)> = self.variables.iter().map(other).collect();
        let conversation =
            Conversation { variables: &variables, ..self.conversation(messages, false) };
        self.template.render(&conversation).ok().map(|rendered| rendered.text)
    }

    /// The tools that the template sees.
    pub(super) fn tools(&self) -> Option<&[Value<'_>]> {
        self.variables.iter().find_map(|(name, value)| match value {
            Value::List(tools) if *name == "tools" => Some(tools.as_slice()),
            _ => None,
        })
    }

    /// Whether the template prints lists of parts and no strings.
    pub(super) fn reads_parts_only(&self) -> bool {
        self.template.reads_parts_only(|text, content| {
            let [asked, answer] = ["user", "assistant"].map(|role| {
                let role = ("role".into(), Value::Str(role.into()));
                Value::Object(vec![role, ("content".into(), content.clone())])
            });
            self.try_render(&[&asked, &answer]).map(|render| render.matches(text).count())
        })
    }

    /// Whether the template prints all contents of such a conversation, as far as their texts do not matter.
    pub(super) fn shows_contents(&self, messages: &[&Value<'_>]) -> bool {
        shows_contents(self.template, &self.conversation(messages, false))
    }
}

/// A template that refuses a row.
pub(super) fn failed(key: &str, message: String) -> Bad {
    Bad::new(Reason::TemplateError, key, message)
}
