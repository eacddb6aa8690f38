//! Scanners against the linked regex engine with the family's own text.

use proptest::prelude::*;
use tokenizers::utils::SysRegex;

use super::word::Word;
use super::*;
use crate::bpe::check::nasty;
use crate::bpe::classes::Classes;

/// Ends of the words by the regexes themselves: each splits what the one before left, matches and gaps alike.
struct Oracle(Vec<SysRegex>);

impl Oracle {
    fn new(family: Family) -> Self {
        Self(family.regexes().iter().map(|r| SysRegex::new(r).unwrap()).collect())
    }

    fn ends(&self, text: &str) -> Vec<usize> {
        let mut pieces = vec![(0, text.len())];
        for regex in &self.0 {
            let mut next = Vec::new();
            for (start, end) in pieces {
                let mut at = start;
                for (s, e) in regex.find_iter(&text[start..end]) {
                    next.extend([(at, start + s), (start + s, start + e)]);
                    at = start + e;
                }
                next.push((at, end));
            }
            next.retain(|(s, e)| s < e);
            pieces = next;
        }
        pieces.into_iter().map(|p| p.1).collect()
    }
}

fn words(family: Family, text: &str) -> Vec<Word> {
    let text = Text::new(text, Classes::linked().unwrap());
    let (mut i, mut words) = (0, Vec::new());
    with_scanner!(family, scan => while i < text.len() {
        let word = scan.word(&text, i);
        assert!(word.end > i && word.reach >= word.end - 1, "{word:?} at {i}");
        i = word.end;
        words.push(word);
    });
    words
}

fn ends(family: Family, text: &str) -> Vec<usize> {
    words(family, text).into_iter().map(|w| w.end).collect()
}

#[test]
fn every_scalar_in_seven_contexts() {
    let deep = std::env::var_os("DPO_EXT_DEEP").is_some();
    let scalars: Vec<char> = (0..0x11_0000)
        .filter_map(char::from_u32)
        .filter(|&c| deep || (c as u32) < 0x3_2000)
        .collect();
    for family in Family::ALL {
        let oracle = Oracle::new(family);
        for chunk in scalars.chunks(64) {
            let contexts = |c| format!("a{c}b {c}1{c}.\n{c}'{c} A{c}B{c} {c}{c}\r");
            let text = chunk.iter().map(contexts).collect::<Vec<_>>().concat();
            assert_eq!(ends(family, &text), oracle.ends(&text), "{family:?} {:?}", chunk[0]);
        }
    }
}

#[test]
fn random_nasty_texts() {
    let deep = std::env::var_os("DPO_EXT_DEEP").is_some();
    for family in Family::ALL {
        let oracle = Oracle::new(family);
        for text in nasty(1, 14, &[]).take(if deep { 200_000 } else { 20_000 }) {
            assert_eq!(ends(family, &text), oracle.ends(&text), "{family:?} {text:?}");
        }
    }
}

/// What `reach` promises: a text that agrees up to `reach` and its character begins with the same word.
#[test]
fn words_depend_on_nothing_beyond_their_reach() {
    for family in Family::ALL {
        for (a, b) in nasty(2, 8, &[]).zip(nasty(3, 4, &[])).take(20_000) {
            for word in words(family, &a) {
                let seen = (word.reach + 4).min(a.len());
                if word.reach < a.len() && a.is_char_boundary(seen) {
                    let other = format!("{}{b}", &a[..seen]);
                    let there = ends(family, &other);
                    assert!(there.contains(&word.end), "{family:?} {a:?} {other:?} {word:?}");
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn any_text(text in "(\\PC|[ \\t\\n\\r'a-zA-Z0-9]|[\u{300}-\u{330}]){0,40}") {
        for family in Family::ALL {
            prop_assert_eq!(ends(family, &text), Oracle::new(family).ends(&text), "{:?}", family);
        }
    }
}
