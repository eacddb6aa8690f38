//! Patterns beside the linked regex engine.

use super::*;
use crate::bpe::Family;
use crate::bpe::check::nasty;
use tokenizers::utils::SysRegex;

/// Spellings that published files have, or could, of regexes of the families.
const SAME: &[(&str, &str)] = &[
    ("[^\\r\\n\\p{L}]", "[^\r\n\\p{L}]"),
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|x+", r"'(?i:[sdmt]|ll|ve|re)|x+"),
    (r"'s|'t|'re|'ve|'m|'ll|'d|x+", r"'(?:[sdmt]|ll|ve|re)|x+"),
    (r"(?i:'s|'d)", "'(?:[sSdD]|\u{17f})"),
    (r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}++"),
    (r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*+"),
    (r"\s*[\r\n]+|\s+", r"\s*[\r\n]|\s+"),
    (r"\p{N}", r"\p{N}{1}"),
    (r"\p{N}{1,3}", r"(?:[\p{Number}]{1,3})"),
    (
        r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[\u{30a0}-\u{30ff}\u{3040}-\u{309f}\\x{4e00}-\u{9fa5}]+",
    ),
    (r"[!-/:-@\[-`{-~]", r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"##),
    (r"\s+(?!\S)", r"\s+(?![^\s])"),
];

#[test]
fn spellings_of_one_regex_are_one_pattern() {
    for (a, b) in SAME {
        let patterns = [a, b].map(|regex| Pattern::parse(regex));
        assert!(patterns[0].is_some(), "{a}");
        assert_eq!(patterns[0], patterns[1], "{a} {b}");
        let [a, b] = [a, b].map(|regex| SysRegex::new(regex).unwrap());
        for text in nasty(22, 12, &["'x", "xx", "]", "["]).take(1000) {
            assert_eq!(splits(&a, &text), splits(&b, &text), "{text:?}");
        }
    }
}

#[test]
fn what_is_not_understood_has_no_pattern() {
    for regex in [
        "",
        "a|",
        "(a",
        "a)",
        "[a",
        "a{2",
        "a{3,2}",
        "a{,2}",
        "a+?",
        "a{1,3}+",
        "a**",
        ".",
        "^a",
        "a$",
        r"\b",
        r"\h",
        "(?<n>a)",
        "(?=a)",
        "(?i)a",
        "(?x: a)",
        "[a&&b]",
        "[[:alpha:]]",
        "[]a]",
        "[b-a]",
        "[a-\\s]",
        r"\p{Han}",
        r"\p{Alpha}",
        "(?i:ss)",
        "(?i:\u{e9})",
        r"(?i:\p{L})",
        "(?i:[^a])",
        "(?i:a+)",
        "a|ab",
        r"\u12",
        r"\x41",
        "*a",
    ] {
        assert_eq!(Pattern::parse(regex), None, "{regex}");
    }
}

fn splits(regex: &SysRegex, text: &str) -> Vec<(usize, usize)> {
    regex.find_iter(text).collect()
}

/// Every way to take away, double or replace one character of a family's regex: what counts as the family then
/// matches what the family matches.
#[test]
fn a_changed_regex_is_another_pattern_or_matches_the_same() {
    let mut texts: Vec<String> = nasty(21, 12, &[]).take(300).collect();
    texts
        .push("''s'S'\u{17f} aB1234 12 x\r\n\r\n \n\t  y/\n/z \u{301}\u{301}a 9\u{664}".to_owned());
    let (mut refused, mut taken) = (0, 0);
    for regex in Family::ALL.into_iter().flat_map(Family::regexes) {
        let pattern = Pattern::parse(regex);
        assert!(pattern.is_some(), "{regex}");
        let original = SysRegex::new(regex).unwrap();
        let expected: Vec<_> = texts.iter().map(|text| splits(&original, text)).collect();
        let chars: Vec<char> = regex.chars().collect();
        for i in 0..chars.len() {
            let (before, after) = (&chars[..i], &chars[i + 1..]);
            let with = |middle: &str| -> String {
                before.iter().copied().chain(middle.chars()).chain(after.iter().copied()).collect()
            };
            let mut changed = vec![with(""), with(&chars[i].to_string().repeat(2))];
            changed.extend("?*+|^\\sSpPLNx\n ".chars().map(|c| with(&c.to_string())));
            for other in changed.into_iter().filter(|other| other != regex) {
                if Pattern::parse(&other) != pattern {
                    refused += 1;
                    continue;
                }
                taken += 1;
                let other_regex = SysRegex::new(&other).unwrap();
                for (text, expected) in texts.iter().zip(&expected) {
                    assert_eq!(&splits(&other_regex, text), expected, "{regex} {other} {text:?}");
                }
            }
        }
    }
    assert!(refused > 10_000 && taken > 10, "{refused} refused, {taken} taken");
}
