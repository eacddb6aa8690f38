//! Roles that a template does not know: their messages would be lost without a word.

use std::cell::RefCell;

use super::compiled::Template;
use super::conversation::{Conversation, Now};
use crate::read::json::Value;

/// Content that is found again in upper case, too, and that no template inspects.
const MARK: &str = "qzxk7193vqz";
/// Answers that a thread keeps.
const KEPT: usize = 256;

thread_local! {
    static KNOWN: RefCell<Vec<(u64, String, bool)>> = const { RefCell::new(Vec::new()) };
}

fn message<'v>(role: &'v str, content: &'v str) -> Value<'v> {
    let text = |text: &'v str| Value::Str(text.into());
    Value::Object(vec![("role".into(), text(role)), ("content".into(), text(content))])
}

/// The first role among `messages` whose content leaves no trace in any render that the template does not refuse.
pub(crate) fn unknown<'m>(
    template: &Template,
    named: &[(String, String)],
    messages: &'m [Value<'_>],
    now: Now,
) -> Option<&'m str> {
    messages.iter().find_map(|message| {
        let Some(Value::Str(role)) = message.get("role") else { return None };
        (!is_known(template, named, role, now)).then_some(role.as_ref())
    })
}

fn is_known(template: &Template, named: &[(String, String)], role: &str, now: Now) -> bool {
    let found = KNOWN.with_borrow(|known| {
        known.iter().find(|(owner, r, _)| *owner == template.owner && r == role).map(|k| k.2)
    });
    found.unwrap_or_else(|| {
        let answer = leaves_a_trace(template, named, role, now);
        KNOWN.with_borrow_mut(|known| {
            known.truncate(KEPT);
            known.insert(0, (template.owner, role.to_owned(), answer));
        });
        answer
    })
}

/// Whether a content of `role` is in some render, or all renders are refused: the template then says itself why.
fn leaves_a_trace(template: &Template, named: &[(String, String)], role: &str, now: Now) -> bool {
    let (marked, user, again) = (message(role, MARK), message("user", "a"), message("user", "b"));
    let answer = message("assistant", "c");
    let mut calling = message("assistant", "");
    if let Value::Object(items) = &mut calling {
        let name = ("name".into(), Value::Str("f".into()));
        let call = Value::Object(vec![name, ("arguments".into(), Value::Object(Vec::new()))]);
        let call = Value::Object(vec![
            ("type".into(), Value::Str("function".into())),
            ("id".into(), Value::Str("abcdefgh1".into())),
            ("function".into(), call),
        ]);
        items.push(("tool_calls".into(), Value::List(vec![call])));
    }
    let probes: [&[&Value<'_>]; 6] = [
        &[&marked],
        &[&user, &marked],
        &[&marked, &user],
        &[&user, &marked, &again],
        &[&user, &answer, &marked],
        &[&user, &calling, &marked],
    ];
    let mut refused = true;
    for messages in probes {
        let variables = &[];
        let cap = 1 << 20;
        let asked = Conversation { messages, named, variables, generation: false, now, cap };
        if let Ok(rendered) = template.render(&asked) {
            if rendered.text.to_lowercase().contains(MARK) {
                return true;
            }
            refused = false;
        }
    }
    refused
}
