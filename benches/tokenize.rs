//! Tokens per second of the engine `bpe` beside the `tokenizers` crate, on one thread.
//!
//! `cargo bench --bench tokenize [-- DATA TOKENIZER_FOLDER...]`. Verifies every text first, then times, in CPU time of
//! the thread: warm = the mean of passes over all texts with a filled word cache, cold = first pass of a fresh scratch
//! over half of them, pairs = prompt + chosen and prompt + rejected with the prompt scanned once. No row of the data is
//! printed.

#![allow(clippy::print_stdout, missing_docs)] // a report on the terminal is what a bench is for

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Instant;

use dpo_ext::bpe::{Bpe, PairIds, Scratch};
use flate2::read::MultiGzDecoder;
use serde_json::Value;
use tokenizers::Tokenizer;

const PASSES: usize = 100;

fn main() -> Result<(), Box<dyn Error>> {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    let mut given = std::env::args().skip(1).filter(|a| !a.starts_with("--")).map(PathBuf::from);
    let data = given.next().unwrap_or_else(|| shared.join("data/harmless-test.jsonl.gz"));
    let mut folders: Vec<PathBuf> = given.collect();
    if folders.is_empty() {
        folders = ["qwen2.5", "gpt2", "neox20b"].map(|n| shared.join("tokenizers").join(n)).into();
    }
    let pairs = read_pairs(&data)?;
    let bytes: usize = pairs.iter().map(|(a, b)| a.len() + b.len()).sum();
    println!("{} pairs, {bytes} bytes of text, one thread, M tokens/s", pairs.len());
    println!("tokenizer      load ms  self-check ms  oracle   cold   warm   MB/s  pairs/s  reused");
    for folder in folders {
        bench(&folder, &pairs, bytes)?;
    }
    Ok(())
}

fn read_pairs(path: &Path) -> Result<Vec<(String, String)>, Box<dyn Error>> {
    let text = |row: &Value, key: &str| {
        row[key].as_str().map(str::to_owned).ok_or_else(|| format!("no text in `{key}`"))
    };
    BufReader::new(MultiGzDecoder::new(File::open(path)?))
        .lines()
        .map(|line| {
            let row: Value = serde_json::from_str(&line?)?;
            Ok((text(&row, "chosen")?, text(&row, "rejected")?))
        })
        .collect()
}

fn bench(folder: &Path, pairs: &[(String, String)], bytes: usize) -> Result<(), Box<dyn Error>> {
    let json = std::fs::read_to_string(folder.join("tokenizer.json"))?;
    let clock = Instant::now();
    let start = now(clock);
    let bpe = Bpe::recognise(&json)?;
    let load = now(clock) - start;
    let oracle: Tokenizer = json.parse().map_err(|e| format!("{e}"))?;
    let start = now(clock);
    bpe.self_check(&oracle)?;
    let check = now(clock) - start;

    let texts: Vec<&str> = pairs.iter().flat_map(|(a, b)| [a.as_str(), b.as_str()]).collect();
    let mut scratch = Scratch::default();
    let mut ids = Vec::new();
    let mut tokens = 0;
    let mut oracle_seconds = 0.0;
    for text in &texts {
        ids.clear();
        bpe.encode_into(text, None, &mut scratch, &mut ids)?;
        tokens += ids.len();
        let start = now(clock);
        let theirs = oracle.encode_fast(*text, false).map_err(|e| format!("{e}"))?;
        oracle_seconds += now(clock) - start;
        if !theirs.get_ids().iter().map(|&id| i64::from(id)).eq(ids.iter().map(|&id| i64::from(id)))
        {
            return Err("the ids differ from the oracle's".into());
        }
    }

    let half = &texts[..texts.len() / 2];
    let mut half_tokens = 0;
    let cold = mean(clock, PASSES / 2, || {
        let mut fresh = Scratch::default();
        half_tokens = pass(&bpe, half, &mut fresh, &mut ids);
    });
    let warm = mean(clock, PASSES, || {
        pass(&bpe, &texts, &mut scratch, &mut ids);
    });
    let mut out = PairIds::default();
    let (mut reused, mut second) = (0, 0);
    let paired = mean(clock, PASSES, || {
        (reused, second) = (0, 0);
        for (chosen, rejected) in pairs {
            if bpe.encode_pair([chosen, rejected], 0, None, &mut scratch, &mut out).is_ok() {
                reused += out.reused;
                second += out.second.len();
            }
        }
    });
    let million = |tokens: usize, seconds: f64| tokens as f64 / seconds / 1e6;
    println!(
        "{:<14} {:>7.0} {:>14.0} {:>7.2} {:>6.1} {:>6.1} {:>6.0} {:>8.0} {:>6.1}%",
        folder.file_name().unwrap_or_default().to_string_lossy(),
        load * 1e3,
        check * 1e3,
        million(tokens, oracle_seconds),
        million(half_tokens, cold),
        million(tokens, warm),
        bytes as f64 / warm / 1e6,
        pairs.len() as f64 / paired,
        100.0 * reused as f64 / second as f64,
    );
    Ok(())
}

fn pass(bpe: &Bpe, texts: &[&str], scratch: &mut Scratch, ids: &mut Vec<i32>) -> usize {
    ids.clear();
    for text in texts {
        // The only error is a text beyond 2 GiB, and the ids of this pass were compared before.
        if bpe.encode_into(text, None, scratch, ids).is_err() {
            return 0;
        }
    }
    ids.len()
}

/// Seconds that this thread has had a processor, so that a shared machine does not count its other work; wall time
/// where the system does not say.
fn now(start: Instant) -> f64 {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = statistics.and_then(|s| s.split(' ').next()?.parse::<f64>().ok());
    nanoseconds.map_or_else(|| start.elapsed().as_secs_f64(), |n| n / 1e9)
}

/// Seconds a call: the system counts the time of a thread in steps of some milliseconds, so all calls are timed at once.
fn mean(clock: Instant, calls: usize, mut work: impl FnMut()) -> f64 {
    let start = now(clock);
    for _ in 0..calls {
        work();
    }
    (now(clock) - start) / calls as f64
}
