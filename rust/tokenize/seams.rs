//! Where templates write the beginning and the end of a control token around a text of somebody else.

use std::collections::{BTreeSet, HashSet};

use crate::template::Literals;

/// The texts that templates write.
pub(super) struct Seams<'t> {
    templates: Vec<Texts<'t>>,
}

/// Those of one template.
struct Texts<'t> {
    all: Vec<&'t str>,
    /// The first and the last characters of all.
    firsts: HashSet<char>,
    lasts: HashSet<char>,
    /// Those that may be one of several pieces of a token; words are what templates compare.
    pieces: Vec<&'t str>,
}

impl<'t> Seams<'t> {
    /// Those of all templates, each of which may write the named tokens.
    pub(super) fn new(literals: &'t [Literals], named: &'t [(String, String)]) -> Self {
        let texts = |literals: &'t Literals| {
            let named = named.iter().map(|(_, text)| text);
            let all: Vec<&str> = literals.texts.iter().chain(named).map(String::as_str).collect();
            let is_word = |text: &&&str| text.chars().all(char::is_alphanumeric);
            Texts {
                firsts: all.iter().filter_map(|text| text.chars().next()).collect(),
                lasts: all.iter().filter_map(|text| text.chars().next_back()).collect(),
                pieces: all.iter().filter(|text| !is_word(text)).copied().collect(),
                all,
            }
        };
        Self { templates: literals.iter().map(texts).collect() }
    }

    /// What a text must say between two of a template, so that the three are the token.
    pub(super) fn middles(&self, token: &str) -> BTreeSet<String> {
        self.templates.iter().flat_map(|texts| texts.middles(token)).collect()
    }
}

impl Texts<'_> {
    fn middles(&self, token: &str) -> Vec<String> {
        let inside = |text: &&&str| text.len() < token.len() && token.contains(**text);
        let pieces: Vec<&str> = self.pieces.iter().filter(inside).copied().collect();
        let (mut begins, mut ends) = (Vec::new(), Vec::new());
        for at in token.char_indices().map(|(at, _)| at).filter(|at| *at > 0) {
            let (begin, end) = token.split_at(at);
            let may_begin = begin.chars().next_back().is_some_and(|c| self.lasts.contains(&c));
            let may_end = end.chars().next().is_some_and(|c| self.firsts.contains(&c));
            if may_begin
                && (self.all.iter().any(|text| text.ends_with(begin))
                    || pieces.iter().any(|text| begin.ends_with(text)))
            {
                begins.push(at);
            }
            if may_end
                && (self.all.iter().any(|text| text.starts_with(end))
                    || pieces.iter().any(|text| end.starts_with(text)))
            {
                ends.push(at);
            }
        }
        let pairs = begins.iter().flat_map(|begin| ends.iter().map(move |end| (*begin, *end)));
        let middles = pairs.filter_map(|(begin, end)| token.get(begin..end));
        middles.filter(|middle| !middle.is_empty()).map(str::to_owned).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seam_is_where_a_template_writes_both_ends_of_a_token() {
        let cases = [
            (vec!["<|start|>", "\n", "<|end|>\n"], vec![]),
            (vec!["<|", "|>"], vec!["start"]),
            (vec!["x<|st", "t|>\n"], vec!["ar"]),
            (vec!["<|st", "\n"], vec![]),
            (vec!["start", "end", "a b"], vec![]),
        ];
        for (texts, want) in cases {
            let texts = texts.into_iter().map(str::to_owned).collect();
            let literals = [Literals { texts, ..Literals::default() }];
            let found = Seams::new(&literals, &[]).middles("<|start|>");
            assert_eq!(found.into_iter().collect::<Vec<_>>(), want);
        }
    }

    #[test]
    fn a_token_may_be_written_piece_by_piece() {
        let texts = ["<", "|", ">"].map(str::to_owned).to_vec();
        let literals = [Literals { texts, ..Literals::default() }];
        let found = Seams::new(&literals, &[]).middles("<|end|>");
        assert!(found.contains("end"), "{found:?}");
    }
}
