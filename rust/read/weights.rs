//! Weights of tokens as rows have them: one a token beside ids, or spans of characters beside text.

use super::bad::Bad;
use super::json::Value;
use crate::error::Reason;

/// The key of a message that weighs its content.
pub const KEY: &str = "weights";

/// Characters of a text and what their tokens weigh.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Span {
    /// The first character.
    pub start: usize,
    /// The first one behind it.
    pub end: usize,
    /// The factor of its tokens.
    pub weight: f32,
}

fn bad(name: &str, message: String) -> Bad {
    Bad::new(Reason::BadWeights, name, message)
}

fn number(value: &Value<'_>) -> Option<f64> {
    match value {
        Value::Bool(flag) => Some(f64::from(u8::from(*flag))),
        Value::Int(number) => Some(*number as f64),
        Value::Float(number) => Some(*number),
        _ => None,
    }
}

fn weight(value: &Value<'_>) -> Result<f32, String> {
    let Some(number) = number(value) else {
        return Err(format!("expected a weight, found {}", value.kind()));
    };
    let weight = number as f32;
    if weight.is_finite() {
        Ok(weight)
    } else {
        Err(format!("expected a finite weight, found {number}"))
    }
}

/// A weight for each of `n` ids.
///
/// # Errors
/// A bad row for another number of them, or what is no finite number.
pub fn of_ids(value: &Value<'_>, name: &str, n: usize) -> Result<Vec<f32>, Bad> {
    let Value::List(items) = value else {
        let found = value.kind();
        return Err(bad(name, format!("expected a list of weights, one an id, found {found}")));
    };
    if items.len() != n {
        let found = items.len();
        return Err(bad(name, format!("expected {n} weights, one an id, found {found}")));
    }
    let weights = items.iter().enumerate().map(|(i, item)| {
        weight(item).map_err(|message| bad(name, format!("weight {}: {message}", i + 1)))
    });
    weights.collect()
}

/// A place in a text, which tables with weights that are not whole hold as a float.
fn place(value: &Value<'_>) -> Option<usize> {
    match value {
        Value::Int(number) => usize::try_from(*number).ok(),
        Value::Float(number) if number.fract() == 0.0 && (0.0..1e15).contains(number) => {
            Some(*number as usize)
        }
        _ => None,
    }
}

fn span(value: &Value<'_>, length: usize) -> Result<Span, String> {
    let Value::List(items) = value else {
        return Err(format!("expected [start, end, weight], found {}", value.kind()));
    };
    let [start, end, factor] = items.as_slice() else {
        return Err(format!("expected [start, end, weight], found a list of {}", items.len()));
    };
    let [Some(start), Some(end)] = [place(start), place(end)] else {
        return Err("expected whole numbers from 0 on as start and end, found others".to_owned());
    };
    if start >= end || end > length {
        let range = format!("0 <= start < end <= {length}, the characters of the text");
        return Err(format!("expected {range}, found {start} and {end}"));
    }
    Ok(Span { start, end, weight: weight(factor)? })
}

/// Spans of a text of so many characters, sorted.
///
/// # Errors
/// A bad row for what is no list of `[start, end, weight]`, or spans that overlap.
pub fn spans(value: &Value<'_>, name: &str, length: usize) -> Result<Vec<Span>, Bad> {
    let Value::List(items) = value else {
        let found = value.kind();
        return Err(bad(name, format!("expected a list of [start, end, weight], found {found}")));
    };
    let spans = items.iter().enumerate().map(|(i, item)| {
        span(item, length).map_err(|message| bad(name, format!("span {}: {message}", i + 1)))
    });
    let mut spans = spans.collect::<Result<Vec<_>, _>>()?;
    spans.sort_by_key(|span| span.start);
    for pair in spans.windows(2) {
        if let [one, other] = pair
            && one.end > other.start
        {
            let found = format!("{}..{} and {}..{}", one.start, one.end, other.start, other.end);
            return Err(bad(name, format!("expected spans that do not overlap, found {found}")));
        }
    }
    Ok(spans)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(spans: &[(i128, i128, f64)]) -> Value<'static> {
        let item = |(a, b, w): &(i128, i128, f64)| {
            Value::List(vec![Value::Int(*a), Value::Int(*b), Value::Float(*w)])
        };
        Value::List(spans.iter().map(item).collect())
    }

    #[test]
    fn spans_are_sorted_and_may_touch() {
        let found = spans(&value(&[(2, 3, 0.5), (0, 2, 0.0)]), "w", 3).unwrap();
        assert_eq!(found.iter().map(|span| span.start).collect::<Vec<_>>(), [0, 2]);
    }

    #[test]
    fn what_is_no_span_is_a_bad_row() {
        let wrong = [(0, 0, 1.0), (1, 4, 1.0), (-1, 2, 1.0), (0, 1, f64::NAN), (0, 1, 1e39)];
        for one in wrong {
            let bad = spans(&value(&[one]), "w", 3).unwrap_err();
            assert_eq!(bad.reason, Reason::BadWeights, "{one:?}");
        }
        assert!(spans(&value(&[(0, 2, 1.0), (1, 3, 1.0)]), "w", 3).is_err());
    }

    #[test]
    fn ids_have_a_weight_each() {
        let weights = Value::List(vec![Value::Bool(true), Value::Int(0), Value::Float(0.5)]);
        let found = of_ids(&weights, "w", 3).unwrap();
        assert!(found.iter().map(|w| w.to_bits()).eq([1f32, 0.0, 0.5].map(f32::to_bits)));
        assert!(of_ids(&weights, "w", 2).is_err());
        assert!(of_ids(&Value::List(vec![Value::Null]), "w", 1).is_err());
    }
}
