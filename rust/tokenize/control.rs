//! Control tokens, and how to find them in text.

use crate::template::Template;

/// Tokens that steer a model: special ones, and those that the chat template itself writes between turns.
#[derive(Default)]
pub struct Control {
    finder: Option<aho_corasick::AhoCorasick>,
    ids: Vec<i32>,
}

impl Control {
    /// The control tokens of `inner` beside these templates; special ones are none where their spelling stays text.
    pub(super) fn new(
        inner: &tokenizers::Tokenizer,
        templates: &[&Template],
        split_special: bool,
    ) -> Self {
        let structure =
            |token: &str| templates.iter().any(|template| template.source().contains(token));
        let mut texts = Vec::new();
        let mut ids = Vec::new();
        for (id, token) in inner.get_added_tokens_decoder() {
            let written = structure(&token.content);
            // `<think>` in an answer is the token that training expects, although templates mention it.
            let reasoning = token.content.contains("think") || token.content.contains("reason");
            if split_special && token.special {
                continue;
            }
            if !token.content.is_empty() && (token.special || (written && !reasoning)) {
                texts.push(token.content.clone());
                ids.push(id as i32);
            }
        }
        let finder = aho_corasick::AhoCorasick::builder()
            .match_kind(aho_corasick::MatchKind::LeftmostLongest)
            .build(&texts)
            .ok()
            .filter(|_| !texts.is_empty());
        ids.sort_unstable();
        Self { finder, ids }
    }

    /// Whether `text` spells a control token.
    pub fn occurs_in(&self, text: &str) -> bool {
        self.finder.as_ref().is_some_and(|finder| finder.is_match(text))
    }

    /// Whether `id` is a control token.
    pub fn has(&self, id: i32) -> bool {
        self.ids.binary_search(&id).is_ok()
    }

    /// Puts `mark` inside every control token that `text` spells, behind its first character.
    pub fn marked(&self, text: &str, mark: char) -> String {
        let mut out = String::with_capacity(text.len() + 16);
        let mut done = 0;
        for found in self.finder.iter().flat_map(|finder| finder.find_iter(text)) {
            let spelt = text.get(found.range()).unwrap_or_default();
            let middle = found.start() + spelt.chars().next().map_or(0, char::len_utf8);
            out.push_str(text.get(done..middle).unwrap_or_default());
            out.push(mark);
            done = middle;
        }
        out.push_str(text.get(done..).unwrap_or_default());
        out
    }
}
