//! Renders of a conversation with a mark behind each text, by which a text is known from others like it.

use super::render::Renderer;
use super::strings::{calls, with_field, with_leaves, with_texts};
use crate::read::json::Value;
use crate::template::strip;

/// A render of the same conversation in which each text has a mark of its own behind it.
pub(super) struct Marked {
    /// In lower case; none if the template does not take the marks.
    text: Option<String>,
    /// Calls and tools are marked as well.
    has_calls: bool,
}

impl Marked {
    fn content(message: usize, text: usize) -> String {
        format!("qzxk{message}t{text}v")
    }

    fn call(message: usize, call: usize, string: usize) -> String {
        format!("qzxk{message}c{call}s{string}v")
    }

    fn tool(tool: usize) -> String {
        format!("qzxktool{tool}v")
    }

    /// Renders `messages` with marks behind all contents, and behind what calls and tools say if the template takes it.
    pub(super) fn new(messages: &[&Value<'_>], renderer: &Renderer<'_>) -> Self {
        let contents: Vec<Value<'_>> =
            messages.iter().enumerate().map(|(i, message)| Self::message(i, message)).collect();
        let tools = renderer.tools().map(Self::tools);
        let render = |messages: &[Value<'_>], tools: Option<&Value<'_>>| {
            let text = renderer.try_render_with(&messages.iter().collect::<Vec<_>>(), tools);
            text.map(|text| text.to_lowercase())
        };
        if tools.is_some() || messages.iter().any(|message| !calls(message).is_empty()) {
            let all: Vec<Value<'_>> =
                contents.iter().enumerate().map(|(i, message)| Self::calls(i, message)).collect();
            if let Some(text) = render(&all, tools.as_ref()) {
                return Self { text: Some(text), has_calls: true };
            }
        }
        Self { text: render(&contents, None), has_calls: false }
    }

    fn message<'v>(i: usize, message: &Value<'v>) -> Value<'v> {
        with_field(message, "content", |content| {
            let mut count = 0;
            with_texts(content, &mut |text| {
                count += 1;
                // A template may leave out what is blank, and print it with the mark.
                if strip(text).is_empty() {
                    text.to_owned()
                } else {
                    text.to_owned() + &Self::content(i, count)
                }
            })
        })
    }

    fn calls<'v>(i: usize, message: &Value<'v>) -> Value<'v> {
        let mut number = 0;
        let mut marked = |call: &Value<'v>| {
            number += 1;
            let mut count = 0;
            let mut mark = |text: &str| {
                count += 1;
                text.to_owned() + &Self::call(i, number, count)
            };
            let mut said = |function: &Value<'v>| {
                let named = with_field(function, "name", |name| with_leaves(name, &mut mark));
                with_field(&named, "arguments", |value| with_leaves(value, &mut mark))
            };
            match call.get("function") {
                Some(_) => with_field(call, "function", said),
                None => said(call),
            }
        };
        let listed = with_field(message, "tool_calls", |calls| match calls {
            Value::List(calls) => Value::List(calls.iter().map(&mut marked).collect()),
            other => other.clone(),
        });
        with_field(&listed, "function_call", |call| match call {
            Value::Object(_) => marked(call),
            other => other.clone(),
        })
    }

    fn tools<'v>(tools: &[Value<'v>]) -> Value<'v> {
        let marked = |(i, tool): (usize, &Value<'v>)| {
            let mut mark = |text: &str| text.to_owned() + &Self::tool(i);
            let mut named = |function: &Value<'v>| {
                with_field(function, "name", |name| with_leaves(name, &mut mark))
            };
            match tool.get("function") {
                Some(_) => with_field(tool, "function", named),
                None => named(tool),
            }
        };
        Value::List(tools.iter().enumerate().map(marked).collect())
    }

    fn has(&self, mark: &str) -> bool {
        self.text.as_ref().is_none_or(|text| text.contains(mark))
    }

    /// Whether a text of a message is printed, as far as that is known; texts are counted from 1.
    pub(super) fn has_content(&self, message: usize, text: usize) -> bool {
        self.has(&Self::content(message, text))
    }

    /// Whether a string of a call is.
    pub(super) fn has_call(&self, message: usize, call: usize, string: usize) -> bool {
        !self.has_calls || self.has(&Self::call(message, call, string))
    }

    /// Whether the name of a tool is.
    pub(super) fn has_tool(&self, tool: usize) -> bool {
        !self.has_calls || self.has(&Self::tool(tool))
    }
}
