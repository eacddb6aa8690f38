//! What other crates make once for a process, made before anybody forks in the middle of it.

use std::sync::atomic::{AtomicBool, Ordering};

use super::guard::guarded;
use crate::template::{Conversation, Now, Template};

/// A tokenizer that takes every way of the crate on which something is made once.
const TOKENIZER: &str = r#"{
    "added_tokens": [{"id": 1, "content": "<x>", "single_word": true, "lstrip": true, "rstrip": true,
                      "normalized": false, "special": false}],
    "normalizer": {"type": "ByteLevel"},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
}"#;
const TEMPLATE: &str = "{% for n in [1] %}{{ n }}{{ 'a' | trim }}{% endfor %}";

/// Takes every such way once; the caller holds a fork off.
pub(super) fn warm() {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::SeqCst) {
        return;
    }
    // What fails here fails again where it matters, and is an error there.
    let _ = guarded("tokenizer.json", || {
        let tokenizer = tokenizers::Tokenizer::from_bytes(TOKENIZER.as_bytes())?;
        let ids = tokenizer.encode("a <x> b", false)?.get_ids().to_vec();
        tokenizer.decode(&ids, false)
    });
    let _ = Template::new(TEMPLATE).render(&Conversation {
        messages: &[],
        named: &[],
        variables: &[],
        generation: false,
        now: Now { time: [2000, 1, 1, 0, 0, 0], weekday: 5, yearday: 1 },
        cap: 1 << 10,
    });
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_tokenizer_takes_its_way() {
        let tokenizer = tokenizers::Tokenizer::from_bytes(TOKENIZER.as_bytes()).unwrap();
        let ids = tokenizer.encode("a <x> b", false).unwrap().get_ids().to_vec();
        assert!(ids.contains(&1), "{ids:?}");
        assert!(tokenizer.decode(&ids, false).is_ok());
    }
}
