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

/// Items `start..stop` of the `n` of an epoch.
pub fn order(n: u64, epoch: Epoch, start: u64, stop: u64) -> Vec<i64> {
    let item = epoch.of(n);
    (start..stop.min(n)).map(|position| item(position) as i64).collect()
}

/// Cuts an epoch into batches whose padded slots, `2 * pairs * width`, stay within `budget`, greedily in order.
///
/// `longest[i]` is the longer side of pair `i`; widths are multiples of `multiple`. Returns where each batch starts, and
/// the end.
///
/// # Errors
/// The pair and its slots, if one alone passes the budget.
pub fn by_slots(
    longest: &[i64],
    budget: u64,
    multiple: u64,
    epoch: Epoch,
) -> Result<Vec<i64>, (u64, u64)> {
    let n = longest.len() as u64;
    let item = epoch.of(n);
    let mut bounds = vec![0];
    let (mut pairs, mut width) = (0, 0);
    for position in 0..n {
        let item = item(position);
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
