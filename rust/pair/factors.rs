//! What the tokens of a text weigh, by the bytes that they cover.

use std::ops::Range;

use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::weights::{Span, spans};

/// Factors of stretches of a text, and of all else in it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Factors {
    /// Bytes and their factor, sorted; none overlap.
    inside: Vec<(Range<usize>, f32)>,
    outside: f32,
}

impl Factors {
    /// 1 in some stretches and 0 elsewhere.
    pub(super) fn only(stretches: Vec<Range<usize>>) -> Self {
        Self { inside: stretches.into_iter().map(|bytes| (bytes, 1.0)).collect(), outside: 0.0 }
    }

    /// Those of sorted stretches, and 1 elsewhere.
    pub(super) fn of(inside: Vec<(Range<usize>, f32)>) -> Self {
        Self { inside, outside: 1.0 }
    }

    /// The factor of a token that covers `bytes`: that of the first stretch it touches.
    pub(super) fn at(&self, bytes: &Range<usize>) -> f32 {
        let first = self.inside.partition_point(|(inside, _)| inside.end <= bytes.start);
        match self.inside.get(first) {
            Some((inside, factor)) if inside.start < bytes.end => *factor,
            _ => self.outside,
        }
    }
}

/// The factor of a token that covers `bytes`, by all of several.
pub(super) fn product(factors: &[Factors], bytes: &Range<usize>) -> f32 {
    factors.iter().map(|factors| factors.at(bytes)).product()
}

/// The bytes of a text at which its characters begin, and its end.
pub(super) fn starts(text: &str) -> Vec<usize> {
    text.char_indices().map(|(at, _)| at).chain([text.len()]).collect()
}

/// The spans that a field gives for `text`, in bytes.
pub(super) fn in_bytes(
    value: &Value<'_>,
    name: &str,
    text: &str,
) -> Result<Vec<(Range<usize>, f32)>, Bad> {
    let starts = starts(text);
    let byte = |character: usize| starts.get(character).copied().unwrap_or(text.len());
    let spans = spans(value, name, starts.len() - 1)?;
    let bytes = |Span { start, end, weight }| (byte(start)..byte(end), weight);
    Ok(spans.into_iter().map(bytes).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_the_factor_of_the_first_stretch_it_touches() {
        let factors = Factors::of(vec![(2..4, 0.5), (4..6, 0.25)]);
        let found = [0..2, 0..3, 3..4, 3..5, 4..5, 5..9, 6..7].map(|bytes| factors.at(&bytes));
        let wanted = [1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 1.0];
        assert_eq!(found.map(f32::to_bits), wanted.map(f32::to_bits));
        let only = Factors::only(vec![2..4, 5..6]);
        let found = [0..2, 1..3, 4..5, 5..7].map(|bytes| only.at(&bytes) > 0.0);
        assert_eq!(found, [false, true, false, true]);
    }
}
