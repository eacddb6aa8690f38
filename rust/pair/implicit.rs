//! Where a prompt ends that nobody marked.

use std::sync::LazyLock;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::bpe::common_prefix;

/// Ends of what stands before an assistant's answer. White space after a marker belongs to the answer, unless the
/// format fixes it.
const ANSWERS: [&str; 14] = [
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
/// Ends of what stands before a turn that the assistant is asked.
const QUESTIONS: [&str; 15] = [
    "\n\nHuman:",
    "<|im_start|>user\n",
    "<|start_header_id|>user<|end_header_id|>\n\n",
    "<|header_start|>user<|header_end|>\n\n",
    "<start_of_turn>user\n",
    "<|user|>",
    "<|User|>",
    "<\u{ff5c}User\u{ff5c}>",
    "[INST]",
    "### Instruction:",
    "### Human:",
    "### User:",
    "USER:",
    "\nHuman:",
    "\nUser:",
];
/// What a text begins with whose first turn has no line before it.
const BEGINNINGS: [&str; 2] = ["Human:", "User:"];

/// `None` only if the table above cannot be compiled, which a test looks at.
static FINDER: LazyLock<Option<AhoCorasick>> = LazyLock::new(|| {
    AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(ANSWERS).ok()
});

/// Makes the table, so that no thread makes it while a fork comes.
pub(super) fn make_table() {
    LazyLock::force(&FINDER);
}

/// Which markers of answers stand in `text`, and where they end.
fn turns(text: &str) -> impl Iterator<Item = (usize, usize)> + '_ {
    FINDER
        .as_ref()
        .into_iter()
        .flat_map(move |finder| finder.find_iter(text))
        .map(|found| (found.pattern().as_usize(), found.end()))
}

/// Whether a text begins with a turn that a model is asked.
pub(super) fn begins_asked(text: &str) -> bool {
    let start = text.trim_start();
    QUESTIONS.iter().chain(&BEGINNINGS).any(|marker| start.starts_with(marker.trim_start()))
}

/// Whether there is a turn in a text that a model is asked.
pub(super) fn asks(text: &str) -> bool {
    QUESTIONS.iter().any(|marker| text.contains(marker)) || begins_asked(text)
}

/// Where two texts part.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Split {
    /// The byte where the prompt ends.
    pub(super) cut: usize,
    /// The last turn of both texts begins there.
    pub(super) at_turn: bool,
    /// They part inside what the model is asked: there are two prompts.
    pub(super) is_asked: bool,
}

/// Where the prompt of two texts ends.
pub(super) fn split(chosen: &str, rejected: &str) -> Split {
    let common = common_prefix(chosen, rejected);
    let start = chosen.get(..common).unwrap_or_default();
    let last = turns(start).last();
    // What the model is asked begins behind the last answer's marker.
    let asked = start.get(last.map_or(0, |(_, end)| end)..).unwrap_or_default();
    let goes_on = |text: &str| turns(text.get(common..).unwrap_or_default()).next().is_some();
    let is_asked = (last.is_none() && begins_asked(start)
        || QUESTIONS.iter().any(|marker| asked.contains(marker)))
        && goes_on(chosen)
        && goes_on(rejected);
    let (cut, at_turn) = match last {
        Some((marker, cut)) => {
            let goes_on = |text: &str| {
                turns(text.get(cut..).unwrap_or_default()).any(|(other, _)| other == marker)
            };
            (cut, !goes_on(chosen) && !goes_on(rejected))
        }
        None => (word(start, chosen, rejected), false),
    };
    Split { cut, at_turn, is_asked }
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
            let found = Split { cut, at_turn, is_asked: false };
            assert_eq!(split(chosen, rejected), found, "{chosen:?} {rejected:?}");
        }
    }

    #[test]
    fn texts_that_part_in_a_question_have_two_prompts() {
        let cases = [
            ("\n\nHuman: 2?\n\nAssistant: 4", "\n\nHuman: 3?\n\nAssistant: 7", true),
            ("Human: 2?\n\nAssistant: 4", "Human: 3?\n\nAssistant: 7", true),
            ("[INST] a [/INST] b", "[INST] c [/INST] d", true),
            (
                "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "\n\nHuman: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: f",
                true,
            ),
            // The answers part first, and other questions follow.
            (
                "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "\n\nHuman: a\n\nAssistant: e\n\nHuman: f\n\nAssistant: g",
                false,
            ),
            // An answer may end as a question begins.
            (
                "\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
                "\n\nHuman: a\n\nAssistant: b\n\nHuman: d",
                false,
            ),
            ("a b", "a c", false),
        ];
        for (chosen, rejected, is_asked) in cases {
            assert_eq!(split(chosen, rejected).is_asked, is_asked, "{chosen:?} {rejected:?}");
        }
    }

    proptest! {
        #[test]
        fn the_prompt_is_common_and_ends_before_white_space_or_a_turn(
            common in "[a \n:]{0,9}(\n\nAssistant:)?[a \n]{0,9}", a in "[ab \n]{0,5}", b in "[ac \n]{0,5}",
        ) {
            let (chosen, rejected) = (format!("{common}{a}"), format!("{common}{b}"));
            let Split { cut, .. } = split(&chosen, &rejected);
            prop_assert_eq!(&chosen[..cut], &rejected[..cut]);
            prop_assert!(!chosen[..cut].ends_with(char::is_whitespace));
            prop_assert_eq!(split(&rejected, &chosen).cut, cut);
        }
    }
}
