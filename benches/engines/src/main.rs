//! Is the crate `tokenizers` 1.0.0-rc.3 the engine, or the fallback? The same ids as 0.23, and how fast, on one thread.
//!
//! `cargo run --release --manifest-path benches/engines/Cargo.toml -- DATA.jsonl.gz TOKENIZER.json...`. Every text of
//! `chosen` and `rejected` and 8,000 hostile ones are compared first. Then, in CPU time of the thread, the median of 5:
//! cold = the first sight of half of the texts by a fresh engine, warm = all of them again; pairs = both texts of a row
//! with where each id ends, which is what a row needs: by `encode_pair` of ours, and for the crate by two calls and the
//! bytes of each id, as it gives no spans. No row of the data is printed.

use std::collections::HashMap;
use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};

use dpo_ext::bpe::{Bpe, PairIds, Scratch};
use flate2::read::MultiGzDecoder;
use new::pipeline::{EncodeOptions, Override, PipelineToken, PipelineTokenizer};
use serde_json::Value;

const ROUNDS: usize = 5;

/// What hostile texts are made of, and [`SPACES`].
const PARTS: &str = "a A é e\u{301} x\u{323}\u{307} ﬁ ß İ ſ Σ ǅ क ् 한 ᄀ 中 日本 ｱ が ไ 👍 👨\u{200d}👩 \u{200b} \u{ad} \u{0} \u{7f} \
    \u{fffd} \u{10ffff} \u{1c89} \u{11de0} \u{16ff0} ½ ² ٣ Ⅷ ▁ Ġ ## </w> 's 'LL ’s 12 1234567 3.14 ! ... ?! - _ / < > <s> \
    </s> <unk> [CLS] [SEP] [MASK] <|endoftext|> <|im_start|> <0x41> <tok> <tok>x xyzzy NORM the Hello don't straße “ — $ \
    = { } ; : ,";
const SPACES: [&str; 10] =
    [" ", "  ", " the", " world", "\t", "\n", "\r\n", "\u{85}", "\u{a0}", "\u{2028}\u{3000}"];

/// Letters whose 64-bit hash has the upper half and the slot of " LGPL" in the vocabulary of Qwen2.5: 1.0.0-rc.3, which
/// compares no more than these, takes the one for the other. The first of 5.2 billion words of seven letters.
const COLLISION: &str = "MHYQTZE";

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    // A panic of either crate is counted below.
    std::panic::set_hook(Box::new(|_| {}));
    let mut given = std::env::args().skip(1);
    let data = given.next().ok_or("expected DATA.jsonl.gz TOKENIZER.json...")?;
    let pairs = read_pairs(&data)?;
    println!("{} pairs, one thread", pairs.len());
    for path in given {
        let json = std::fs::read_to_string(&path)?;
        println!("{path}");
        let (old, new) = (load_old(&json), load_new(&json));
        let (Ok(mut old), Ok(new)) = (old.as_ref().cloned(), new.as_ref().cloned()) else {
            println!("  0.23: {}, 1.0: {}", said(old.err()), said(new.err()));
            continue;
        };
        compare(&mut old, &new, &pairs);
        speed(&json, &old, &pairs)?;
    }
    Ok(())
}

fn said(error: Option<String>) -> String {
    error.unwrap_or_else(|| "loaded".to_owned())
}

fn read_pairs(path: &str) -> Result<Vec<[String; 2]>, Failure> {
    let text = |row: &Value, key: &str| row[key].as_str().map(str::to_owned).ok_or("no text");
    BufReader::new(MultiGzDecoder::new(File::open(path)?))
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(&line?)?;
            Ok([text(&row, "chosen")?, text(&row, "rejected")?])
        })
        .collect()
}

/// Runs foreign code; a panic is an error.
fn caught<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err("panicked".to_owned()))
}

fn load_old(json: &str) -> Result<old::Tokenizer, String> {
    caught(|| json.parse::<old::Tokenizer>().map_err(|e| e.to_string()))
}

fn load_new(json: &str) -> Result<PipelineTokenizer, String> {
    caught(|| {
        let canonical = new::canonicalize_str(json).map_err(|e| e.to_string())?;
        new::from_json(&canonical).map_err(|e| e.to_string())
    })
}

fn options(encode_special_tokens: bool) -> EncodeOptions {
    EncodeOptions {
        add_special_tokens: false,
        encode_special_tokens,
        padding: Override::Off,
        truncation: Override::Off,
    }
}

/// 8,000 texts of up to 40 parts, the same in every run, and the word above.
fn hostile() -> Vec<String> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut below = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % n as u64) as usize
    };
    let parts: Vec<&str> = PARTS.split(' ').chain(SPACES).collect();
    let mut texts = vec![COLLISION.to_owned()];
    for _ in 0..8000 {
        let count = 1 + below(8) * below(6);
        texts.push((0..count).map(|_| parts[below(parts.len())]).collect());
    }
    texts
}

/// Counts the texts whose ids differ, with special tokens found and with special tokens as text.
fn compare(old: &mut old::Tokenizer, new: &PipelineTokenizer, pairs: &[[String; 2]]) {
    let hostile = hostile();
    for as_text in [false, true] {
        old.set_encode_special_tokens(as_text);
        let options = options(as_text);
        let count = |texts: &mut dyn Iterator<Item = &String>| {
            let (mut all, mut differ, mut failed) = (0, 0, 0);
            for text in texts {
                let expected = caught(|| {
                    let found = old.encode_fast(text.as_str(), false);
                    found.map(|found| found.get_ids().to_vec()).map_err(|e| e.to_string())
                });
                let found = caught(|| {
                    let mut ids = Vec::new();
                    new.encode_into(text, &options, &mut ids).map_err(|e| e.to_string())?;
                    Ok(ids.into_iter().map(u32::from).collect::<Vec<u32>>())
                });
                all += 1;
                match (expected, found) {
                    (Ok(expected), Ok(found)) => differ += usize::from(expected != found),
                    (Err(_), Err(_)) => {}
                    _ => failed += 1,
                }
            }
            format!("{differ} differ and {failed} fail of {all}")
        };
        println!(
            "  special tokens {}: data {}; hostile {}",
            if as_text { "as text" } else { "found" },
            count(&mut pairs.iter().flatten()),
            count(&mut hostile.iter()),
        );
    }
    old.set_encode_special_tokens(false);
}

/// The bytes of every id of a byte-level vocabulary, in one arena.
struct Bytes {
    bytes: Vec<u8>,
    offsets: Vec<usize>,
}

impl Bytes {
    fn of(old: &old::Tokenizer) -> Self {
        let mut alphabet = HashMap::new();
        let mut next = 256;
        for byte in 0..=255_u8 {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let code = if printable { u32::from(byte) } else { next };
            next += u32::from(!printable);
            alphabet.insert(code, byte);
        }
        let added = old.get_added_tokens_decoder();
        let mut all = Vec::new();
        for (token, id) in old.get_vocab(true) {
            let byte = |c: char| alphabet.get(&(c as u32)).copied();
            let spelt = if added.contains_key(&id) {
                token.into_bytes()
            } else {
                token.chars().filter_map(byte).collect()
            };
            all.resize_with(all.len().max(id as usize + 1), Vec::new);
            all[id as usize] = spelt;
        }
        let mut bytes = Self { bytes: Vec::new(), offsets: vec![0] };
        for spelt in all {
            bytes.bytes.extend(spelt);
            bytes.offsets.push(bytes.bytes.len());
        }
        bytes
    }

    /// Where each id ends, and whether the ids spell the text.
    fn ends(&self, text: &[u8], ids: &[PipelineToken], ends: &mut Vec<u32>) -> bool {
        ends.clear();
        let mut at = 0;
        for id in ids {
            let id = id.id() as usize;
            let bytes = &self.bytes[self.offsets[id]..self.offsets[id + 1]];
            if text.get(at..at + bytes.len()) != Some(bytes) {
                return false;
            }
            at += bytes.len();
            ends.push(at as u32);
        }
        at == text.len()
    }
}

fn speed(json: &str, old: &old::Tokenizer, pairs: &[[String; 2]]) -> Result<(), Failure> {
    let half = &pairs[..pairs.len() / 2];
    let tenth = &pairs[..pairs.len() / 10];
    let mut tokens = 0;
    let seconds = median(1, || {
        let start = now();
        for text in tenth.iter().flatten() {
            tokens += old.encode_fast(text.as_str(), false).map_or(0, |found| found.len());
        }
        now() - start
    });
    println!(
        "  0.23, encode_fast, a tenth of the data: {:.2} M tokens/s",
        tokens as f64 / seconds / 1e6
    );

    let options = options(false);
    let fresh = || load_new(json);
    let bytes = Bytes::of(old);
    let pass = |engine: &PipelineTokenizer, pairs: &[[String; 2]]| {
        let mut ids = Vec::new();
        let mut count = 0;
        let start = now();
        for text in pairs.iter().flatten() {
            ids.clear();
            count += engine.encode_into(text, &options, &mut ids).map_or(0, |()| ids.len());
        }
        (now() - start, count)
    };
    let rows = |engine: &PipelineTokenizer, pairs: &[[String; 2]]| {
        let (mut ids, mut ends, mut spelt) = (Vec::new(), Vec::new(), true);
        let start = now();
        for text in pairs.iter().flatten() {
            ids.clear();
            let done = engine.encode_into(text, &options, &mut ids).is_ok();
            spelt &= done && bytes.ends(text.as_bytes(), &ids, &mut ends);
        }
        (now() - start, spelt)
    };
    let engine = fresh()?;
    let (_, half_count) = pass(&engine, half);
    let (_, count) = pass(&engine, pairs);
    let cold = median(ROUNDS, || fresh().map_or(f64::NAN, |engine| pass(&engine, half).0));
    let warm = median(ROUNDS, || pass(&engine, pairs).0);
    let (_, spelt) = rows(&engine, pairs);
    let cold_rows = median(ROUNDS, || fresh().map_or(f64::NAN, |engine| rows(&engine, half).0));
    let warm_rows = median(ROUNDS, || rows(&engine, pairs).0);
    let print = |name: &str, times: [f64; 4], spelt: bool| {
        let [cold, warm, cold_rows, warm_rows] = times;
        let tokens = |count: usize, seconds: f64| count as f64 / seconds / 1e6;
        print!("  {name}: cold {:.1}, ", tokens(half_count, cold));
        print!("warm {:.1} M tokens/s; pairs ", tokens(count, warm));
        let rate = |pairs: &[[String; 2]], seconds: f64| pairs.len() as f64 / seconds / 1e3;
        if spelt {
            println!("cold {:.1}, warm {:.1} k/s", rate(half, cold_rows), rate(pairs, warm_rows));
        } else {
            println!("have no ends");
        }
    };
    print("1.0", [cold, warm, cold_rows, warm_rows], spelt);

    let ours = match Bpe::recognise(json) {
        Ok(ours) => ours,
        Err(why) => {
            println!("  ours: {why}");
            return Ok(());
        }
    };
    let pass = |scratch: &mut Scratch, pairs: &[[String; 2]]| {
        let mut ids = Vec::new();
        let start = now();
        for text in pairs.iter().flatten() {
            ids.clear();
            // The only error is a text beyond 2 GiB.
            let _ = ours.encode_into(text, None, scratch, &mut ids);
        }
        now() - start
    };
    let rows = |scratch: &mut Scratch, pairs: &[[String; 2]]| {
        let mut out = PairIds::default();
        let start = now();
        for [first, second] in pairs {
            let border = first.len().min(second.len()) / 2;
            let _ = ours.encode_pair([first, second], border, None, scratch, &mut out);
        }
        now() - start
    };
    let mut scratch = Scratch::default();
    pass(&mut scratch, pairs);
    let cold = median(ROUNDS, || pass(&mut Scratch::default(), half));
    let warm = median(ROUNDS, || pass(&mut scratch, pairs));
    let cold_rows = median(ROUNDS, || rows(&mut Scratch::default(), half));
    let warm_rows = median(ROUNDS, || rows(&mut scratch, pairs));
    print("ours", [cold, warm, cold_rows, warm_rows], true);
    Ok(())
}

fn median(rounds: usize, mut work: impl FnMut() -> f64) -> f64 {
    let mut times: Vec<f64> = (0..rounds).map(|_| work()).collect();
    times.sort_by(f64::total_cmp);
    times[rounds / 2]
}

/// Seconds that this thread has had a processor, so that a shared machine does not count its other work.
fn now() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
