//! Added tokens in a text: leftmost, then longest, like the `tokenizers` crate.

use memchr::memmem::Finder;

/// One token as tokenizer.json lists it.
#[derive(Debug, Clone)]
pub(crate) struct AddedToken {
    pub(crate) content: String,
    pub(crate) id: i32,
    /// Skipped (left as text) when the caller asks for text.
    pub(crate) special: bool,
}

/// Where a token stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Match {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) id: i32,
    pub(crate) special: bool,
}

#[derive(Debug, Default)]
struct Node {
    /// Sorted by byte.
    children: Vec<(u8, u32)>,
    token: Option<(i32, bool)>,
}

/// Places where a match can start, found without looking at every byte where that is possible.
#[derive(Debug)]
enum Start {
    /// The tokens of each first byte have a common beginning; there are few such groups.
    Prefixes(Vec<Finder<'static>>),
    /// Any of these first bytes.
    Bytes(Box<[bool; 256]>),
}

/// A set of tokens to find.
///
/// Same as trying at every place every token, longest first.
#[derive(Debug)]
pub(crate) struct AddedTokens {
    nodes: Vec<Node>,
    start: Start,
    longest: usize,
}

impl AddedTokens {
    pub(crate) fn new(tokens: &[AddedToken]) -> Self {
        let mut nodes = vec![Node::default()];
        for token in tokens {
            let mut at = 0;
            for byte in token.content.bytes() {
                at = match nodes[at].children.binary_search_by_key(&byte, |c| c.0) {
                    Ok(i) => nodes[at].children[i].1 as usize,
                    Err(i) => {
                        let new = nodes.len();
                        nodes[at].children.insert(i, (byte, new as u32));
                        nodes.push(Node::default());
                        new
                    }
                };
            }
            nodes[at].token = Some((token.id, token.special));
        }
        let prefixes: Vec<Vec<u8>> = nodes[0]
            .children
            .iter()
            .map(|&(byte, mut at)| {
                let mut prefix = vec![byte];
                while let Node { children, token: None } = &nodes[at as usize]
                    && let [(byte, next)] = children[..]
                {
                    prefix.push(byte);
                    at = next;
                }
                prefix
            })
            .collect();
        let start = if prefixes.len() <= 4 {
            Start::Prefixes(prefixes.iter().map(|p| Finder::new(p).into_owned()).collect())
        } else {
            let mut first = Box::new([false; 256]);
            for prefix in &prefixes {
                first[prefix[0] as usize] = true;
            }
            Start::Bytes(first)
        };
        let longest = tokens.iter().map(|t| t.content.len()).max().unwrap_or(0);
        Self { nodes, start, longest }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.longest == 0
    }

    /// Bytes of the longest token.
    pub(crate) fn longest(&self) -> usize {
        self.longest
    }

    /// The matches of `text` from the left, none overlapping.
    pub(crate) fn matches<'a>(&'a self, text: &'a [u8]) -> Matches<'a> {
        let groups = match &self.start {
            Start::Prefixes(prefixes) => prefixes.len(),
            Start::Bytes(_) => 0,
        };
        Matches { tokens: self, text, at: 0, found: [0; 4], groups }
    }

    /// The longest token that starts at `at`.
    fn longest_at(&self, text: &[u8], at: usize) -> Option<Match> {
        let (mut node, mut best) = (0usize, None);
        for (i, byte) in text.iter().enumerate().skip(at) {
            let children = &self.nodes[node].children;
            let Ok(child) = children.binary_search_by_key(byte, |c| c.0) else { break };
            node = children[child].1 as usize;
            if let Some((id, special)) = self.nodes[node].token {
                best = Some(Match { start: at, end: i + 1, id, special });
            }
        }
        best
    }
}

/// Iterator of [`AddedTokens::matches`].
#[derive(Debug)]
pub(crate) struct Matches<'a> {
    tokens: &'a AddedTokens,
    text: &'a [u8],
    at: usize,
    /// Where each prefix was last found at or after `at`; behind `at` it must be sought again.
    found: [usize; 4],
    groups: usize,
}

impl Matches<'_> {
    fn candidate(&mut self, fresh: &mut bool) -> Option<usize> {
        match &self.tokens.start {
            Start::Prefixes(prefixes) => {
                for (found, prefix) in self.found[..self.groups].iter_mut().zip(prefixes) {
                    if *fresh || *found < self.at {
                        let rest = self.text.get(self.at..)?;
                        *found = prefix.find(rest).map_or(usize::MAX, |i| self.at + i);
                    }
                }
                *fresh = false;
                self.found[..self.groups].iter().copied().min().filter(|&i| i != usize::MAX)
            }
            Start::Bytes(first) => {
                let rest = self.text.get(self.at..)?;
                rest.iter().position(|&b| first[b as usize]).map(|i| self.at + i)
            }
        }
    }
}

impl Iterator for Matches<'_> {
    type Item = Match;

    fn next(&mut self) -> Option<Match> {
        let mut fresh = self.at == 0;
        loop {
            let at = self.candidate(&mut fresh)?;
            if let Some(found) = self.tokens.longest_at(self.text, at) {
                self.at = found.end;
                return Some(found);
            }
            self.at = at + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn naive(tokens: &[AddedToken], text: &str) -> Vec<(usize, usize, i32)> {
        let (mut at, mut out) = (0, Vec::new());
        while at < text.len() {
            let here =
                tokens.iter().filter(|t| text.as_bytes()[at..].starts_with(t.content.as_bytes()));
            match here.max_by_key(|t| t.content.len()) {
                Some(token) => {
                    out.push((at, at + token.content.len(), token.id));
                    at += token.content.len();
                }
                None => at += 1,
            }
        }
        out
    }

    proptest! {
        #[test]
        fn equals_trying_every_token_everywhere(
            contents in proptest::collection::hash_set("[ab<|é]{1,5}", 1..12),
            text in "[ab<|éx]{0,60}",
        ) {
            let tokens: Vec<AddedToken> = contents
                .into_iter()
                .enumerate()
                .map(|(i, content)| AddedToken { content, id: i as i32, special: false })
                .collect();
            let set = AddedTokens::new(&tokens);
            let found: Vec<_> = set.matches(text.as_bytes()).map(|m| (m.start, m.end, m.id)).collect();
            prop_assert_eq!(found, naive(&tokens, &text));
        }
    }
}
