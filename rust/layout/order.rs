//! The order of an epoch: a keyed permutation, so that no index is stored and any position is found at once.

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

/// Items `start..stop` of an epoch; without `shuffle` in their own order.
pub fn order(n: u64, seed: u64, epoch: u64, shuffle: bool, start: u64, stop: u64) -> Vec<i64> {
    let order = Order::new(n, seed, epoch);
    let stop = stop.min(n);
    (start..stop).map(|i| if shuffle { order.at(i) } else { i } as i64).collect()
}

/// Cuts an epoch into batches whose padded slots, `2 * pairs * width`, stay within `budget`, greedily in order.
///
/// `longest[i]` is the longer side of pair `i`. Returns where each batch starts, and the end.
///
/// # Errors
/// The pair and its slots, if one alone passes the budget.
#[allow(clippy::too_many_arguments)] // the arguments of a plan
pub fn by_slots(
    longest: &[i64],
    budget: u64,
    multiple: u64,
    seed: u64,
    epoch: u64,
    shuffle: bool,
) -> Result<Vec<i64>, (u64, u64)> {
    let n = longest.len() as u64;
    let order = Order::new(n, seed, epoch);
    let mut bounds = vec![0];
    let (mut pairs, mut width) = (0, 0);
    for position in 0..n {
        let item = if shuffle { order.at(position) } else { position };
        let length = longest.get(item as usize).copied().unwrap_or(0).unsigned_abs();
        let own = length.div_ceil(multiple).saturating_mul(multiple);
        if own.saturating_mul(2) > budget {
            return Err((item, own.saturating_mul(2)));
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
