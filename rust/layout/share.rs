//! `shared`: the prompt of a pair once, then both completions, which see the prompt and not each other.

use super::table::Table;
use super::{Pair, Pairs, count, members, part, slots, widen};
use crate::error::{Error, Result};

/// Queries and keys of a `FlexAttention` block.
pub const BLOCK: usize = 128;

/// Slots of a pair: P + C + R - 1, and without a prompt all tokens but the last of each side.
pub fn length(prompt: usize, chosen: usize, rejected: usize) -> usize {
    match prompt {
        0 => chosen.saturating_sub(1) + rejected.saturating_sub(1),
        _ => prompt - 1 + chosen + rejected,
    }
}

/// Where shared rows are written: (R, T) row-major, and varlen arrays over the flattened rows.
#[derive(Debug)]
pub struct Shared<'a> {
    /// Ids, and the pad id in the tail.
    pub input_ids: &'a mut [i64],
    /// Positions inside the own sequence: both completions go on from the prompt. The tail counts from 0.
    pub position_ids: &'a mut [i64],
    /// The pair's number in the batch, -1 in the tail.
    pub doc: &'a mut [i32],
    /// 0 in the prefix and the tail, 1 in chosen, 2 in rejected.
    pub seg: &'a mut [i32],
    /// Where each segment of queries begins in the flattened rows, and the end: at most 2N + R + 1.
    pub cu_q: &'a mut [i32],
    /// Where each segment of keys begins in `kv_rows`, and the end.
    pub cu_k: &'a mut [i32],
    /// Row of the flattened keys: at most the slots and each prefix once more.
    pub kv_rows: &'a mut [i64],
    /// Interleaved: chosen 0, rejected 0, chosen 1, ...
    pub table: Table<'a>,
}

/// What [`share_into`] wrote of the arrays whose length it alone knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Written {
    /// Varlen segments.
    pub segments: usize,
    /// Keys.
    pub keys: usize,
    /// The most queries of a segment.
    pub longest_q: usize,
    /// The most keys of a segment.
    pub longest_k: usize,
}

/// Fills shared rows: row r holds the pairs `index[bounds[r]..bounds[r + 1]]`.
///
/// # Errors
/// [`Error::Tensor`] if a pair does not exist or a row does not fit; [`Error::Limit`] past 2^31 - 1 slots or keys.
pub fn share_into(
    pairs: &Pairs<'_>,
    index: &[i64],
    bounds: &[i64],
    pad_id: i64,
    mut out: Shared<'_>,
) -> Result<Written> {
    let rows = bounds.len().saturating_sub(1);
    slots(out.input_ids.len(), "cu_seq_lens_q")?;
    slots(out.kv_rows.len(), "cu_seq_lens_k")?;
    let width = out.input_ids.len().checked_div(rows).unwrap_or(0);
    let mut written = Written::default();
    part(out.cu_q, 0, 1, "cu_seq_lens_q")?.fill(0);
    part(out.cu_k, 0, 1, "cu_seq_lens_k")?.fill(0);
    let mut k = 0;
    for r in 0..rows {
        let (mut at, end) = (r * width, (r + 1) * width);
        for i in members(index, bounds, r)? {
            let pair = pairs.get(*i)?;
            let (p, c, r_) = (pair.prompt.len(), pair.chosen.len(), pair.rejected.len());
            let stop = at + length(p, c, r_);
            if stop > end {
                return Err(Error::Tensor(format!("row {r} needs more than its {width} slots")));
            }
            out.pair(&pair, at, k, &mut written)?;
            (at, k) = (stop, k + 1);
        }
        part(out.input_ids, at, end - at, "input_ids")?.fill(pad_id);
        out.stretch(at..end, 0, -1, 0)?;
        out.varlen(at..end, 0..0, &mut written)?;
    }
    out.table.finish()?;
    Ok(written)
}

impl Shared<'_> {
    /// Writes pair number `k` of the batch from slot `at` on.
    fn pair(&mut self, pair: &Pair<'_>, at: usize, k: i32, written: &mut Written) -> Result<()> {
        let Some((last, prefix)) = pair.prompt.split_last() else {
            // Nothing is shared: each side is a segment of its own, and its first token is not scored.
            let mut at = at;
            for (side, seg) in [(pair.chosen, 1), (pair.rejected, 2)] {
                let (fed, targets) = (fed(side), side.get(1..).unwrap_or_default());
                widen(part(self.input_ids, at, fed.len(), "input_ids")?, fed);
                self.stretch(at..at + fed.len(), 0, k, seg)?;
                self.table.push_rows(at, targets)?;
                self.varlen(at..at + fed.len(), 0..0, written)?;
                at += fed.len();
            }
            return Ok(());
        };
        let middle = at + prefix.len();
        widen(part(self.input_ids, at, prefix.len(), "input_ids")?, prefix);
        self.stretch(at..middle, 0, k, 0)?;
        let mut start = middle;
        for (side, seg) in [(pair.chosen, 1), (pair.rejected, 2)] {
            let stop = start + side.len();
            if let Some((first, rest)) =
                part(self.input_ids, start, side.len(), "input_ids")?.split_first_mut()
            {
                *first = i64::from(*last);
                widen(rest, fed(side));
            }
            self.stretch(start..stop, prefix.len(), k, seg)?;
            self.table.push_rows(start, side)?;
            start = stop;
        }
        let chosen_end = middle + pair.chosen.len();
        self.varlen(at..chosen_end, 0..0, written)?;
        self.varlen(chosen_end..start, at..middle, written)
    }

    /// Positions from `first` on, and whose `slots` they are.
    fn stretch(
        &mut self,
        slots: std::ops::Range<usize>,
        first: usize,
        doc: i32,
        seg: i32,
    ) -> Result<()> {
        let (start, length) = (slots.start, slots.len());
        count(part(self.position_ids, start, length, "position_ids")?, first);
        part(self.doc, start, length, "doc")?.fill(doc);
        part(self.seg, start, length, "seg")?.fill(seg);
        Ok(())
    }

    /// Adds a segment of `queries`, whose keys are `prefix` and then the queries' own; an empty one is none.
    fn varlen(
        &mut self,
        queries: std::ops::Range<usize>,
        prefix: std::ops::Range<usize>,
        written: &mut Written,
    ) -> Result<()> {
        if queries.is_empty() {
            return Ok(());
        }
        let keys = prefix.len() + queries.len();
        count(part(self.kv_rows, written.keys, prefix.len(), "kv_rows")?, prefix.start);
        let own = written.keys + prefix.len();
        count(part(self.kv_rows, own, queries.len(), "kv_rows")?, queries.start);
        written.keys += keys;
        written.segments += 1;
        written.longest_q = written.longest_q.max(queries.len());
        written.longest_k = written.longest_k.max(keys);
        // In range: `share_into` checked the lengths of both arrays.
        part(self.cu_q, written.segments, 1, "cu_seq_lens_q")?.fill(queries.end as i32);
        part(self.cu_k, written.segments, 1, "cu_seq_lens_k")?.fill(written.keys as i32);
        Ok(())
    }
}

/// All tokens but the last, which predicts nothing that is scored.
fn fed(side: &[i32]) -> &[i32] {
    side.split_last().map_or(&[], |(_, rest)| rest)
}

/// Where one direction of a `BlockMask` is written: for each block of rows how many blocks it meets, and
/// which, (R, 1, B) and (R, 1, B, B); behind those that count stand the others, as `create_block_mask` leaves them.
#[derive(Debug)]
pub struct Blocks<'a> {
    /// Blocks met in part.
    pub partial: (&'a mut [i32], &'a mut [i32]),
    /// Blocks met whole, where no mask is needed.
    pub full: (&'a mut [i32], &'a mut [i32]),
}

/// Fills the `BlockMask` of shared rows, from queries to keys and from keys to queries.
///
/// Same as counting the entries of the dense mask in each block of 128 x 128. Slots beyond the width count as masked.
///
/// # Errors
/// [`Error::Tensor`] if an array has another length.
pub fn blocks_into<'a>(
    doc: &[i32],
    seg: &[i32],
    width: usize,
    mut to_keys: Blocks<'a>,
    mut to_queries: Blocks<'a>,
) -> Result<()> {
    let side = width.div_ceil(BLOCK);
    let mut met = vec![0_u32; side * side];
    let rows = doc.chunks(width.max(1)).zip(seg.chunks(width.max(1)));
    for (r, (doc, seg)) in rows.enumerate() {
        met.fill(0);
        count_blocks(doc, seg, side, &mut met);
        for (out, transposed) in [(&mut to_keys, false), (&mut to_queries, true)] {
            for a in 0..side {
                let entries = |b: usize| {
                    let cell = if transposed { b * side + a } else { a * side + b };
                    met.get(cell).map_or(0, |entries| *entries as usize)
                };
                let whole = BLOCK * BLOCK;
                let partial = |b: &usize| (1..whole).contains(&entries(*b));
                let full = |b: &usize| entries(*b) == whole;
                order(&mut out.partial, r * side + a, side, partial)?;
                order(&mut out.full, r * side + a, side, full)?;
            }
        }
    }
    Ok(())
}

/// Adds to `met` how many of each block's entries one row of slots allows.
fn count_blocks(doc: &[i32], seg: &[i32], side: usize, met: &mut [u32]) {
    let mut add = |query: usize, keys: std::ops::Range<usize>| {
        let mut at = keys.start;
        while at < keys.end {
            let stop = keys.end.min((at / BLOCK + 1) * BLOCK);
            if let Some(cell) = met.get_mut(query / BLOCK * side + at / BLOCK) {
                *cell += (stop - at) as u32;
            }
            at = stop;
        }
    };
    let mut before = None;
    let (mut start, mut prefix) = (0, 0..0);
    for (q, (doc, seg)) in doc.iter().zip(seg).enumerate() {
        if before != Some((*doc, *seg)) {
            match before {
                Some((same, 0)) if same == *doc => prefix = start..q,
                Some((same, _)) if same == *doc => {}
                _ => prefix = q..q,
            }
            (before, start) = (Some((*doc, *seg)), q);
        }
        add(q, prefix.clone());
        add(q, start..q + 1);
    }
}

/// Writes the blocks that `wanted` names, then the others, each from the first to the last.
fn order(
    out: &mut (&mut [i32], &mut [i32]),
    row: usize,
    side: usize,
    wanted: impl Fn(&usize) -> bool,
) -> Result<()> {
    let places = part(out.1, row * side, side, "kv_indices")?;
    let others = (0..side).filter(|b| !wanted(b));
    let mut number = 0;
    for (slot, b) in places
        .iter_mut()
        .zip((0..side).filter(|b| wanted(b)).inspect(|_| number += 1).chain(others))
    {
        *slot = b as i32;
    }
    part(out.0, row, 1, "kv_num_blocks")?.fill(number);
    Ok(())
}
