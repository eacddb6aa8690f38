//! Hostile input: seeds and their mutations go through each reader. What comes back is a value that an independent
//! reader agrees with, or a typed error; a panic fails the test. `make deep` runs many more cases.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, missing_docs)]

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dpo_ext::Error;
use dpo_ext::layout::pack::pack_lengths;
use dpo_ext::read::json::{Value, parse};
use dpo_ext::read::limits::Limits;
use dpo_ext::read::{Block, Reader};
use dpo_ext::template::{Conversation, Now, RenderError, Template};
use dpo_ext::tokenize::{Source, Tokenizer};
use proptest::prelude::*;
use proptest::sample::Index;

fn cases(few: u32, many: u32) -> ProptestConfig {
    let deep = std::env::var("DPO_EXT_DEEP").is_ok();
    ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(if deep { many } else { few })
    }
}

/// One change of some bytes.
#[derive(Debug, Clone)]
enum Change {
    Flip(Index, u8),
    Cut(Index, Index),
    Put(Index, Vec<u8>),
    Double(Index, Index),
}

fn changes(tokens: &'static [&'static [u8]]) -> impl Strategy<Value = Vec<Change>> {
    let put = prop_oneof![
        prop::sample::select(tokens).prop_map(<[u8]>::to_vec),
        prop::collection::vec(any::<u8>(), 1..6),
    ];
    let change = prop_oneof![
        (any::<Index>(), 1_u8..).prop_map(|(at, mask)| Change::Flip(at, mask)),
        (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Change::Cut(a, b)),
        (any::<Index>(), put).prop_map(|(at, bytes)| Change::Put(at, bytes)),
        (any::<Index>(), any::<Index>()).prop_map(|(a, b)| Change::Double(a, b)),
    ];
    prop::collection::vec(change, 0..5)
}

fn mutated(seed: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for change in changes {
        if bytes.is_empty() {
            bytes.push(b'0');
        }
        let n = bytes.len();
        match change {
            Change::Flip(at, mask) => bytes[at.index(n)] ^= mask,
            Change::Put(at, new) => {
                let at = at.index(n);
                bytes.splice(at..at, new.iter().copied());
            }
            Change::Cut(a, b) | Change::Double(a, b) => {
                let (a, b) = (a.index(n), b.index(n));
                let range = a.min(b)..a.max(b).min(a.min(b) + 64);
                if let Change::Cut(..) = change {
                    bytes.drain(range);
                } else {
                    let copy = bytes[range.clone()].to_vec();
                    bytes.splice(range.end..range.end, copy);
                }
            }
        }
    }
    bytes
}

static FILES: AtomicU64 = AtomicU64::new(0);

/// A file that is gone when the value is.
struct Temporary(PathBuf);

impl Temporary {
    fn new(bytes: &[u8]) -> Self {
        let name = format!(
            "dpo_ext-fuzz-{}-{}",
            std::process::id(),
            FILES.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// All lines that are not blank, or what stopped the file.
fn lines(bytes: &[u8], limits: &Limits) -> Result<Vec<Vec<u8>>, Error> {
    let file = Temporary::new(bytes);
    let mut reader = Reader::open(&file.0, limits)?;
    let mut found = Vec::new();
    while let Some(Block { bytes, lines, failure, .. }) = reader.next_block() {
        found.extend(lines.iter().map(|line| bytes[line.start..line.end].to_vec()));
        if let Some(failure) = failure {
            return Err(failure);
        }
    }
    Ok(found)
}

const ROWS: &[u8] = "{\"prompt\": \"a\\n\\u00e9 \\ud83d\\ude42\", \"chosen\": \"b\", \"rejected\": \"c\", \"n\": [1, -2.5e3, \
                     true, null, {}]}\n\n{\"chosen\": [{\"role\": \"user\", \"content\": \"ä\"}], \"x\": 1e5}\r\n"
    .as_bytes();
const JSON_TOKENS: &[&[u8]] = &[
    b"\\ud800",
    b"\\udc00",
    b"\\u0000",
    b"\"",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b",",
    b"NaN",
    b"1e999",
    b"-",
    b"00",
    b"\xef\xbb\xbf",
    b"\xc0\x80",
    b"\xed\xa0\x80",
    b"\x00",
    b"\n",
    b"\r",
    b"\"prompt\":1,",
    b"[[[[[[[[",
    b"true",
    b"\xe2\x80\xa8",
];

fn same(ours: &Value<'_>, theirs: &serde_json::Value) -> bool {
    use serde_json::Value as Other;
    match (ours, theirs) {
        (Value::Bool(a), Other::Bool(b)) => a == b,
        (Value::Str(a), Other::String(b)) => a == b,
        (Value::List(a), Other::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Other::Object(b)) => {
            a.len() == b.len() && a.iter().all(|(key, a)| b.get(&**key).is_some_and(|b| same(a, b)))
        }
        (Value::Int(a), Other::Number(b)) => {
            b.to_string().parse() == Ok(*a) || b.as_f64() == Some(*a as f64)
        }
        (Value::Float(a), Other::Number(b)) => b.as_f64() == Some(*a),
        (Value::Null, Other::Null) | (Value::Huge(_), Other::Number(_)) => true,
        _ => false,
    }
}

proptest! {
    #![proptest_config(cases(3_000, 300_000))]

    /// Every line that our scanner takes is JSON for serde too, with the same values; what it refuses is no JSON, or
    /// breaks a rule that serde does not have.
    #[test]
    fn the_scanner_agrees_with_serde(changes in changes(JSON_TOKENS)) {
        for line in mutated(ROWS, &changes).split(|byte| *byte == b'\n') {
            let Ok(text) = std::str::from_utf8(line) else { continue };
            let theirs = serde_json::from_str::<serde_json::Value>(text);
            match (parse(text, &Limits::default()), theirs) {
                (Ok((_, findings)), Ok(_)) if findings.duplicate.is_some() || findings.limit.is_some() => {}
                (Ok((ours, _)), Ok(theirs)) => prop_assert!(same(&ours, &theirs), "{text:?}"),
                (Err(_), Err(_)) => {}
                // serde_json ranges numbers, and its recursion ends at 128.
                (Ok(_), Err(e)) => prop_assert!(e.to_string().contains("number out of range") || e.to_string().contains("recursion"), "{text:?}: {e}"),
                (Err(fault), Ok(_)) => prop_assert!(false, "{text:?}: {fault:?}"),
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(600, 60_000))]

    /// A plain file gives its lines, whatever its bytes.
    #[test]
    fn a_plain_file_gives_its_lines(changes in changes(JSON_TOKENS)) {
        let bytes = mutated(ROWS, &changes);
        prop_assume!(!bytes.starts_with(&[0x1f, 0x8b]) && !bytes.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
        let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        prop_assume!(!text.trim_ascii_start().starts_with(b"["));
        let want: Vec<Vec<u8>> = text
            .split(|byte| *byte == b'\n')
            .map(|line| line.strip_suffix(b"\r").unwrap_or(line).to_vec())
            .filter(|line| !line.iter().all(|byte| b" \t\r".contains(byte)))
            .collect();
        match lines(&bytes, &Limits::default()) {
            Ok(found) => prop_assert_eq!(found, want),
            Err(Error::Data { .. }) => {}
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }

    /// A file that is one array gives its elements, as serde cuts them, wherever the reads of the file end; what is no
    /// array is an error, or has an element that is no JSON.
    #[test]
    fn an_array_gives_its_elements(changes in changes(JSON_TOKENS), border in 0_usize..400) {
        let filler = format!("\"{}\"", "x".repeat((256 << 10) - border));
        let rows = ROWS.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
        let seed = [&b"[\n"[..], &rows.collect::<Vec<_>>().join(&b",\r\n"[..]), b", [1, \"]\"] ]\n"].concat();
        let changed = mutated(&seed, &changes);
        prop_assume!(changed.starts_with(b"[") && changed.len() > 2);
        let bytes = [format!("[{filler},").as_bytes(), &changed[1..]].concat();
        let theirs = serde_json::from_slice::<Vec<serde_json::Value>>(&bytes);
        match (lines(&bytes, &Limits::default()), theirs) {
            (Ok(found), Ok(theirs)) => {
                let found: Result<Vec<serde_json::Value>, _> = found.iter().map(|item| serde_json::from_slice(item)).collect();
                prop_assert_eq!(found.unwrap(), theirs);
            }
            (Ok(found), Err(e)) => {
                let is_json = |line: &Vec<u8>| std::str::from_utf8(line).is_ok_and(|text| parse(text, &Limits::default()).is_ok());
                let e = e.to_string();
                prop_assert!(!found.iter().all(is_json) || e.contains("recursion") || e.contains("out of range"), "{e}");
            }
            (Err(Error::Data { place, .. }), Err(_)) => prop_assert!(place.line.is_some() && place.byte.is_some()),
            (Err(e), _) => prop_assert!(false, "{e:?}"),
        }
    }

    /// A damaged packed file is an error, or else gives exactly what was packed; never a part of it.
    #[test]
    fn a_packed_file_gives_all_or_nothing(changes in changes(&[b"\x1f\x8b\x08\x00", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab", b"\0\0\0"]), zstd: bool, members in 1_usize..4) {
        let whole: Vec<u8> = ROWS.iter().copied().filter(|byte| *byte != b'\r').collect::<Vec<_>>().repeat(members);
        let mut packed = Vec::new();
        for _ in 0..members {
            if zstd {
                let mut encoder = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
                encoder.include_checksum(true).unwrap();
                encoder.write_all(&whole[..whole.len() / members]).unwrap();
                packed.extend(encoder.finish().unwrap());
            } else {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                encoder.write_all(&whole[..whole.len() / members]).unwrap();
                packed.extend(encoder.finish().unwrap());
            }
        }
        let unit: Vec<Vec<u8>> = whole[..whole.len() / members].split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(<[u8]>::to_vec).collect();
        let damaged = mutated(&packed, &changes);
        let magic = if zstd { &b"\x28\xb5\x2f\xfd"[..] } else { &b"\x1f\x8b"[..] };
        prop_assume!(damaged.starts_with(magic));
        if let Ok(found) = lines(&damaged, &Limits::default()) {
            // Whole members may have been cut out or doubled; nothing inside one may differ.
            prop_assert!(found.len() % unit.len() == 0 && found.chunks(unit.len()).all(|chunk| chunk == unit), "{changes:?}");
        } else {
            prop_assert!(!changes.is_empty());
        }
    }
}

const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":4,"content":"<s>",
"single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},
"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":
{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],
"pair":[{"Sequence":{"id":"A","type_id":0}}],"special_tokens":{"<s>":{"id":"<s>","ids":[4],"tokens":["<s>"]}}},
"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},"model":{"type":"BPE",
"dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,
"byte_fallback":false,"vocab":{"a":0,"b":1,"ab":2,"c":3},"merges":[["a","b"]]}}"#;

proptest! {
    #![proptest_config(cases(400, 40_000))]

    /// A changed tokenizer.json is refused, or its ids are below its size and are the same each time.
    #[test]
    fn a_tokenizer_file_is_refused_or_served(changes in changes(&[
        b"\"Unigram\"", b"\"WordPiece\"", b"\"Precompiled\"", b"\"Metaspace\"", b"4294967295", b"-1", b"\"x\":1,", b"null", b"[]", b"{}", b"[[\"a\",\"z\"]]", b"true",
    ])) {
        let json = String::from_utf8_lossy(&mutated(TOKENIZER.as_bytes(), &changes)).into_owned();
        match Tokenizer::new(Source { json, ..Source::default() }) {
            Err(Error::Tokenizer(_)) => {}
            Err(other) => prop_assert!(false, "{other:?}"),
            Ok(tokenizer) => {
                for text in ["", "abc", "<s>ab", "é \u{fdfa}\0"] {
                    match (tokenizer.encode(text, true), tokenizer.encode(text, true)) {
                        (Ok(one), Ok(other)) => {
                            prop_assert_eq!(&one, &other);
                            let most = tokenizer.vocab_size() as i64;
                            prop_assert!(one.iter().all(|id| (0..most).contains(&i64::from(*id))), "{one:?}");
                        }
                        (Err(Error::Tokenizer(_)), Err(Error::Tokenizer(_))) => {}
                        (one, _) => prop_assert!(false, "{one:?}"),
                    }
                }
            }
        }
    }
}

const FRAGMENTS: &[&str] = &[
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m }}",
    "{{ messages }}",
    "{% if x %}",
    "{% else %}",
    "{% endif %}",
    "{% set x = 'a' * 1000 %}",
    "{% set ns = namespace(x=0) %}",
    "{% for i in range(1000000) %}",
    "{{ x + x }}",
    "text\n",
    "{% macro f(a) %}",
    "{% endmacro %}",
    "{{ f(f) }}",
    "{{ x|tojson }}",
    "{{ x|list|join(x) }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ raise_exception('no') }}",
    "{{ x.__class__ }}",
    "{% include 'x' %}",
    "{{ '%s' % x }}",
    "{{",
    "{%",
    "#}",
    "{#",
    "-%}",
    "{%- break %}",
    "{{ strftime_now('%Y') }}",
    "{{ [1] * 100000 }}",
    "{{ x[::0] }}",
    "{{ 1 // 0 }}",
];

proptest! {
    #![proptest_config(cases(400, 40_000))]

    /// A template made of anything compiles and renders within its cap and a second, or is an error.
    #[test]
    fn a_template_ends_within_its_limits(parts in prop::collection::vec(prop::sample::select(FRAGMENTS), 0..12)) {
        let template = Template::new(&parts.concat());
        let (one, two, x) = (Value::Str("one".into()), Value::Str("two".into()), Value::Str("ab".into()));
        let now = Now { time: [2026, 1, 2, 3, 4, 5], weekday: 4, yearday: 2 };
        let start = Instant::now();
        let cap = 1 << 20;
        let conversation =
            Conversation { messages: &[&one, &two], named: &[], variables: &[("x", &x)], generation: true, now, cap };
        match template.render(&conversation) {
            Ok(rendered) => prop_assert!(rendered.text.len() <= cap && !rendered.fallback),
            Err(RenderError::Value(..)) => prop_assert!(false, "plain values"),
            Err(RenderError::Template(message) | RenderError::Lacks(message)) => prop_assert!(!message.is_empty() && !message.contains('\n')),
            Err(RenderError::TooLong) => {}
        }
        prop_assert!(start.elapsed() < Duration::from_secs(2), "{parts:?}: {:?}", start.elapsed());
    }
}

proptest! {
    #![proptest_config(cases(2_000, 200_000))]

    /// Any lengths and any capacity: all items once in bins that hold them, or an error that is due.
    #[test]
    fn the_packer_loses_nothing(lengths in prop::collection::vec(prop_oneof![4 => 0_i64..64, 1 => any::<i64>()], 0..40), capacity in prop_oneof![4 => 0_usize..128, 1 => Just(usize::MAX)], seed: u64) {
        let fits = |length: &i64| usize::try_from(*length).is_ok_and(|length| length <= capacity);
        match pack_lengths(&lengths, capacity, seed, &|| false) {
            Ok((items, starts)) => {
                let mut all = items.clone();
                all.sort_unstable();
                prop_assert_eq!(all, (0..lengths.len() as i32).collect::<Vec<_>>());
                for bin in starts.windows(2) {
                    let sum: i64 = items[bin[0] as usize..bin[1] as usize].iter().map(|i| lengths[*i as usize]).sum();
                    prop_assert!(sum as usize <= capacity);
                }
            }
            Err(Error::Data { .. }) => prop_assert!(!lengths.iter().all(fits)),
            Err(Error::Value(_)) => prop_assert!(capacity == 0 || u32::try_from(capacity).is_err()),
            Err(other) => prop_assert!(false, "{other:?}"),
        }
    }
}
