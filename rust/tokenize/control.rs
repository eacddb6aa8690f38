//! Control tokens, and how to find them in text.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use aho_corasick::{AhoCorasick, MatchKind};

use super::seams::Seams;
use crate::template::{Literals, strip};

/// Characters to mark texts with: those of private use; and, for normalisers that take these away, Yi syllables.
const MARKS: [RangeInclusive<char>; 2] = ['\u{e000}'..='\u{f8ff}', '\u{a000}'..='\u{a48c}'];

/// An added token, as far as it matters here.
pub(super) struct Candidate {
    pub(super) id: i32,
    pub(super) text: String,
    pub(super) special: bool,
    /// Searched in normalised text, by a tokenizer that normalises.
    pub(super) normalised: bool,
    /// Searched in the text as it is, whatever stands around it.
    pub(super) raw: bool,
}

/// Which texts a normaliser may make a control token of, that have no telling character.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Normal {
    /// None.
    #[default]
    Same,
    /// Those with a character that is not ASCII.
    Wide,
    /// All: what it does is not known.
    Any,
}

/// Tokens that steer a model: special ones, and those that the chat template itself writes between turns.
///
/// Every spelling of one begins and ends with a *telling* character. A text without any can be in a control token only
/// where a template writes the beginning and the end of it around the text: at a *seam*.
#[derive(Default)]
pub struct Control {
    tokens: Vec<Candidate>,
    finder: Option<AhoCorasick>,
    /// Finds all added tokens as the tokenizer does, with the id of each, where no text around them matters.
    scan: Option<(AhoCorasick, Vec<i32>)>,
    ids: Vec<i32>,
    /// The telling characters, and the first byte of each.
    telling: BTreeSet<char>,
    leads: Vec<u8>,
    /// What else may become one.
    normal: Normal,
    /// What a text at a seam must say to become a control token.
    middles: BTreeSet<String>,
    /// A template may take a text apart, so that parts of it stand at a seam.
    cuts: bool,
    /// A template may write letters large or small.
    cases: bool,
    /// A template may make a control token of texts that are in no seam and have no telling character.
    makes: bool,
    /// Control tokens whose spelling gives their id even where it stays text.
    pub(super) merged: Vec<String>,
    /// Characters that make a control token text where one stands inside; `None` if none is known.
    marks: Option<RangeInclusive<char>>,
    /// Those that stand in the spelling of one.
    spelling: BTreeSet<char>,
}

impl Control {
    /// The control tokens among `tokens`, by what templates write; `wide` where the normaliser is NFC.
    pub(super) fn new(
        tokens: Vec<Candidate>,
        literals: &[Literals],
        named: &[(String, String)],
        sources: &[String],
        wide: bool,
    ) -> Self {
        let seams = Seams::new(literals, named);
        let is_control = |token: &Candidate| {
            // `<think>` in an answer is the token that training expects, although templates mention it.
            let reasoning = token.text.contains("think") || token.text.contains("reason");
            let written = || sources.iter().any(|source| source.contains(&token.text));
            !token.text.is_empty()
                && (token.special
                    || (!reasoning && (written() || !seams.middles(&token.text).is_empty())))
        };
        let scan = scan(&tokens);
        let tokens: Vec<Candidate> = tokens.into_iter().filter(is_control).collect();
        let finder = finder(&tokens);
        let mut ids: Vec<i32> = tokens.iter().map(|token| token.id).collect();
        ids.sort_unstable();
        let mut telling = BTreeSet::new();
        for token in &tokens {
            let ends = [token.text.chars().next(), token.text.chars().next_back()];
            for c in ends.into_iter().flatten() {
                // A template may write letters large or small.
                telling.extend(c.to_lowercase().chain(c.to_uppercase()).chain([c]));
            }
        }
        let mut leads: Vec<u8> =
            telling.iter().map(|c| c.encode_utf8(&mut [0; 4]).as_bytes()[0]).collect();
        leads.dedup();
        let loose = tokens.iter().any(|token| token.normalised);
        let middles = tokens.iter().flat_map(|token| seams.middles(&token.text)).collect();
        let mut control = Self {
            spelling: tokens.iter().flat_map(|token| token.text.chars()).collect(),
            tokens,
            finder,
            scan,
            ids,
            telling,
            leads,
            normal: match (loose, wide) {
                (false, _) => Normal::Same,
                (true, true) => Normal::Wide,
                (true, false) => Normal::Any,
            },
            middles,
            cuts: literals.iter().any(|literals| literals.cuts),
            cases: literals.iter().any(|literals| literals.cases),
            makes: false,
            merged: Vec::new(),
            marks: MARKS.into_iter().next(),
        };
        let is_made = |literals: &Literals| {
            let replaces = |text: &String| control.is_telling(text) || control.is_part(text);
            literals.makes || literals.replacements.iter().any(replaces)
        };
        control.makes = !control.ids.is_empty() && literals.iter().any(is_made);
        control
    }

    /// Finds marks that the normaliser does not take away, where that could make a control token.
    pub(super) fn test_marks(&mut self, encode: impl Fn(&str) -> Vec<i32>) {
        if self.normal != Normal::Same {
            let stays = |mark: char| {
                let is_there =
                    |token: &Candidate| encode(&self.broken(&token.text, mark)).contains(&token.id);
                self.tokens.iter().any(is_there)
            };
            self.marks = MARKS.into_iter().find(|marks| !stays(*marks.start()));
        }
    }

    /// Tokens of some kind whose spelling gives their id where it should stay text, as `as_text` encodes it.
    pub(super) fn merges(
        &self,
        as_text: impl Fn(&str) -> Vec<i32>,
        kind: impl Fn(&Candidate) -> bool,
    ) -> Vec<String> {
        let is_merged = |token: &&Candidate| {
            let text = &token.text;
            let beside =
                [text.clone(), format!(" {text}"), format!("a{text}a"), format!("\n{text}\n")];
            beside.iter().any(|text| as_text(text).contains(&token.id))
        };
        let found = self.tokens.iter().filter(|token| kind(token)).filter(is_merged);
        found.map(|token| token.text.clone()).collect()
    }

    /// Whether `text` spells a control token.
    pub fn occurs_in(&self, text: &str) -> bool {
        self.has_lead(text) && self.finder.as_ref().is_some_and(|finder| finder.is_match(text))
    }

    fn has_lead(&self, text: &str) -> bool {
        let bytes = text.as_bytes();
        match *self.leads {
            [] => false,
            [a] => memchr::memchr(a, bytes).is_some(),
            [a, b] => memchr::memchr2(a, b, bytes).is_some(),
            [a, b, c] => memchr::memchr3(a, b, c, bytes).is_some(),
            _ => bytes.iter().any(|byte| self.leads.contains(byte)),
        }
    }

    fn tells(&self, c: char) -> bool {
        self.telling.contains(&c) || (self.normal == Normal::Wide && !c.is_ascii())
    }

    /// Whether a text may become a control token by itself, or with another one before or behind it.
    pub fn is_telling(&self, text: &str) -> bool {
        match self.normal {
            Normal::Any => true,
            Normal::Wide if !text.is_ascii() => true,
            _ => self.has_lead(text) && text.chars().any(|c| self.tells(c)),
        }
    }

    /// Whether a text at a seam, or with others there, may become a control token.
    pub fn is_part(&self, text: &str) -> bool {
        let text = strip(text);
        !self.middles.is_empty() && !text.is_empty() && {
            let text = self.folded(text);
            self.middles.iter().any(|middle| self.folded(middle).contains(&*text))
        }
    }

    /// Whether a template may take a text apart so that its parts are one at a seam.
    pub fn has_part(&self, text: &str) -> bool {
        self.cuts && !self.middles.is_empty() && {
            let text = self.folded(text);
            let has = |middle: &String| {
                let mut rest = text.chars();
                self.folded(middle).chars().all(|c| rest.any(|other| other == c))
            };
            self.middles.iter().any(has)
        }
    }

    /// A text as it is compared.
    fn folded<'t>(&self, text: &'t str) -> Cow<'t, str> {
        if self.cases { text.to_lowercase().into() } else { text.into() }
    }

    /// Whether a template may make a control token of any text.
    pub fn is_made(&self) -> bool {
        self.makes
    }

    /// Control tokens whose spelling gives their id even where it stays text: they are ordinary merges, too.
    pub fn merged(&self) -> &[String] {
        &self.merged
    }

    /// Whether `id` is a control token.
    pub fn has(&self, id: i32) -> bool {
        self.ids.binary_search(&id).is_ok()
    }

    /// The control tokens among ids, in their order.
    pub fn of(&self, ids: &[i32]) -> Vec<i32> {
        ids.iter().copied().filter(|id| self.has(*id)).collect()
    }

    /// A mark that stands neither in `text` nor in a control token.
    pub fn mark(&self, text: &str) -> Option<char> {
        self.marks.clone()?.find(|c| !self.spelling.contains(c) && !text.contains(*c))
    }

    /// The control tokens of a text, where they can be told without encoding it.
    pub fn spelt(&self, text: &str) -> Option<Vec<i32>> {
        let (finder, ids) = self.scan.as_ref()?;
        let found = finder.find_iter(text);
        let ids = found.filter_map(|found| ids.get(found.pattern().as_usize()).copied());
        Some(ids.filter(|id| self.has(*id)).collect())
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

    /// Puts `mark` on both sides of all that a control token could be made of: every telling character; every text that
    /// is part of a token with seams; and, where templates may make more of a text, every character.
    /// White space around a text stays around it.
    pub fn broken(&self, text: &str, mark: char) -> String {
        let all = self.normal == Normal::Any || self.makes || self.has_part(text);
        let whole = all || self.is_part(text);
        let inner = strip(text);
        let start = if inner.is_empty() {
            text.len()
        } else {
            inner.as_ptr() as usize - text.as_ptr() as usize
        };
        let end = start + inner.len();
        let mut out = String::with_capacity(text.len() + 16);
        let mut last = None;
        let mut push = |c: char| {
            if c != mark || last != Some(mark) {
                out.push(c);
            }
            last = Some(c);
        };
        for (at, c) in text.char_indices() {
            let (is_first, is_behind) = (whole && at == start, at + c.len_utf8() == end && whole);
            let apart = self.tells(c) || (all && (start..end).contains(&at));
            if apart || is_first {
                push(mark);
            }
            push(c);
            if apart || is_behind {
                push(mark);
            }
        }
        out
    }
}

fn finder(tokens: &[Candidate]) -> Option<AhoCorasick> {
    let texts = tokens.iter().map(|token| &token.text).filter(|text| !text.is_empty());
    let kind = MatchKind::LeftmostLongest;
    AhoCorasick::builder().match_kind(kind).build(texts).ok().filter(|_| !tokens.is_empty())
}

/// A search for all tokens, if it finds what the tokenizer finds.
fn scan(tokens: &[Candidate]) -> Option<(AhoCorasick, Vec<i32>)> {
    let is_plain = |token: &Candidate| token.raw && !token.text.is_empty();
    let finder = finder(tokens).filter(|_| tokens.iter().all(is_plain))?;
    Some((finder, tokens.iter().map(|token| token.id).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control(template: &[&str], tokens: &[&str]) -> Control {
        let tokens = tokens.iter().enumerate().map(|(id, text)| Candidate {
            id: id as i32,
            text: (*text).to_owned(),
            special: true,
            normalised: false,
            raw: true,
        });
        let texts: Vec<String> = template.iter().map(|text| (*text).to_owned()).collect();
        let literals = [Literals { texts: texts.clone(), ..Literals::default() }];
        Control::new(tokens.collect(), &literals, &[], &texts, false)
    }

    #[test]
    fn a_seam_is_where_a_template_writes_both_ends_of_a_token() {
        let cases = [
            (vec!["<|im_start|>", "\n", "<|im_end|>\n"], false),
            (vec!["<|", "|>"], true),
            (vec!["<|im_", "|>\n"], true),
            (vec!["<", "|", ">"], true),
            (vec!["x <|im_", "\n"], false),
            (vec!["start", "end", "a b"], false),
        ];
        for (template, want) in cases {
            let control = control(&template, &["<|im_start|>", "<|im_end|>"]);
            assert_eq!(control.is_part(" end "), want, "{template:?}");
            assert!(!control.is_part("other"));
        }
    }

    #[test]
    fn marks_stand_around_what_could_be_a_token() {
        let plain = control(&["<|end|>"], &["<|end|>"]);
        assert_eq!(plain.broken(" a < b|>", '~'), " a ~<~ b|~>~");
        assert_eq!(plain.broken("end", '~'), "end");
        let seamed = control(&["<|", "|>"], &["<|end|>"]);
        assert_eq!(seamed.broken("\n end  ", '~'), "\n ~end~  ");
        assert_eq!(seamed.broken("<>", '~'), "~<~>~");
        assert_eq!(plain.broken("  ", '~'), "  ");
        let all = Control { makes: true, ..control(&["<|end|>"], &["<|end|>"]) };
        assert_eq!(all.broken(" ab ", '~'), " ~a~b~ ");
    }

    #[test]
    fn texts_that_tell_nothing_are_known_by_their_bytes() {
        let control = control(&["<|end|>"], &["<|end|>", "[INST]"]);
        assert!(!control.is_telling("no sign, and \u{e9}"));
        for text in ["a <", "x>y", "[", "a]"] {
            assert!(control.is_telling(text));
        }
        assert!(!Control::default().is_telling("<|end|>"));
    }
}
