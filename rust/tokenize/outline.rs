//! `tokenizer.json` without its vocabulary: what a loader asks before it builds anything.

use std::borrow::Cow;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The object of a `tokenizer.json` without the `vocab` and the `merges` of its `model`, as JSON.
///
/// # Errors
/// [`Error::Tokenizer`]: not JSON, or not an object.
pub fn outline(json: &str) -> Result<String> {
    let mut reader = serde_json::Deserializer::from_str(json);
    let read = Fields { model: false }.deserialize(&mut reader);
    let whole = read.and_then(|whole| reader.end().map(|()| whole));
    let whole = whole.map_err(|e| Error::Tokenizer(format!("tokenizer.json: {e}")))?;
    Ok(Value::Object(whole).to_string())
}

/// The fields of the file, or of its `model`.
struct Fields {
    model: bool,
}

impl<'de> DeserializeSeed<'de> for Fields {
    type Value = Map<String, Value>;
    fn deserialize<D: Deserializer<'de>>(self, d: D) -> std::result::Result<Self::Value, D::Error> {
        d.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Fields {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(
        self,
        mut map: A,
    ) -> std::result::Result<Self::Value, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = map.next_key::<Cow<'de, str>>()? {
            if self.model && (name == "vocab" || name == "merges") {
                map.next_value::<IgnoredAny>()?;
            } else if !self.model && name == "model" {
                let model = map.next_value_seed(Fields { model: true })?;
                fields.insert(name.into_owned(), Value::Object(model));
            } else {
                fields.insert(name.into_owned(), map.next_value()?);
            }
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_models_vocabulary_is_left_out() {
        let json = r#"{"vocab": 1, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "x": {"vocab": 2}}}"#;
        let want = r#"{"vocab":1,"model":{"type":"BPE","x":{"vocab":2}}}"#;
        assert_eq!(outline(json).expect("an object"), want);
    }

    #[test]
    fn other_texts_are_errors() {
        for json in ["", "[]", "{", "{} {}", r#"{"model": 1}"#] {
            assert!(outline(json).is_err(), "{json}");
        }
    }
}
