//! Models of every family: shipped ones, and small ones built here.

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use crate::bpe::{Bpe, Family};

pub(super) const TEXT: &str = "The quick brown fox's den isn't where they've said it'd be; we'll see, I'm sure. \
    HTTPServer camelCase snake_case 12345 3.14159 2024-01-02 $1,000.00 \n\nHuman: hello there\n\nAssistant: \
    Hello! How can I help you today?\r\n\tif (x == 1) { return y != 2; } // a comment\n    indented    code\n\
    caf\u{e9} na\u{ef}ve \u{fc}ber \u{416}\u{438}\u{437}\u{43d}\u{44c} \u{4e2d}\u{6587}\u{4e2d}\u{6587} \
    \u{3053}\u{3093}\u{306b}\u{3061}\u{306f} \u{d55c}\u{ad6d}\u{c5b4} \u{915}\u{94d}\u{937} e\u{301}e\u{301} \
    \u{201c}quoted\u{201d} \u{2019}s \u{2026} \u{1f600}\u{1f600} aaaaaaaaaaaaaaaa ------------ ============ ........ ";

pub(super) const ADDED: [(&str, bool, bool); 8] = [
    ("<|bos|>", true, false),
    ("<|eos|>", true, false),
    ("<think>", false, true),
    ("   ", false, true),
    ("<|user|>", false, false),
    ("\u{e9}?", false, true),
    ("z\u{e9}", false, false),
    ("user|>x", false, false),
];

fn pre_tokenizer(family: Family) -> Value {
    let last = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    if family == Family::Gpt2 {
        return json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true});
    }
    let split = |r: &&str| json!({"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": false});
    let parts: Vec<Value> = family.regexes().iter().map(split).chain([last]).collect();
    json!({"type": "Sequence", "pretokenizers": parts})
}

/// GPT-2's printable symbol of a byte.
fn symbol(byte: u8) -> String {
    let shifted = (0..=255u8).filter(|b| !matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff));
    let place = shifted.clone().position(|b| b == byte);
    place.map_or(char::from(byte), |i| char::from_u32(256 + i as u32).unwrap()).to_string()
}

/// A tokenizer.json with a few hundred merges learnt from [`TEXT`], with added tokens and a BOS and EOS.
pub(super) fn small(family: Family, ignore_merges: bool, nfc: bool) -> Value {
    let mut vocab: HashMap<String, usize> =
        (0..=255u8).map(|b| (symbol(b), 255 - b as usize)).collect();
    let mut merges = Vec::new();
    let mut words: Vec<Vec<String>> = TEXT
        .split_inclusive(' ')
        .flat_map(|w| [w.to_owned(), format!(" {}", w.trim_end())])
        .map(|w| w.bytes().map(symbol).collect())
        .collect();
    while merges.len() < 500 {
        let mut counts: HashMap<(String, String), usize> = HashMap::new();
        for word in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0].clone(), pair[1].clone())).or_default() += 1;
            }
        }
        let best =
            counts.into_iter().filter(|(_, n)| *n > 1).max_by_key(|(pair, n)| (*n, pair.clone()));
        let Some(((left, right), _)) = best else { break };
        let joined = format!("{left}{right}");
        for word in &mut words {
            let mut i = 0;
            while i + 1 < word.len() {
                if word[i] == left && word[i + 1] == right {
                    word[i].clone_from(&joined);
                    word.remove(i + 1);
                }
                i += 1;
            }
        }
        let id = vocab.len();
        vocab.entry(joined).or_insert(id);
        merges.push(json!([left, right]));
    }
    // Tokens that no merge reaches: only `ignore_merges` finds them.
    for token in ["xyzzy", "\u{120}xyzzy", "qq"] {
        let id = vocab.len();
        vocab.insert(token.to_owned(), id);
    }
    let n = vocab.len();
    let added: Vec<Value> = ADDED
        .iter()
        .enumerate()
        .map(|(i, (content, special, normalized))| {
            json!({"id": n + i, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": normalized, "special": special})
        })
        .collect();
    let piece = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let ids = |name: &str, id: usize| json!({"id": name, "ids": [id], "tokens": [name]});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": if nfc { json!({"type": "NFC"}) } else { json!({"type": "Sequence", "normalizers": []}) },
        "pre_tokenizer": pre_tokenizer(family),
        "post_processor": {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
            {"type": "TemplateProcessing",
             "single": [piece("<|bos|>"), {"Sequence": {"id": "A", "type_id": 0}}, piece("<|eos|>")],
             "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<|bos|>": ids("<|bos|>", n), "<|eos|>": ids("<|eos|>", n + 1)}},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges},
    })
}

pub(super) fn both(json: &str) -> (Bpe, Tokenizer) {
    (Bpe::recognise(json).unwrap(), json.parse().unwrap())
}

pub(super) fn built() -> impl Iterator<Item = (String, Bpe, Tokenizer)> {
    Family::ALL.into_iter().flat_map(|family| {
        [(false, true), (true, false)].map(|(ignore, nfc)| {
            let (ours, oracle) = both(&small(family, ignore, nfc).to_string());
            (format!("{family:?} ignore_merges={ignore} nfc={nfc}"), ours, oracle)
        })
    })
}

/// The files beside the repository, where it has them.
pub(super) fn shipped_files() -> Vec<(String, String)> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared/tokenizers");
    let read = |name: &str| {
        let json = std::fs::read_to_string(root.join(name).join("tokenizer.json")).ok()?;
        Some((name.to_owned(), json))
    };
    let found: Vec<_> = ["gpt2", "neox20b", "qwen2.5"].into_iter().filter_map(read).collect();
    if found.is_empty() {
        eprintln!("skipped: no ../shared/tokenizers, so the shipped files are not compared");
    }
    found
}

pub(super) fn shipped() -> Vec<(String, Bpe, Tokenizer)> {
    let model = |(name, json): (String, String)| {
        let (ours, oracle) = both(&json);
        (name, ours, oracle)
    };
    shipped_files().into_iter().map(model).collect()
}

/// All of them, or in a deep run those whose name holds `DPO_EXT_ONLY`.
pub(super) fn models() -> impl Iterator<Item = (String, Bpe, Tokenizer)> {
    let only = std::env::var("DPO_EXT_ONLY").unwrap_or_default();
    built().chain(shipped()).filter(move |model| model.0.contains(&only))
}
