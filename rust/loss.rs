//! The DPO loss of pairs and what a trainer reads beside it, each in one pass: a formula in a dozen operators costs a
//! dozen calls, which is all that a batch of pairs costs.

// Comparisons are with the exact 0.
#![allow(clippy::float_cmp)]

use crate::error::{Error, Result};

/// A float of log-probs. Everything is computed in float64 and rounded once.
pub trait Real: Copy + Into<f64> {
    /// The nearest value.
    fn nearest(value: f64) -> Self;
}

impl Real for f32 {
    fn nearest(value: f64) -> Self {
        value as f32
    }
}

impl Real for f64 {
    fn nearest(value: f64) -> Self {
        value
    }
}

/// The constants of the loss: `u = beta * ((c - cr) - (r - rr)) - margin`.
#[derive(Clone, Copy, Debug)]
pub struct Dpo {
    /// What the log-ratios are multiplied by.
    pub beta: f64,
    /// What is taken off.
    pub margin: f64,
    /// `label_smoothing * u` is added to the loss.
    pub label_smoothing: f64,
}

/// The loss of N pairs.
#[derive(Debug)]
pub struct PairLosses<T> {
    /// Sum of the losses.
    pub total: T,
    /// (N): `log(1 + exp(-u)) + label_smoothing * u`.
    pub per_pair: Vec<T>,
    /// (N, 2): the derivatives by the log-prob of chosen and of rejected.
    pub slopes: Vec<T>,
}

impl Dpo {
    /// The loss of pairs from `(N, 2)` log-probs of chosen and rejected, and the reference's.
    ///
    /// # Errors
    /// [`Error::Tensor`] if the two differ in length or hold half a pair.
    ///
    /// ```
    /// use dpo_ext::loss::Dpo;
    /// let dpo = Dpo { beta: 0.1, margin: 0.0, label_smoothing: 0.0 };
    /// let loss = dpo.of_pairs(&[-3.0_f64, -4.0], &[-3.0, -4.0])?;
    /// assert_eq!((loss.per_pair, loss.slopes), (vec![2.0_f64.ln()], vec![-0.05, 0.05]));
    /// # Ok::<(), dpo_ext::Error>(())
    /// ```
    pub fn of_pairs<T: Real>(self, logps: &[T], ref_logps: &[T]) -> Result<PairLosses<T>> {
        let pairs = pairs(logps, ref_logps)?;
        let (mut losses, n) = (Vec::with_capacity(logps.len() / 2), logps.len());
        let mut slopes = Vec::with_capacity(n);
        for ([c, r], [cr, rr]) in pairs {
            let u = self.beta * ((c - cr) - (r - rr)) - self.margin;
            let e = (-u.abs()).exp();
            let mut loss = e.ln_1p() + (-u).max(0.0);
            let mut slope = if u > 0.0 { e } else { 1.0 } / (1.0 + e); // sigmoid(-u)
            if self.label_smoothing != 0.0 {
                loss += self.label_smoothing * u;
                slope -= self.label_smoothing;
            }
            losses.push(loss);
            slopes.extend([T::nearest(-self.beta * slope), T::nearest(self.beta * slope)]);
        }
        let total = T::nearest(sum(&losses));
        Ok(PairLosses { total, per_pair: losses.into_iter().map(T::nearest).collect(), slopes })
    }
}

/// Halves added to halves, whose roundings do not add up.
fn sum(values: &[f64]) -> f64 {
    match values.len() {
        0..=8 => values.iter().sum(),
        n => sum(&values[..n / 2]) + sum(&values[n / 2..]),
    }
}

/// Means over N pairs, of rewards `scale * (logp - ref_logp)` (without a reference `scale * logp`): those of chosen, of
/// rejected, the share of pairs whose chosen one is larger, the mean difference; then the log-probs of chosen and of
/// rejected. 0 for no pair.
///
/// # Errors
/// As [`Dpo::of_pairs`].
///
/// ```
/// let means = dpo_ext::loss::means(&[-1.0_f64, -2.0, -5.0, -4.0], None, 0.5)?;
/// assert_eq!(means, [-1.5, -1.5, 0.5, 0.0, -3.0, -3.0]);
/// # Ok::<(), dpo_ext::Error>(())
/// ```
pub fn means<T: Real>(logps: &[T], ref_logps: Option<&[T]>, scale: f64) -> Result<[T; 6]> {
    let mut columns = [const { Vec::new() }; 6];
    for ([c, r], [cr, rr]) in pairs(logps, ref_logps.unwrap_or(logps))? {
        let [up, down] = if ref_logps.is_some() { [c - cr, r - rr] } else { [c, r] };
        // Rewards as they are read one by one: accuracy compares what is rounded.
        let (chosen, rejected) = (T::nearest(scale * up).into(), T::nearest(scale * down).into());
        let above = if chosen > rejected { 1.0 } else { 0.0 };
        let values = [chosen, rejected, above, chosen - rejected, c, r];
        columns.iter_mut().zip(values).for_each(|(column, value)| column.push(value));
    }
    let pairs = (logps.len() / 2).max(1) as f64;
    Ok(columns.map(|column| T::nearest(sum(&column) / pairs)))
}

type Both = ([f64; 2], [f64; 2]);

/// Log-probs and the reference's, pair by pair.
fn pairs<'a, T: Real>(
    logps: &'a [T],
    ref_logps: &'a [T],
) -> Result<impl Iterator<Item = Both> + 'a> {
    let (pairs, half) = logps.as_chunks::<2>();
    let (ref_pairs, _) = ref_logps.as_chunks::<2>();
    if !half.is_empty() || ref_logps.len() != logps.len() {
        return Err(Error::Tensor(format!(
            "`logps` and `ref_logps` must have shape (N, 2), found {} and {} elements",
            logps.len(),
            ref_logps.len()
        )));
    }
    Ok(pairs.iter().zip(ref_pairs).map(|(p, q)| (p.map(Into::into), q.map(Into::into))))
}
