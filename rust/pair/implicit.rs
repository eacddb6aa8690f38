//! Where a prompt ends that nobody marked.

use std::sync::LazyLock;

use aho_corasick::{AhoCorasick, MatchKind};

/// Ends of what stands before an assistant's answer. White space after a marker belongs to the answer, unless the
/// format fixes it.
const TURNS: [&str; 14] = [
    "\n\nAssistant:",
    "<|im_start|>assistant\n",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|header_start|>assistant<|header_end|>\n\n",
    "<start_of_turn>model\n",
    "<|assistant|>",
    "<|Assistant|>",
    "<\u{ff5c}Assistant\u{ff5c}>",
    "[/INST]",
    "### Response:",
    "### Assistant:",
    "ASSISTANT:",
    "\nAssistant:",
    "\nAI:",
];

/// `None` only if the table above cannot be compiled, which a test looks at.
static FINDER: LazyLock<Option<AhoCorasick>> = LazyLock::new(|| {
    AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(TURNS).ok()
});

/// Which markers stand in `text`, and where they end.
fn turns(text: &str) -> impl Iterator<Item = (usize, usize)> + '_ {
    FINDER
        .as_ref()
        .into_iter()
        .flat_map(move |finder| finder.find_iter(text))
        .map(|found| (found.pattern().as_usize(), found.end()))
}

/// The byte where the prompt ends, and whether the last turn of both texts begins there.
pub fn split(chosen: &str, rejected: &str) -> (usize, bool) {
    let mut common = chosen.bytes().zip(rejected.bytes()).take_while(|(a, b)| a == b).count();
    while !chosen.is_char_boundary(common) || !rejected.is_char_boundary(common) {
        common -= 1;
    }
    let start = chosen.get(..common).unwrap_or_default();
    match turns(start).last() {
        Some((marker, cut)) => {
            let goes_on = |text: &str| {
                turns(text.get(cut..).unwrap_or_default()).any(|(other, _)| other == marker)
            };
            (cut, !goes_on(chosen) && !goes_on(rejected))
        }
        None => (word(start, chosen, rejected), false),
    }
}

/// The start of the word in which the common text ends, less the white space before it.
fn word(start: &str, chosen: &str, rejected: &str) -> usize {
    let goes_on = |text: &str| {
        let rest = text.get(start.len()..).unwrap_or_default();
        rest.chars().next().is_some_and(char::is_whitespace)
    };
    let head = if goes_on(chosen) && goes_on(rejected) {
        start
    } else {
        start.trim_end_matches(|c: char| !c.is_whitespace())
    };
    head.trim_end().len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_markers_compile() {
        assert!(FINDER.is_some());
    }

    #[test]
    fn prompts_end_at_turns_or_words() {
        let cases = [
            ("\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", 22, true),
            ("<|im_start|>assistant\nx", "<|im_start|>assistant\ny", 22, true),
            // The last turn differs: the last common one counts, and says so.
            ("\n\nAssistant: a\n\nAssistant: b", "\n\nAssistant: a c", 12, false),
            ("Q? Blue", "Q? Black", 2, false),
            ("Paris ", "London", 0, false),
            ("hello", "hello world", 0, false),
            ("a b", "a b", 1, false),
            ("say x now", "say\tx", 3, false),
            ("", "", 0, false),
            ("\u{e9}a", "\u{e8}a", 0, false),
        ];
        for (chosen, rejected, cut, at_turn) in cases {
            assert_eq!(split(chosen, rejected), (cut, at_turn), "{chosen:?} {rejected:?}");
        }
    }

    proptest! {
        #[test]
        fn the_prompt_is_common_and_ends_before_white_space_or_a_turn(
            common in "[a \n:]{0,9}(\n\nAssistant:)?[a \n]{0,9}", a in "[ab \n]{0,5}", b in "[ac \n]{0,5}",
        ) {
            let (chosen, rejected) = (format!("{common}{a}"), format!("{common}{b}"));
            let (cut, _) = split(&chosen, &rejected);
            prop_assert_eq!(&chosen[..cut], &rejected[..cut]);
            prop_assert!(!chosen[..cut].ends_with(char::is_whitespace));
            prop_assert_eq!(split(&rejected, &chosen).0, cut);
        }
    }
}
