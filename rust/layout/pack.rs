//! Packing: which pairs share a bin, and the arrays of packed rows.

use std::collections::BTreeMap;

use super::order::{Epoch, mix, order};
use super::table::Table;
use super::{Pairs, STRIDE, Stop, check, count, members, part, slots, widen};
use crate::error::{Error, Place, Reason, Result};

/// Packs `lengths` into bins of `capacity`, best fit decreasing. Returns the items of each bin, bins back to back, and
/// where each bin begins.
///
/// Same bins as taking the items from the longest to the shortest and putting each into the fullest bin that still
/// takes it. That costs O(n * bins), this O(n + capacity): a counting sort, bins queued by their free space, and a
/// bitmap over free space that answers "the least that fits". Items of one length are taken in an order that `seed`
/// chooses; items of length 0 fit anywhere and are put into the last bin. Over a capacity of 2^22 (and of the sum of all
/// lengths) sorting and a tree do the same in O(n log n), so that memory follows the number of items.
///
/// # Errors
/// [`Error::Data`] names the first item that is negative or longer than `capacity`; [`Error::Interrupted`] if `stop`
/// says so.
///
/// ```
/// let (items, starts) = dpo_ext::layout::pack::pack_lengths(&[5, 3, 3, 2], 8, 0, &|| false)?;
/// assert_eq!((items.len(), starts.len() - 1), (4, 2));
/// # Ok::<(), dpo_ext::Error>(())
/// ```
pub fn pack_lengths(
    lengths: &[i64],
    capacity: usize,
    seed: u64,
    stop: Stop<'_>,
) -> Result<(Vec<i32>, Vec<i64>)> {
    check_lengths(lengths, capacity, stop)?;
    // What all items need is enough for the one bin that then holds them; memory follows this number.
    let mut needed = 0_u64;
    for part in lengths.chunks(STRIDE) {
        check(stop)?;
        needed = part.iter().fold(needed, |sum, length| sum.saturating_add(length.unsigned_abs()));
    }
    let capacity = capacity.min(usize::try_from(needed).unwrap_or(usize::MAX)).max(1);
    let (sorted, bin_of, sizes) = if capacity <= DENSE {
        dense(lengths, capacity, seed, stop)?
    } else {
        sparse(lengths, capacity, seed, stop)?
    };
    let mut starts = vec![0_i64];
    let mut end = 0_i64;
    for size in &sizes {
        end += i64::from(*size);
        starts.push(end);
    }
    let mut next = starts.clone();
    let mut items = vec![0_i32; sorted.len()];
    for (sorted, bin_of) in sorted.chunks(STRIDE).zip(bin_of.chunks(STRIDE)) {
        check(stop)?;
        for (item, bin) in sorted.iter().zip(bin_of) {
            if let Some(slot) = next.get_mut(*bin as usize) {
                if let Some(place) = items.get_mut(*slot as usize) {
                    *place = *item;
                }
                *slot += 1;
            }
        }
    }
    Ok((items, starts))
}

/// The bins of an epoch in its order, bins back to back, and where each begins and the last one ends.
///
/// Same bins as those of [`pack_lengths`] with a number that the epoch chooses, and 0 without shuffling, for `seed`.
///
/// # Errors
/// As [`pack_lengths`].
pub fn epoch_bins(
    lengths: &[i64],
    capacity: usize,
    epoch: Epoch,
    stop: Stop<'_>,
) -> Result<(Vec<i64>, Vec<i64>)> {
    let ties = order(1 << 62, epoch, 0..1, stop)?.first().copied().unwrap_or_default();
    let (items, starts) = pack_lengths(lengths, capacity, ties.unsigned_abs(), stop)?;
    // Best-fit-decreasing makes the bins of the longest pairs first.
    let bins = starts.len().saturating_sub(1) as u64;
    let (mut out, mut begins) = (Vec::with_capacity(items.len()), vec![0]);
    for part in order(bins, epoch, 0..bins, stop)?.chunks(STRIDE) {
        check(stop)?;
        for bin in part {
            let place = |i: i64| starts.get(i as usize).copied().unwrap_or_default() as usize;
            let bin = items.get(place(*bin)..place(bin + 1)).unwrap_or_default();
            out.extend(bin.iter().map(|item| i64::from(*item)));
            begins.push(out.len() as i64);
        }
    }
    Ok((out, begins))
}

/// The largest capacity for which a place is kept for each amount of free space.
const DENSE: usize = 1 << 22;

/// Items from the longest to the shortest, the bin of each (in that order, so that memory is walked from front to back),
/// and each bin's number of items.
type Placed = (Vec<i32>, Vec<u32>, Vec<u32>);

fn dense(lengths: &[i64], capacity: usize, seed: u64, stop: Stop<'_>) -> Result<Placed> {
    let longest = lengths.iter().max().map_or(0, |length| *length as usize);
    let (sorted, ends) = descending(lengths, longest, seed, stop)?;
    let mut free = FreeSpace::new(capacity);
    let mut bin_of = Vec::with_capacity(sorted.len());
    let mut sizes: Vec<u32> = Vec::new();
    let mut at = 0;
    for (need, end) in (0..=longest).rev().zip(&ends) {
        for i in at..*end {
            if i % STRIDE == 0 {
                check(stop)?;
            }
            let (bin, space) = free.take(need).unwrap_or_else(|| {
                sizes.push(0);
                (sizes.len() as u32 - 1, capacity)
            });
            bin_of.push(bin);
            if let Some(size) = sizes.get_mut(bin as usize) {
                *size += 1;
            }
            free.put(bin, space - need);
        }
        at = *end;
    }
    Ok((sorted, bin_of, sizes))
}

/// Same as `items.sort_by_key(|item| Reverse(length(item)))`, which asks nobody whether to go on: runs of `run` items
/// are sorted one by one, then merged two by two.
fn longest_first(
    mut items: Vec<i32>,
    mut run: usize,
    length: impl Fn(&i32) -> usize,
    stop: Stop<'_>,
) -> Result<Vec<i32>> {
    for part in items.chunks_mut(run) {
        check(stop)?;
        part.sort_by_key(|item| std::cmp::Reverse(length(item)));
    }
    let mut merged = Vec::with_capacity(items.len());
    while run < items.len() {
        merged.clear();
        for pair in items.chunks(2 * run) {
            let (first, second) = pair.split_at(run.min(pair.len()));
            let (mut first, mut second) = (first.iter().peekable(), second.iter().peekable());
            while let Some(item) = match (first.peek(), second.peek()) {
                (Some(a), Some(b)) if length(b) > length(a) => second.next(),
                (None, _) => second.next(),
                _ => first.next(),
            } {
                if merged.len() % STRIDE == 0 {
                    check(stop)?;
                }
                merged.push(*item);
            }
        }
        std::mem::swap(&mut items, &mut merged);
        run *= 2;
    }
    Ok(items)
}

/// The same in O(n log n) time and O(n) memory, for lengths of which each may be enormous.
fn sparse(lengths: &[i64], capacity: usize, seed: u64, stop: Stop<'_>) -> Result<Placed> {
    let length = |item: &i32| lengths.get(*item as usize).map_or(0, |length| *length as usize);
    let mut sorted: Vec<i32> = (0..).zip(lengths).map(|(item, _)| item).collect();
    shuffle(&mut sorted, seed, stop)?;
    let sorted = longest_first(sorted, STRIDE, length, stop)?;
    let mut free: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    let mut bin_of = Vec::with_capacity(sorted.len());
    let mut sizes: Vec<u32> = Vec::new();
    for (i, item) in sorted.iter().enumerate() {
        if i % STRIDE == 0 {
            check(stop)?;
        }
        let need = length(item);
        let fitting = free.range_mut(need..).next();
        let found = fitting.and_then(|(space, bins)| Some((bins.pop()?, *space, bins.is_empty())));
        let (bin, space, last) = found.unwrap_or_else(|| {
            sizes.push(0);
            (sizes.len() as u32 - 1, capacity, false)
        });
        if last {
            free.remove(&space);
        }
        bin_of.push(bin);
        if let Some(size) = sizes.get_mut(bin as usize) {
            *size += 1;
        }
        free.entry(space - need).or_default().push(bin);
    }
    Ok((sorted, bin_of, sizes))
}

fn check_lengths(lengths: &[i64], capacity: usize, stop: Stop<'_>) -> Result<()> {
    if capacity == 0 || i32::try_from(lengths.len()).is_err() || u32::try_from(capacity).is_err() {
        let message = "`capacity` must be in 1..2^32, and there must be fewer than 2^31 lengths";
        return Err(Error::Value(message.to_owned()));
    }
    let fits = |l: &i64| usize::try_from(*l).is_ok_and(|l| l <= capacity);
    let mut bad = None;
    for (part, start) in lengths.chunks(STRIDE).zip((0..).step_by(STRIDE)) {
        check(stop)?;
        bad = bad.or_else(|| Some(start + part.iter().position(|l| !fits(l))?));
    }
    let Some(item) = bad else { return Ok(()) };
    let found = lengths.get(item).copied().unwrap_or_default();
    let message = if found < 0 {
        format!("pair {item} has the negative length {found}")
    } else {
        let least = lengths.iter().max().copied().unwrap_or_default();
        format!(
            "pair {item} needs {found} tokens, more than a bin of {capacity}\nhint: use a bin of {least} or more, or a \
             smaller max_length"
        )
    };
    Err(Error::Data { place: Place::default(), reason: Reason::TooLong, message })
}

/// The items from the longest to the shortest, by counting, and where each length from `longest` down to 0 ends; items of
/// one length in an order that `seed` chooses.
fn descending(
    lengths: &[i64],
    longest: usize,
    seed: u64,
    stop: Stop<'_>,
) -> Result<(Vec<i32>, Vec<usize>)> {
    let key = |length: &i64| longest - *length as usize;
    let mut ends = vec![0_usize; longest + 1];
    for part in lengths.chunks(STRIDE) {
        check(stop)?;
        for length in part {
            if let Some(count) = ends.get_mut(key(length)) {
                *count += 1;
            }
        }
    }
    let mut sum = 0;
    for end in &mut ends {
        sum += std::mem::replace(end, sum);
    }
    // `ends` are the starts now; each one moves to its end as the places are taken.
    let mut out = vec![0_i32; lengths.len()];
    for (length, item) in lengths.iter().zip(0..) {
        if (item as usize).is_multiple_of(STRIDE) {
            check(stop)?;
        }
        if let Some(end) = ends.get_mut(key(length)) {
            if let Some(slot) = out.get_mut(*end) {
                *slot = item;
            }
            *end += 1;
        }
    }
    let (mut rest, mut start) = (out.as_mut_slice(), 0);
    for (end, need) in ends.iter().zip(0_u64..) {
        let (same, others) = rest.split_at_mut(end - start);
        shuffle(same, mix(seed ^ mix(need)), stop)?;
        (rest, start) = (others, *end);
    }
    Ok((out, ends))
}

/// Puts `items` into an order that `key` chooses (Fisher and Yates; Lemire 2019 for a number below a bound).
fn shuffle(items: &mut [i32], mut key: u64, stop: Stop<'_>) -> Result<()> {
    for i in (1..items.len()).rev() {
        if i % STRIDE == 0 {
            check(stop)?;
        }
        key = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let below = u128::from(mix(key)) * (i as u128 + 1);
        items.swap(i, (below >> 64) as usize);
    }
    Ok(())
}

const NONE: u32 = u32::MAX;

/// Bins by their free space: a stack of bins for each amount, and a bitmap in two levels of the amounts that have any.
struct FreeSpace {
    /// The top of each stack.
    first: Vec<u32>,
    /// The bin below each bin.
    below: Vec<u32>,
    words: Vec<u64>,
    summary: Vec<u64>,
}

impl FreeSpace {
    fn new(capacity: usize) -> Self {
        let words = capacity / 64 + 1;
        Self {
            first: vec![NONE; capacity + 1],
            below: Vec::new(),
            words: vec![0; words],
            summary: vec![0; words / 64 + 1],
        }
    }

    fn put(&mut self, bin: u32, space: usize) {
        if bin as usize >= self.below.len() {
            self.below.resize(bin as usize + 1, NONE);
        }
        if let (Some(first), Some(below)) =
            (self.first.get_mut(space), self.below.get_mut(bin as usize))
        {
            *below = std::mem::replace(first, bin);
        }
        set(&mut self.words, space);
        set(&mut self.summary, space / 64);
    }

    /// Takes a bin out whose free space is the least that holds `need`.
    fn take(&mut self, need: usize) -> Option<(u32, usize)> {
        let same_word = next(&self.words, need, need / 64 + 1);
        let space = same_word.or_else(|| {
            let word = next(&self.summary, need / 64 + 1, self.summary.len())?;
            next(&self.words, word * 64, word + 1)
        })?;
        let first = self.first.get_mut(space)?;
        let bin = *first;
        *first = *self.below.get(bin as usize)?;
        if *first == NONE {
            let word = self.words.get_mut(space / 64)?;
            *word &= !(1 << (space % 64));
            if *word == 0 {
                let word = self.summary.get_mut(space / 64 / 64)?;
                *word &= !(1 << (space / 64 % 64));
            }
        }
        Some((bin, space))
    }
}

fn set(words: &mut [u64], bit: usize) {
    if let Some(word) = words.get_mut(bit / 64) {
        *word |= 1 << (bit % 64);
    }
}

/// The first set bit at or after `bit`, in words before `stop`.
fn next(words: &[u64], bit: usize, stop: usize) -> Option<usize> {
    let mut mask = u64::MAX << (bit % 64);
    for (i, word) in words.iter().enumerate().take(stop).skip(bit / 64) {
        let found = word & mask;
        if found != 0 {
            return Some(i * 64 + found.trailing_zeros() as usize);
        }
        mask = u64::MAX;
    }
    None
}

/// Where packed rows are written: (R, T) row-major, and varlen offsets over the flattened rows.
#[derive(Debug)]
pub struct Packed<'a> {
    /// Ids, and the pad id in the tail.
    pub input_ids: &'a mut [i64],
    /// Positions inside the own segment; the tail is a segment too.
    pub position_ids: &'a mut [i64],
    /// Where each segment begins in the flattened rows, and the end: at most 2N + R + 1.
    pub cu_seq_lens: &'a mut [i32],
    /// Interleaved: chosen 0, rejected 0, chosen 1, ...
    pub table: Table<'a>,
}

/// Fills packed rows: row r holds the pairs `index[bounds[r]..bounds[r + 1]]`, each as prompt + chosen and prompt +
/// rejected, two segments. Returns the number of segments and the longest one.
///
/// # Errors
/// [`Error::Tensor`] if a pair does not exist or a row does not fit; [`Error::Limit`] past 2^31 - 1 slots.
pub fn pack_into(
    pairs: &Pairs<'_>,
    index: &[i64],
    bounds: &[i64],
    pad_id: i64,
    out: Packed<'_>,
) -> Result<(usize, usize)> {
    let rows = bounds.len().saturating_sub(1);
    let Packed { input_ids, position_ids, cu_seq_lens, mut table } = out;
    slots(input_ids.len(), "cu_seq_lens_q")?;
    let width = input_ids.len().checked_div(rows).unwrap_or(0);
    let (mut segments, mut longest) = (0, 0);
    part(cu_seq_lens, 0, 1, "cu_seq_lens_q")?.fill(0);
    // Positions and the end of the segment `start..end`; an empty one is none.
    let mut segment = |start: usize, end: usize| -> Result<()> {
        if end > start {
            count(part(position_ids, start, end - start, "position_ids")?, 0);
            segments += 1;
            part(cu_seq_lens, segments, 1, "cu_seq_lens_q")?.fill(end as i32);
            longest = longest.max(end - start);
        }
        Ok(())
    };
    for r in 0..rows {
        let (mut at, end) = (r * width, (r + 1) * width);
        for i in members(index, bounds, r)? {
            let pair = pairs.get(*i)?;
            for completion in [pair.chosen, pair.rejected] {
                let middle = at + pair.prompt.len();
                let stop = middle + completion.len();
                if stop > end {
                    let message = format!("row {r} needs more than its {width} slots");
                    return Err(Error::Tensor(message));
                }
                widen(part(input_ids, at, pair.prompt.len(), "input_ids")?, pair.prompt);
                widen(part(input_ids, middle, completion.len(), "input_ids")?, completion);
                segment(at, stop)?;
                table.push(middle, pair.prompt.len(), completion)?;
                at = stop;
            }
        }
        part(input_ids, at, end - at, "input_ids")?.fill(pad_id);
        segment(at, end)?;
    }
    table.finish()?;
    Ok((segments, longest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition: longest first, each into the fullest bin that still takes it.
    fn slowly(lengths: &[i64], capacity: i64) -> Vec<i64> {
        let mut sorted = lengths.to_vec();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        let mut bins: Vec<i64> = Vec::new();
        for length in sorted {
            match bins
                .iter_mut()
                .filter(|used| **used + length <= capacity)
                .max_by_key(|used| **used)
            {
                Some(used) => *used += length,
                None => bins.push(length),
            }
        }
        bins.sort_unstable();
        bins
    }

    fn used(lengths: &[i64], items: &[i32], starts: &[i64]) -> Vec<i64> {
        let sum = |bin: &[i32]| bin.iter().map(|i| lengths[*i as usize]).sum();
        let mut used: Vec<i64> =
            starts.windows(2).map(|w| sum(&items[w[0] as usize..w[1] as usize])).collect();
        used.sort_unstable();
        used
    }

    proptest! {
        #[test]
        fn sorting_in_runs_is_the_stable_sort(lengths in prop::collection::vec(0usize..6, 0..60), run in 1usize..9) {
            let items: Vec<i32> = (0..lengths.len() as i32).rev().collect();
            let mut want = items.clone();
            want.sort_by_key(|item| std::cmp::Reverse(lengths[*item as usize]));
            let found = longest_first(items, run, |item| lengths[*item as usize], &|| false).unwrap();
            prop_assert_eq!(found, want);
        }
        #[test]
        fn bins_are_best_fit_decreasing_and_lose_nothing(
            lengths in prop::collection::vec(0_i64..=300, 0..120), more in 0_usize..5000, seed: u64,
        ) {
            let capacity = lengths.iter().max().copied().unwrap_or(1).max(1) as usize + more;
            let (items, starts) = pack_lengths(&lengths, capacity, seed, &|| false).unwrap();
            let mut all = items.clone();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lengths.len() as i32).collect::<Vec<_>>());
            prop_assert!(starts.is_sorted());
            prop_assert_eq!(*starts.last().unwrap(), lengths.len() as i64);
            prop_assert_eq!(used(&lengths, &items, &starts), slowly(&lengths, capacity as i64));
            prop_assert_eq!(pack_lengths(&lengths, capacity, seed, &|| false).unwrap(), (items, starts));
            let bins = |(sorted, bin_of, sizes): Placed| {
                let mut used = vec![0; sizes.len()];
                for (item, bin) in sorted.iter().zip(bin_of) {
                    used[bin as usize] += lengths[*item as usize];
                }
                used.sort_unstable();
                used
            };
            prop_assert_eq!(
                bins(sparse(&lengths, capacity, seed, &|| false).unwrap()),
                bins(dense(&lengths, capacity, seed, &|| false).unwrap())
            );
        }
    }

    #[test]
    fn enormous_lengths_cost_no_memory() {
        let (items, starts) =
            pack_lengths(&[1 << 30, 1 << 30, 1], (1 << 31) - 1, 0, &|| false).unwrap();
        assert_eq!((items.len(), starts.len()), (3, 3));
        assert_eq!(pack_lengths(&[3, 4], u32::MAX as usize, 0, &|| false).unwrap().1, vec![0, 2]);
    }

    #[test]
    fn lengths_that_no_bin_holds_are_named() {
        for (lengths, message) in [
            (vec![1, 9, 12], "pair 1 needs 9 tokens, more than a bin of 8"),
            (vec![1, -2], "pair 1 has the negative length -2"),
        ] {
            let error = pack_lengths(&lengths, 8, 0, &|| false).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        assert!(pack_lengths(&[], 0, 0, &|| false).is_err());
        assert_eq!(pack_lengths(&[], 8, 0, &|| false).unwrap(), (vec![], vec![0]));
        assert_eq!(pack_lengths(&[0, 0], 8, 0, &|| false).unwrap().1, vec![0, 2]);
    }
}
