//! What a split's regex means, whichever way it is spelt.
//!
//! Two regexes with equal patterns match the same, because every step from the text to the pattern keeps what it
//! matches; the reverse is not promised, and what is not understood has no pattern. Read as the linked regex engine reads
//! it (Oniguruma, Ruby's syntax): first alternative first, `(?i:` with Unicode's folding.

use std::collections::BTreeSet;
use std::iter::Peekable;
use std::str::Chars;

#[cfg(test)]
mod tests;

/// No limit of a repetition.
const MANY: u32 = u32::MAX;
/// Alternatives of fixed text are spelt out up to so many.
const MAX_WORDS: usize = 64;

/// A regex by its meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern(Vec<Vec<Node>>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    /// One character.
    Set(Set),
    /// One of these texts, of which none begins another: their order does not matter.
    Words(BTreeSet<String>),
    Repeat {
        node: Box<Node>,
        least: u32,
        most: u32,
        possessive: bool,
    },
    Choice(Vec<Vec<Node>>),
    /// `(?!`.
    Unless(Vec<Vec<Node>>),
}

/// Characters: those of the ranges and of the classes, or all others.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Set {
    negated: bool,
    ranges: BTreeSet<(char, char)>,
    classes: BTreeSet<Class>,
}

/// A class by its name, such as `L` or `\s`, or what is not in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Class {
    name: String,
    negated: bool,
}

impl Pattern {
    /// The pattern of a regex, if everything in it is understood.
    pub(super) fn parse(regex: &str) -> Option<Self> {
        let mut parser = Parser { rest: regex.chars().peekable() };
        let alternatives = parser.choice(false)?;
        parser.rest.next().is_none().then_some(())?;
        let mut alternatives = joined(alternatives)?;
        for nodes in &mut alternatives {
            simplify_whole(nodes);
        }
        Some(Self(alternatives))
    }
}

struct Parser<'a> {
    rest: Peekable<Chars<'a>>,
}

impl Parser<'_> {
    fn take(&mut self, wanted: char) -> bool {
        self.rest.next_if_eq(&wanted).is_some()
    }

    fn choice(&mut self, fold: bool) -> Option<Vec<Vec<Node>>> {
        let mut alternatives = vec![self.sequence(fold)?];
        while self.take('|') {
            alternatives.push(self.sequence(fold)?);
        }
        Some(alternatives)
    }

    fn sequence(&mut self, fold: bool) -> Option<Vec<Node>> {
        let mut nodes = Vec::new();
        while let Some(&c) = self.rest.peek() {
            if c == '|' || c == ')' {
                break;
            }
            let atom = self.atom(fold)?;
            let node = self.repeated(atom)?;
            match node {
                Node::Choice(mut only) if only.len() == 1 => nodes.append(only.first_mut()?),
                node => nodes.push(node),
            }
        }
        (!nodes.is_empty()).then_some(nodes)
    }

    fn atom(&mut self, fold: bool) -> Option<Node> {
        match self.rest.next()? {
            '(' => self.group(fold),
            '[' => self.set(fold).map(Node::Set),
            '\\' => {
                let set = self.escape()?;
                (!fold || set.classes.is_empty()).then_some(())?;
                Some(Node::Set(folded(set, fold)?))
            }
            '.' | '^' | '$' | '*' | '+' | '?' | '{' | '}' | ']' => None,
            c => Some(Node::Set(folded(Set::of(c), fold)?)),
        }
    }

    fn group(&mut self, fold: bool) -> Option<Node> {
        let (mut fold, mut unless) = (fold, false);
        if self.take('?') {
            match self.rest.next()? {
                ':' => {}
                '!' => unless = true,
                'i' => {
                    self.take(':').then_some(())?;
                    fold = true;
                }
                _ => return None,
            }
        }
        let alternatives = joined(self.choice(fold)?)?;
        self.take(')').then_some(())?;
        if unless {
            return Some(Node::Unless(alternatives));
        }
        if fold {
            // What folding does beside single letters: `ss` is a sharp s, and so on.
            let words = words(&Node::Choice(alternatives))?;
            let is_pair = |word: &String| {
                let word = word.to_ascii_lowercase();
                ["ss", "st", "ff", "fi", "fl"].iter().any(|pair| word.contains(pair))
            };
            (!words.iter().any(is_pair)).then_some(())?;
            return Some(Node::Words(words));
        }
        match alternatives.as_slice() {
            [nodes] if nodes.len() == 1 => nodes.first().cloned(),
            _ => Some(Node::Choice(alternatives)),
        }
    }

    fn repeated(&mut self, atom: Node) -> Option<Node> {
        let (least, most, symbol) = match self.rest.peek() {
            Some('?') => (0, 1, true),
            Some('*') => (0, MANY, true),
            Some('+') => (1, MANY, true),
            Some('{') => {
                let (least, most) = self.bounds()?;
                (least, most, false)
            }
            _ => return Some(atom),
        };
        if symbol {
            self.rest.next();
        }
        let possessive = symbol && self.take('+');
        // Lazy, or a repetition of a repetition.
        if matches!(self.rest.peek(), Some('?' | '*' | '+' | '{')) {
            return None;
        }
        if (least, most) == (1, 1) {
            return Some(atom);
        }
        Some(Node::Repeat { node: Box::new(atom), least, most, possessive })
    }

    fn bounds(&mut self) -> Option<(u32, u32)> {
        self.take('{').then_some(())?;
        let least = self.number(10, 4)?;
        let most = match self.rest.next()? {
            '}' => return Some((least, least)),
            ',' if self.take('}') => return Some((least, MANY)),
            ',' => self.number(10, 4)?,
            _ => return None,
        };
        (self.take('}') && least <= most).then_some((least, most))
    }

    fn number(&mut self, radix: u32, most_digits: usize) -> Option<u32> {
        let mut digits = String::new();
        while let Some(digit) = self.rest.next_if(|c| c.is_digit(radix)) {
            digits.push(digit);
        }
        (digits.len() <= most_digits).then_some(())?;
        u32::from_str_radix(&digits, radix).ok()
    }

    /// What follows a backslash, inside a set or outside.
    fn escape(&mut self) -> Option<Set> {
        let c = self.rest.next()?;
        match c {
            'n' => Some(Set::of('\n')),
            'r' => Some(Set::of('\r')),
            't' => Some(Set::of('\t')),
            's' | 'd' | 'w' => Some(Set::class(c.to_string(), false)),
            'S' | 'D' | 'W' => Some(Set::class(c.to_ascii_lowercase().to_string(), true)),
            'p' | 'P' => {
                self.take('{').then_some(())?;
                let circumflex = self.take('^');
                let mut name = String::new();
                loop {
                    match self.rest.next()? {
                        '}' => break,
                        ' ' | '_' | '-' => {}
                        c => name.push(c.to_ascii_lowercase()),
                    }
                }
                Some(Set::class(general_category(&name)?, circumflex != (c == 'P')))
            }
            'u' => {
                let digits: String = self.rest.by_ref().take(4).collect();
                (digits.len() == 4).then_some(())?;
                char::from_u32(u32::from_str_radix(&digits, 16).ok()?).map(Set::of)
            }
            'x' => {
                self.take('{').then_some(())?;
                let code = self.number(16, 6)?;
                self.take('}').then_some(())?;
                char::from_u32(code).map(Set::of)
            }
            c if c.is_ascii_punctuation() || c == ' ' => Some(Set::of(c)),
            _ => None,
        }
    }

    /// What follows an opening bracket.
    fn set(&mut self, fold: bool) -> Option<Set> {
        let mut set = Set { negated: self.take('^'), ..Set::default() };
        let mut is_first = true;
        loop {
            let c = self.rest.next()?;
            let item = match c {
                ']' if !is_first => break,
                // Sets in sets, intersections, and what only looks like a range.
                '[' | ']' => return None,
                '&' if self.rest.peek() == Some(&'&') => return None,
                '-' if !is_first && self.rest.peek() != Some(&']') => return None,
                '\\' => self.escape()?,
                c => Set::of(c),
            };
            is_first = false;
            let single = item.single();
            if single.is_some() && c != '-' && self.rest.peek() == Some(&'-') {
                let mut ahead = self.rest.clone();
                ahead.next();
                if ahead.peek() != Some(&']') {
                    self.rest.next();
                    let last = match self.rest.next()? {
                        '[' => return None,
                        '\\' => self.escape()?.single()?,
                        c => c,
                    };
                    let first = single?;
                    (first <= last).then_some(())?;
                    set.ranges.insert((first, last));
                    continue;
                }
            }
            set.ranges.extend(item.ranges);
            let negated = item.negated;
            set.classes.extend(item.classes.into_iter().map(|class| Class { negated, ..class }));
        }
        if fold && (set.negated || !set.classes.is_empty()) {
            return None;
        }
        folded(set.joined(), fold)
    }
}

/// The name of a general category, whichever way it is spelt; what is no such category is not understood.
fn general_category(name: &str) -> Option<String> {
    let short = match name {
        "letter" => "l",
        "mark" | "combiningmark" => "m",
        "number" => "n",
        "punctuation" | "punct" => "p",
        "symbol" => "s",
        "uppercaseletter" => "lu",
        "lowercaseletter" => "ll",
        "titlecaseletter" => "lt",
        "modifierletter" => "lm",
        "otherletter" => "lo",
        name if name.len() <= 2 && "lmnpszc".contains(name.get(..1)?) => name,
        _ => return None,
    };
    Some(short.to_ascii_uppercase())
}

impl Set {
    fn of(c: char) -> Self {
        Self { ranges: BTreeSet::from([(c, c)]), ..Self::default() }
    }

    fn class(name: String, negated: bool) -> Self {
        Self { classes: BTreeSet::from([Class { name, negated }]), ..Self::default() }.joined()
    }

    fn single(&self) -> Option<char> {
        let &(first, last) = self.ranges.first()?;
        let is_single = !self.negated && self.ranges.len() == 1 && self.classes.is_empty();
        (is_single && first == last).then_some(first)
    }

    /// Ranges that touch or overlap as one; a class alone without its own negation.
    fn joined(mut self) -> Self {
        let mut ranges: Vec<(char, char)> = Vec::new();
        for (first, last) in std::mem::take(&mut self.ranges) {
            match ranges.last_mut() {
                Some((_, end)) if first as u32 <= *end as u32 + 1 => *end = last.max(*end),
                _ => ranges.push((first, last)),
            }
        }
        self.ranges = ranges.into_iter().collect();
        if self.ranges.is_empty() && self.classes.len() == 1 {
            let negated = self.negated;
            self.classes = std::mem::take(&mut self.classes)
                .into_iter()
                .map(|class| {
                    self.negated = negated != class.negated;
                    Class { negated: false, ..class }
                })
                .collect();
        }
        self
    }

    /// The characters, if they are few and not classes.
    fn chars(&self) -> Option<Vec<char>> {
        (!self.negated && self.classes.is_empty()).then_some(())?;
        let chars = self.ranges.iter().flat_map(|&(first, last)| first..=last);
        let chars: Vec<char> = chars.take(MAX_WORDS + 1).collect();
        (chars.len() <= MAX_WORDS).then_some(chars)
    }

    /// Whether no character is surely in both.
    fn is_apart_from(&self, other: &Self) -> bool {
        let excludes = |negated: &Self, plain: &Self| {
            negated.negated
                && !plain.negated
                && plain.classes.is_subset(&negated.classes)
                && plain.ranges.is_subset(&negated.ranges)
        };
        excludes(self, other) || excludes(other, self)
    }

    /// Whether every character is surely white space.
    fn is_white(&self) -> bool {
        let white = |c: char| matches!(c, '\t'..='\r' | ' ');
        self.chars().is_some_and(|chars| chars.into_iter().all(white))
    }

    /// `\s`.
    fn is_all_white(&self) -> bool {
        *self == Self::class("s".to_owned(), false)
    }
}

/// With what folding adds to ASCII letters; other characters are not understood there.
fn folded(mut set: Set, fold: bool) -> Option<Set> {
    if fold {
        for c in set.chars()? {
            c.is_ascii().then_some(())?;
            for other in [c.to_ascii_lowercase(), c.to_ascii_uppercase()] {
                set.ranges.insert((other, other));
            }
            match c.to_ascii_lowercase() {
                's' => set.ranges.insert(('\u{17f}', '\u{17f}')),
                'k' => set.ranges.insert(('\u{212a}', '\u{212a}')),
                _ => true,
            };
        }
    }
    Some(set.joined())
}

/// The texts that a node matches, if it is fixed text.
fn words(node: &Node) -> Option<BTreeSet<String>> {
    match node {
        Node::Set(set) => Some(set.chars()?.into_iter().map(String::from).collect()),
        Node::Words(words) => Some(words.clone()),
        Node::Choice(alternatives) => {
            let mut all = BTreeSet::new();
            for nodes in alternatives {
                all.append(&mut words_in(nodes)?);
            }
            is_prefix_free(&all).then_some(all)
        }
        Node::Repeat { .. } | Node::Unless(_) => None,
    }
}

fn words_in(nodes: &[Node]) -> Option<BTreeSet<String>> {
    let mut all = BTreeSet::from([String::new()]);
    for node in nodes {
        let next = words(node)?;
        all = all.iter().flat_map(|a| next.iter().map(move |b| format!("{a}{b}"))).collect();
        (all.len() <= MAX_WORDS).then_some(())?;
    }
    is_prefix_free(&all).then_some(all)
}

/// In their order a text stands right before those that it begins.
fn is_prefix_free(words: &BTreeSet<String>) -> bool {
    words.iter().zip(words.iter().skip(1)).all(|(a, b)| !b.starts_with(a.as_str()))
}

/// Alternatives with groups that are whole alternatives taken apart, and with neighbours of fixed text as one.
fn joined(alternatives: Vec<Vec<Node>>) -> Option<Vec<Vec<Node>>> {
    let mut flat = Vec::new();
    for mut nodes in alternatives {
        match nodes.pop()? {
            Node::Choice(inner) if nodes.is_empty() => flat.extend(inner),
            last => {
                nodes.push(last);
                flat.push(nodes);
            }
        }
    }
    let mut out: Vec<Vec<Node>> = Vec::new();
    for nodes in flat {
        let Some(mut these) = words_in(&nodes) else {
            out.push(nodes);
            continue;
        };
        if let Some([Node::Words(before)]) = out.last_mut().map(Vec::as_mut_slice) {
            these.extend(before.iter().cloned());
            if is_prefix_free(&these) {
                *before = these;
                continue;
            }
            return None;
        }
        out.push(vec![Node::Words(these)]);
    }
    Some(out)
}

/// A whole alternative, behind which nothing more must match.
fn simplify_whole(nodes: &mut [Node]) {
    for i in (0..nodes.len()).rev() {
        let (before, rest) = nodes.split_at_mut(i + 1);
        if let Some(Node::Repeat { node, possessive, .. }) = before.last_mut()
            && *possessive
        {
            // Nothing is ever given back: all that follows may be empty, or cannot begin with what is given back.
            let optional = |node: &Node| matches!(node, Node::Repeat { least: 0, .. });
            let apart = match (&**node, rest.first()) {
                (Node::Set(set), Some(Node::Set(next))) => set.is_apart_from(next),
                (Node::Set(set), Some(Node::Repeat { node, least: 1.., .. })) => {
                    matches!(&**node, Node::Set(next) if set.is_apart_from(next))
                }
                _ => false,
            };
            *possessive = !(apart || rest.iter().all(optional));
        }
    }
    // `\s*[\r\n]+`: the first part gives back up to the last line end, so that the second one finds it alone.
    if let [.., Node::Repeat { node: all, least: 0, most: MANY, possessive: false }, last] = nodes
        && matches!(&**all, Node::Set(set) if set.is_all_white())
        && let Node::Repeat { node, least: 1, possessive: false, .. } = last
        && matches!(&**node, Node::Set(set) if set.is_white())
    {
        *last = (**node).clone();
    }
}
