//! The order of an epoch: a keyed permutation, so that no index is stored and any position is found at once.

use std::ops::Range;

use super::{STRIDE, Stop, check};
use crate::error::{Error, Place, Reason, Result};

/// A permutation of `0..n` for one seed and epoch: a Feistel network over the least even number of bits that holds `n`,
/// walked until it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
#[derive(Debug, Clone, Copy)]
pub struct Order {
    n: u64,
    half: u32,
    keys: [u64; ROUNDS],
}

const ROUNDS: usize = 8;

/// The finaliser of splitmix64 (Steele, Lea and Flood 2014).
pub(super) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Order {
    /// The order of `n` items in `epoch`.
    pub fn new(n: u64, seed: u64, epoch: u64) -> Self {
        let bits = (64 - n.saturating_sub(1).leading_zeros()).max(2);
        let mut key = mix(seed) ^ mix(mix(epoch));
        let keys = [(); ROUNDS].map(|()| {
            key = mix(key);
            key
        });
        Self { n, half: bits.div_ceil(2), keys }
    }

    /// The item at `position`, which must be below `n`.
    pub fn at(&self, position: u64) -> u64 {
        let mask = (1 << self.half) - 1;
        let mut x = position;
        loop {
            let (mut left, mut right) = (x >> self.half & mask, x & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (mix(right ^ key) & mask));
            }
            x = left << self.half | right;
            if x < self.n {
                return x;
            }
        }
    }
}

/// The order of an epoch: shuffled by a seed, or the items' own.
#[derive(Debug, Clone, Copy)]
pub struct Epoch {
    /// Chooses the orders of all epochs.
    pub seed: u64,
    /// The epoch's number.
    pub number: u64,
    /// Whether the items leave their own order.
    pub shuffle: bool,
}

impl Epoch {
    /// The item at each position below `n`.
    fn of(self, n: u64) -> impl Fn(u64) -> u64 {
        let order = Order::new(n, self.seed, self.number);
        move |position| if self.shuffle { order.at(position) } else { position }
    }
}

/// Items `range` of the `n` of an epoch.
///
/// # Errors
/// [`Error::Interrupted`] if `stop` says so.
pub fn order(n: u64, epoch: Epoch, range: Range<u64>, stop: Stop<'_>) -> Result<Vec<i64>> {
    let item = epoch.of(n);
    let end = range.end.min(n);
    let mut out = Vec::with_capacity(end.saturating_sub(range.start) as usize);
    for start in (range.start..end).step_by(STRIDE) {
        check(stop)?;
        let end = end.min(start + STRIDE as u64);
        out.extend((start..end).map(|position| item(position) as i64));
    }
    Ok(out)
}

/// Cuts an epoch into batches whose padded slots, `2 * pairs * width`, stay within `budget`, greedily in order.
///
/// `longest[i]` is the longer side of pair `i`; widths are multiples of `multiple`. Returns where each batch starts, and
/// the end.
///
/// # Errors
/// [`Error::Data`] names a pair that alone passes the budget; [`Error::Interrupted`] if `stop` says so.
pub fn by_slots(
    longest: &[i64],
    budget: u64,
    multiple: u64,
    epoch: Epoch,
    stop: Stop<'_>,
) -> Result<Vec<i64>> {
    let n = longest.len() as u64;
    let item = epoch.of(n);
    let mut bounds = vec![0];
    let (mut pairs, mut width) = (0, 0);
    for position in 0..n {
        if position.is_multiple_of(STRIDE as u64) {
            check(stop)?;
        }
        let item = item(position);
        let length = longest.get(item as usize).copied().unwrap_or(0).unsigned_abs();
        let own = length.div_ceil(multiple).saturating_mul(multiple);
        if own.saturating_mul(2) > budget {
            return Err(too_long(item, own.saturating_mul(2), budget));
        }
        let wider = own.max(width);
        if wider.saturating_mul(2 * (pairs + 1)) > budget {
            bounds.push(position as i64);
            (pairs, width) = (1, own);
        } else {
            (pairs, width) = (pairs + 1, wider);
        }
    }
    if n > 0 {
        bounds.push(n as i64);
    }
    Ok(bounds)
}

fn too_long(pair: u64, slots: u64, budget: u64) -> Error {
    Error::Data {
        place: Place::default(),
        reason: Reason::TooLong,
        message: format!(
            "pair {pair} needs {slots} slots, more than `tokens_per_batch`={budget}\nhint: use tokens_per_batch={slots} \
             or more, or a smaller max_length"
        ),
    }
}
