//! The texts that a template itself can write, and what it does to those of others.

use minijinja::machinery::{self, Token};

use super::jinja::syntax;

/// Filters and methods that take texts apart.
const CUTS: [&str; 18] = [
    "split",
    "rsplit",
    "splitlines",
    "partition",
    "rpartition",
    "removeprefix",
    "removesuffix",
    "replace",
    "strip",
    "lstrip",
    "rstrip",
    "first",
    "last",
    "slice",
    "batch",
    "truncate",
    "list",
    "reverse",
];
/// Those that write letters large or small.
const CASES: [&str; 5] = ["upper", "lower", "title", "capitalize", "swapcase"];
/// Those that write characters which no text of the template has.
const MAKES: [&str; 4] = ["striptags", "urlize", "xmlattr", "format"];

/// What a template can put beside the texts that it is given.
#[derive(Debug, Default)]
pub struct Literals {
    /// Its own texts, also those around the fields of a format.
    pub texts: Vec<String>,
    /// It may take a given text apart.
    pub cuts: bool,
    /// It may write the letters of a given text large or small.
    pub cases: bool,
    /// What stands in the place of something that it replaces.
    pub replacements: Vec<String>,
    /// It may write anything.
    pub makes: bool,
}

impl Literals {
    /// Those of a template.
    pub(super) fn of(source: &str) -> Self {
        let mut found = Self::default();
        let tokens: Result<Vec<Token<'_>>, _> = machinery::tokenize(source, false, syntax())
            .map(|token| token.map(|(token, _)| token))
            .collect();
        let Ok(tokens) = tokens else { return Self { makes: true, ..found } };
        for (i, token) in tokens.iter().enumerate() {
            let before = i.checked_sub(1).and_then(|before| tokens.get(before));
            if let Some(text) = text_of(token) {
                found.add(text);
            }
            match token {
                Token::Ident(name) if matches!(before, Some(Token::Dot | Token::Pipe)) => {
                    found.cuts |= CUTS.contains(name);
                    found.cases |= CASES.contains(name);
                    found.makes |= MAKES.contains(name);
                    if *name == "replace" {
                        found.replace(tokens.get(i + 1..).unwrap_or_default());
                    }
                }
                Token::BracketOpen => {
                    // A slice of a conversation takes no text apart.
                    let messages =
                        matches!(before, Some(Token::Ident(name)) if name.ends_with("messages"));
                    let is_item = matches!(
                        before,
                        Some(Token::Ident(_) | Token::BracketClose | Token::ParenClose)
                    );
                    let inside = tokens.get(i + 1..).unwrap_or_default();
                    let end = inside.iter().position(|token| matches!(token, Token::BracketClose));
                    let inside = inside.get(..end.unwrap_or(inside.len())).unwrap_or_default();
                    let is_slice = inside.iter().any(|token| matches!(token, Token::Colon));
                    let is_place =
                        matches!(inside, [Token::Int(_)] | [Token::Minus, Token::Int(_)]);
                    found.cuts |= is_item && !messages && (is_slice || is_place);
                }
                _ => {}
            }
        }
        found.texts.sort_unstable();
        found.texts.dedup();
        found
    }

    fn add(&mut self, text: &str) {
        let behind = |part: &str| part.chars().skip(1).collect::<String>();
        self.texts.extend(text.split(['{', '}']).map(str::to_owned));
        self.texts.extend(text.split('%').take(1).map(str::to_owned));
        self.texts.extend(text.split('%').skip(1).map(behind));
        self.texts.push(text.to_owned());
        self.texts.retain(|text| !text.is_empty());
    }

    /// Notes what the call of `replace` behind it puts in the place of something.
    fn replace(&mut self, call: &[Token<'_>]) {
        match call {
            [Token::ParenOpen, what, Token::Comma, by, ..] if text_of(what).is_some() => {
                match text_of(by) {
                    Some(text) => self.replacements.push(text.to_owned()),
                    None => self.makes = true,
                }
            }
            _ => self.makes = true,
        }
    }
}

fn text_of<'t>(token: &'t Token<'_>) -> Option<&'t str> {
    match token {
        Token::TemplateData(text) | Token::Str(text) => Some(text),
        Token::String(text) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stand_where_a_template_writes_them() {
        let found = Literals::of(
            "a{{ '<|%s|>' % role ~ \"{}b\".x }}{# c #}{% if x == 'd' %}\ne{% endif %}",
        );
        for text in ["a", "<|", "|>", "b", "d", "e"] {
            assert!(found.texts.iter().any(|known| known == text), "{text} in {:?}", found.texts);
        }
        assert!(!found.texts.iter().any(|text| text.contains('c')));
    }

    #[test]
    fn what_is_done_to_texts_is_seen() {
        let cases = [
            (
                "{{ messages[1:] }}{{ messages[0].content | trim }}{{ m['role'] + x }}",
                (false, false),
            ),
            ("{{ m.content[1:] }}", (true, false)),
            ("{{ m['content'][0] }}", (true, false)),
            ("{{ m.content.split('a') | last }}", (true, false)),
            ("{{ m.content | replace('~', '') }}", (true, false)),
            ("{{ m.content | replace(x, '') }}", (true, true)),
            ("{{ m.content.replace('~', x) }}", (true, true)),
            ("{{ m.content | striptags }}", (false, true)),
            ("{{ 'unclosed", (false, true)),
        ];
        for (source, want) in cases {
            let found = Literals::of(source);
            assert_eq!((found.cuts, found.makes), want, "{source}");
        }
        assert_eq!(Literals::of("{{ c.replace('[i]', '<i>') }}").replacements, ["<i>"]);
    }
}
