//! Where the prompt's ids end.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use super::factors::product;
use super::forged::is_kept;
use super::options::{Boundary, Options, SpecialText};
use super::outcome::{Pair, Refusal};
use super::text::Texts;
use crate::bpe::{Found, Inside, PairIds};
use crate::error::{Error, Reason, Result, Warning};
use crate::read::bad::Bad;
use crate::tokenize::Tokenizer;

thread_local! {
    static PAIR_IDS: RefCell<PairIds> = RefCell::default();
}

/// Encodes a prompt and two completions by the rule of the options.
pub(super) fn boundary(
    mut texts: Texts<'_>,
    tokenizer: &Tokenizer,
    options: &Options,
    pair: &mut Pair,
) -> Result<(), Refusal> {
    let endings = if texts.are_strings {
        append_eos(&mut texts, tokenizer, options)
    } else {
        Default::default()
    };
    let tails = endings.map(|ending| ending.tail);
    let mut sides = Sides { texts, tails, tokenizer, options };
    PAIR_IDS.with_borrow_mut(|ids| {
        sides.encode(ids)?;
        if sides.lacks_eos(&endings, ids, pair) {
            sides.encode(ids)?;
        }
        if sides.texts.is_suspect {
            sides.check_strings(ids)?;
        }
        match options.boundary {
            Boundary::Trl => sides.trl(ids, pair)?,
            Boundary::Joint | Boundary::Separate => sides.own(ids, pair)?,
        }
        Ok(())
    })
}

/// How a text ends.
#[derive(Clone, Copy, Default)]
struct Ending {
    /// What is to be put behind its ids.
    tail: Option<i32>,
    /// It ends with the text of EOS, and had so many bytes before that was put there.
    spelt: Option<usize>,
}

/// Gives strings EOS, as its text where that is a token, unless the surroundings bring it.
fn append_eos(texts: &mut Texts<'_>, tokenizer: &Tokenizer, options: &Options) -> [Ending; 2] {
    let (_, behind) = tokenizer.surroundings();
    let Some(eos) = tokenizer.eos().map(|id| id as i32) else { return Default::default() };
    let brought = options.boundary != Boundary::Trl && behind.last() == Some(&eos);
    let ending = Ending { tail: (!brought).then_some(eos), spelt: None };
    let cut = texts.cut;
    texts.whole.each_mut().map(|whole| {
        // TRL spells EOS even where the tokenizer then splits it.
        let as_trl = options.boundary == Boundary::Trl && options.special_text != SpecialText::Text;
        let spelt = if as_trl { tokenizer.eos_spelling() } else { tokenizer.eos_text() };
        let Some(spelt) = spelt else { return ending };
        let ends_with_eos = whole.get(cut..).is_some_and(|side| side.ends_with(spelt));
        if options.special_text == SpecialText::Text {
            if ends_with_eos {
                let end = whole.len() - spelt.len();
                match whole {
                    Cow::Borrowed(text) => *text = text.get(..end).unwrap_or_default(),
                    Cow::Owned(text) => text.truncate(end),
                }
            }
            return ending;
        }
        if brought {
            return Ending::default();
        }
        let before = whole.len();
        if !ends_with_eos {
            whole.to_mut().push_str(spelt);
        }
        Ending { tail: None, spelt: Some(before) }
    })
}

fn common_ids(a: &[i32], b: &[i32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Encodes the text that begins at the byte `start` of another one, in which control tokens stay text but where they are
/// `kept`.
fn encode_kept(
    text: &str,
    start: usize,
    kept: &[Range<usize>],
    tokenizer: &Tokenizer,
) -> Result<(Vec<i32>, Vec<u32>)> {
    let control = tokenizer.control();
    tokenizer.encode_as_text(text, &|found: &Found| is_kept(found, start, kept, control))
}

/// Both sides of a row on their way from text to ids.
struct Sides<'a> {
    texts: Texts<'a>,
    /// What comes behind the ids of each side.
    tails: [Option<i32>; 2],
    tokenizer: &'a Tokenizer,
    options: &'a Options,
}

impl Sides<'_> {
    /// Whether a text whose end spells EOS gave other ids, as it may with what stands before it. Our boundaries then
    /// put the id there, and the texts are to be encoded again; TRL's has no such rule.
    fn lacks_eos(&mut self, endings: &[Ending; 2], ids: &PairIds, pair: &mut Pair) -> bool {
        let eos = self.tokenizer.eos().map(|id| id as i32);
        let mut lacks = false;
        for (i, (ending, ids)) in endings.iter().zip([&ids.first, &ids.second]).enumerate() {
            let Some(before) = ending.spelt.filter(|_| ids.last().copied() != eos) else {
                continue;
            };
            if self.options.boundary == Boundary::Trl {
                pair.warn(Warning::EosAsText);
                continue;
            }
            self.tails[i] = eos;
            match &mut self.texts.whole[i] {
                Cow::Borrowed(text) => *text = text.get(..before).unwrap_or_default(),
                Cow::Owned(text) => text.truncate(before),
            }
            lacks = true;
        }
        lacks
    }

    /// Holds that no words of strings became a control token: by their normal form, across the border, or as a merge.
    fn check_strings(&self, ids: &PairIds) -> Result<(), Refusal> {
        let Self { tokenizer, options, .. } = self;
        let control = tokenizer.control();
        let eos = tokenizer.eos().map(|id| id as i32);
        let prompt = match options.boundary {
            Boundary::Separate => self.separate_prompt()?,
            Boundary::Joint | Boundary::Trl => Vec::new(),
        };
        let refuses = options.special_text == SpecialText::Error;
        let side = |ids: &[i32]| match ids.split_last() {
            // A text that ends with EOS, or is given it, has it there.
            Some((last, rest)) if refuses && Some(*last) == eos => control.of(rest),
            _ => control.of(ids),
        };
        let keys = &options.keys;
        let found = [
            (control.of(&prompt), &keys.prompt),
            (side(&ids.first), &keys.chosen),
            (side(&ids.second), &keys.rejected),
        ];
        let Some((_, key)) = found.iter().find(|(found, _)| !found.is_empty()) else {
            return Ok(());
        };
        let message = if refuses {
            "expected plain text, found text that becomes a control token with its prompt"
        } else {
            if self.texts.kept.is_none() {
                // The error says which engine can keep it as text.
                tokenizer.encode_as_text("", &|_| true)?;
            }
            "found a control token that cannot be kept as text: it is an ordinary merge, too"
        };
        Err(Bad::new(Reason::SpecialTokenInText, key, message).into())
    }

    /// Encodes both texts, of which `boundary="separate"` leaves the prompt away.
    fn encode(&self, ids: &mut PairIds) -> Result<()> {
        let Self { texts, tokenizer, .. } = self;
        let cut = texts.cut;
        let start = if self.options.boundary == Boundary::Separate { cut } else { 0 };
        let both = texts.whole.each_ref().map(|whole| whole.get(start..).unwrap_or_default());
        let [first, second] = both;
        let Some([kept, rejected_kept]) = &texts.kept else {
            return tokenizer.encode_pair(both, cut, ids);
        };
        let (first, first_ends) = encode_kept(first, start, kept, tokenizer)?;
        let (second, second_ends) = encode_kept(second, start, rejected_kept, tokenizer)?;
        let inside = [Inside::of(&first_ends, cut), Inside::of(&second_ends, cut)];
        *ids = PairIds { first, second, inside, reused: 0 };
        Ok(())
    }

    /// `boundary="trl"`: what the encodings of prompt and whole texts have in common.
    fn trl(&self, ids: &mut PairIds, pair: &mut Pair) -> Result<()> {
        let (before, behind) = self.surroundings();
        let around = |ids: &[i32]| [before, ids, behind].concat();
        let alone = self.texts.alone.as_deref().unwrap_or(self.texts.prompt());
        let prompt = around(&self.tokenizer.encode_plain(alone)?);
        ids.first.extend(self.tails[0]);
        ids.second.extend(self.tails[1]);
        let (first, second) = (around(&ids.first), around(&ids.second));
        let count = common_ids(&prompt, &first).min(common_ids(&prompt, &second));
        if count < prompt.len() {
            pair.warn(Warning::BoundaryMerge);
        }
        pair.prompt.extend_from_slice(prompt.get(..count).unwrap_or_default());
        pair.chosen.extend_from_slice(first.get(count..).unwrap_or_default());
        pair.rejected.extend_from_slice(second.get(count..).unwrap_or_default());
        if self.texts.factors.is_some() {
            let of_side = |i: usize, n: usize| -> Result<Vec<f32>> {
                let tail = usize::from(self.tails[i].is_some());
                let weights = self.weights(i, n - before.len() - behind.len() - tail)?;
                let around = [vec![1.0; before.len()], weights, vec![1.0; behind.len()]];
                Ok(around.concat().split_off(count))
            };
            pair.weights = Some([of_side(0, first.len())?, of_side(1, second.len())?]);
        }
        Ok(())
    }

    fn surroundings(&self) -> (&[i32], &[i32]) {
        if self.texts.are_strings { self.tokenizer.surroundings() } else { (&[], &[]) }
    }

    /// The boundaries `joint` and `separate`.
    fn own(&self, ids: &PairIds, pair: &mut Pair) -> Result<()> {
        let separate;
        let (prompt, skip) = if self.options.boundary == Boundary::Separate {
            separate = self.separate_prompt()?;
            (&separate[..], 0)
        } else {
            let count = ids.joint_prompt();
            let covered =
                if count == ids.inside[0].ids { ids.inside[0].end } else { self.end_of(count)? };
            if covered < self.texts.cut {
                pair.warn(Warning::BoundaryMerge);
            }
            (ids.first.get(..count).unwrap_or_default(), count)
        };
        let (before, behind) = self.surroundings();
        // BOS once: text that brings its own gets no second one.
        let bos = self.tokenizer.bos().map(|id| id as i32);
        let begins = prompt.first().or(ids.first.first()).copied();
        let before = match before.split_last() {
            Some((last, rest)) if Some(*last) == bos && begins == bos => {
                pair.warn(Warning::BosInText);
                rest
            }
            _ => before,
        };
        pair.prompt.extend_from_slice(before);
        pair.prompt.extend_from_slice(prompt);
        let eos = self.tokenizer.eos().map(|id| id as i32);
        let sides = [(&mut pair.chosen, &ids.first), (&mut pair.rejected, &ids.second)];
        let mut weights = [Vec::new(), Vec::new()];
        for (i, ((side, ids), tail)) in sides.into_iter().zip(self.tails).enumerate() {
            let rest = ids.get(skip..).unwrap_or_default();
            // EOS once: the surroundings' own is not put behind one that the text spells.
            let behind = match behind.split_first() {
                Some((first, others)) if Some(*first) == eos && rest.last() == Some(first) => {
                    others
                }
                _ => behind,
            };
            side.extend_from_slice(rest);
            side.extend(tail);
            side.extend_from_slice(behind);
            if self.texts.factors.is_some() {
                weights[i] = self.weights(i, ids.len())?.split_off(skip);
                weights[i].resize(side.len(), 1.0);
            }
        }
        pair.weights = self.texts.factors.is_some().then_some(weights);
        Ok(())
    }

    /// What the `n` ids of text `i` weigh, and its tail.
    fn weights(&self, i: usize, n: usize) -> Result<Vec<f32>> {
        let text = &self.texts.whole[i];
        let start = if self.options.boundary == Boundary::Separate { self.texts.cut } else { 0 };
        let covered = self.covered(i, text.get(start..).unwrap_or_default(), start)?;
        if covered.len() != n {
            let message = format!("{n} ids, and the places of {}", covered.len());
            return Err(Error::Internal(message));
        }
        let factors = self.texts.factors.as_ref().map_or(&[][..], |factors| &factors[i]);
        let in_whole = covered.into_iter().map(|bytes| start + bytes.start..start + bytes.end);
        // A tail stands where the text spelt it.
        let tail = self.tails[i].map(|_| text.len()..text.len() + 1);
        Ok(in_whole.chain(tail).map(|bytes| product(factors, &bytes)).collect())
    }

    /// The bytes that each id of `text` covers; it is text `i` from the byte `start` on.
    fn covered(&self, i: usize, text: &str, start: usize) -> Result<Vec<Range<usize>>> {
        let Some(kept) = &self.texts.kept else { return self.tokenizer.covered(text) };
        let (ids, ends) = encode_kept(text, start, &kept[i], self.tokenizer)?;
        self.tokenizer.aligned(text, &ids, &ends)
    }

    /// The ids of the prompt alone.
    fn separate_prompt(&self) -> Result<Vec<i32>> {
        let Self { texts, tokenizer, .. } = self;
        match &texts.kept {
            Some([kept, _]) => Ok(encode_kept(texts.prompt(), 0, kept, tokenizer)?.0),
            None => tokenizer.encode_plain(texts.prompt()),
        }
    }

    /// Where the first `count` ids of the first text end.
    fn end_of(&self, count: usize) -> Result<usize> {
        let Self { texts, tokenizer, .. } = self;
        let text = &texts.whole[0];
        let Some([kept, _]) = &texts.kept else { return tokenizer.end_of(text, count) };
        let ends = encode_kept(text, 0, kept, tokenizer)?.1;
        Ok(count.checked_sub(1).and_then(|i| ends.get(i)).map_or(0, |end| *end as usize))
    }
}
