//! Which turns are the prompt of both sides.

use std::cell::OnceCell;

use super::options::{Boundary, Options};
use super::outcome::{Pair, Refusal};
use super::render::Renderer;
use crate::error::{Reason, Warning};
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::said::Turns;
use crate::read::turns::is_asked;
use crate::template::strip;

/// Ends of questions, from the last, that are compared where two sides have not the same turns.
const MOST_ENDS: usize = 16;

/// A prompt and two sides.
pub(super) struct Parts<'a> {
    pub(super) prompt: Vec<Value<'a>>,
    pub(super) chosen: Vec<Value<'a>>,
    pub(super) rejected: Vec<Value<'a>>,
    /// Turns of the prompt that its own field has; the others stood in the sides.
    pub(super) own: usize,
    /// Turns of the sides that were the prompt's once more.
    pub(super) twice: usize,
    /// The conversation of a side as the row has it, if some of its turns are spelt otherwise in the prompt.
    pub(super) spelt: [Option<Vec<Value<'a>>>; 2],
}

/// Finds the turns that both sides share, by what the template prints of them.
pub(super) fn parted<'a>(
    turns: Turns<'a>,
    renderer: &Renderer<'_>,
    options: &Options,
    pair: &mut Pair,
) -> Result<Parts<'a>, Refusal> {
    let Turns { prompt, said, chosen, rejected, fields } = turns;
    let names = fields.map(|field| options.keys.name(field));
    let is_implicit = prompt.is_none();
    let prompt = prompt.unwrap_or_default();
    let spelt = [None, None];
    let mut parts = Parts { own: prompt.len(), twice: 0, spelt, prompt, chosen, rejected };
    if is_implicit {
        let shared = shared(&parts, renderer);
        parts.take(shared);
    } else {
        let twice = parts.prompt_in_sides(renderer);
        let holds = twice == 0 && parts.sides_hold_prompt(renderer);
        if twice > 0 || holds {
            pair.warn(Warning::PromptInSides);
        }
        // TRL trains on what stands there twice.
        if options.boundary != Boundary::Trl {
            let mut most = parts.chosen.iter().take_while(|turn| is_asked(turn)).count();
            if twice > 0 || holds {
                // The sides are whole conversations, also behind their first answer.
                most = usize::MAX;
                parts.leave(twice);
            }
            if holds {
                (parts.own, parts.prompt) = (0, Vec::new());
            }
            if most > 0 {
                let shared = shared(&parts, renderer).min(most);
                parts.take(shared);
            }
        }
    }
    let is_split = |parts: &Parts<'_>| {
        let first = [parts.chosen.first(), parts.rejected.first()];
        first.into_iter().flatten().any(is_asked) && parts.chosen != parts.rejected
    };
    if is_implicit && is_split(&parts) {
        parts.take_alike(renderer);
    }
    let first = [parts.chosen.first(), parts.rejected.first()];
    let asks = first.into_iter().flatten().any(is_asked);
    if asks && parts.chosen != parts.rejected && (is_implicit || options.boundary != Boundary::Trl)
    {
        let same = matches!(first, [Some(a), Some(b)] if a.same(b));
        if same && parts.chosen.len().min(parts.rejected.len()) == 1 {
            let short = usize::from(parts.chosen.len() > parts.rejected.len());
            let message = "expected an answer behind the prompt, found none";
            return Err(Bad::new(Reason::EmptyCompletion, names[1 + short], message).into());
        }
        let turn = parts.prompt.len() + 1;
        let message = format!(
            "expected the same prompt on both sides, found different turns at message {turn}\nhint: \
             DPO compares answers to one prompt; where the prompts differ Z(x) does not cancel"
        );
        return Err(Bad::new(Reason::DifferentPrompts, names[2], message).into());
    }
    if let Some(said) = said {
        let has =
            |turn: &Value<'_>| turn.get("content").is_some_and(|content| contains(content, &said));
        if !parts.prompt.iter().any(has) {
            let message = "expected the text of a turn that both sides share, found it in none of them\nhint: \
                 ignore_columns=(\"prompt\",) takes a field away that is no prompt";
            return Err(Bad::new(Reason::DifferentPrompts, names[0], message).into());
        }
    }
    Ok(parts)
}

/// A turn, and what the template prints of it alone, which is rendered once.
struct Single<'v> {
    turn: &'v Value<'v>,
    printed: OnceCell<Option<String>>,
}

impl<'v> Single<'v> {
    fn all(turns: &'v [Value<'v>]) -> Vec<Self> {
        turns.iter().map(|turn| Self { turn, printed: OnceCell::new() }).collect()
    }

    fn printed(&self, renderer: &Renderer<'_>) -> Option<&String> {
        self.printed.get_or_init(|| renderer.try_render(&[self.turn])).as_ref()
    }

    /// Whether two turns say the same, or are printed alike by themselves.
    fn is_like(&self, other: &Single<'_>, renderer: &Renderer<'_>) -> bool {
        self.turn.role() == other.turn.role()
            && (self.turn.same(other.turn)
                || self.printed(renderer).is_some_and(|text| Some(text) == other.printed(renderer)))
    }
}

/// Whether a content, or a part of it, contains a text.
fn contains(content: &Value<'_>, text: &str) -> bool {
    match content {
        Value::Str(content) => content.contains(strip(text)),
        Value::List(parts) => {
            parts.iter().any(|part| contains(part.get("text").unwrap_or(part), text))
        }
        _ => false,
    }
}

impl Parts<'_> {
    /// Makes the first turns of the sides the prompt's last.
    fn take(&mut self, shared: usize) {
        self.take_both(shared, shared);
    }

    /// Makes the first turns of the chosen side the prompt's last, and leaves those of the other out.
    fn take_both(&mut self, mine: usize, theirs: usize) {
        if self.chosen.get(..mine) != self.rejected.get(..theirs) {
            let turns = self.spelt[1].take();
            let own = || self.prompt.iter().chain(&self.rejected).cloned().collect();
            self.spelt[1] = turns.or_else(|| Some(own()));
        }
        self.rejected.drain(..theirs);
        self.prompt.extend(self.chosen.drain(..mine));
    }

    /// Leaves the first turns of the sides out, which are the prompt's last.
    fn leave(&mut self, twice: usize) {
        let (before, last) = self.prompt.split_at(self.prompt.len() - twice);
        for (side, spelt) in [&mut self.chosen, &mut self.rejected].into_iter().zip(&mut self.spelt)
        {
            if side.get(..twice) != Some(last) {
                *spelt = Some(before.iter().chain(side.iter()).cloned().collect());
            }
            side.drain(..twice);
        }
        self.twice = twice;
    }

    /// Whether the sides begin alike with turns of which one is a question of the prompt, and have all its turns.
    fn sides_hold_prompt(&self, renderer: &Renderer<'_>) -> bool {
        let begins = self.chosen.first().is_some_and(is_asked);
        if !begins || self.prompt.iter().all(|turn| turn.role() != Some("user")) {
            return false;
        }
        let alone = Parts {
            prompt: Vec::new(),
            chosen: self.chosen.clone(),
            rejected: self.rejected.clone(),
            own: 0,
            twice: 0,
            spelt: [None, None],
        };
        let shared = shared(&alone, renderer);
        let [prompt, chosen, rejected] =
            [&self.prompt, &self.chosen, &self.rejected].map(|turns| Single::all(turns));
        let is_in = |turn: &Single<'_>, side: &[Single<'_>]| {
            side.iter().any(|other| turn.is_like(other, renderer))
        };
        let begin = chosen.get(..shared).unwrap_or_default();
        prompt.iter().any(|single| single.turn.role() == Some("user") && is_in(single, begin))
            && prompt.iter().all(|turn| is_in(turn, &chosen) || is_in(turn, &rejected))
    }

    /// Makes the first turns of one side the prompt's last where those of the other print the same, be they more or
    /// fewer: a template may write by itself the turn with which one side begins.
    fn take_alike(&mut self, renderer: &Renderer<'_>) {
        let ends = |side: &[Value<'_>]| -> Vec<(usize, Option<String>)> {
            let is_end = |i: &usize| {
                let [before, behind] = [i - 1, *i].map(|at| side.get(at).is_some_and(is_asked));
                before && !behind
            };
            let text = |i: usize| {
                let turns = self.prompt.iter().chain(side.iter().take(i)).collect::<Vec<_>>();
                (i, renderer.try_render(&turns))
            };
            (1..side.len()).rev().filter(is_end).take(MOST_ENDS).map(text).collect()
        };
        let (mine, theirs) = (ends(&self.chosen), ends(&self.rejected));
        let alike = mine.iter().find_map(|(i, text)| {
            let (j, _) = theirs.iter().find(|(_, other)| text.is_some() && text == other)?;
            Some((*i, *j))
        });
        let Some((i, j)) = alike else { return };
        // Behind them the other side must read as it did.
        let own = self.prompt.iter().chain(&self.rejected).collect::<Vec<_>>();
        let begin = self.prompt.iter().chain(self.chosen.iter().take(i));
        let other = begin.chain(self.rejected.iter().skip(j)).collect::<Vec<_>>();
        if renderer.try_render(&own) == renderer.try_render(&other) {
            self.take_both(i, j);
        }
    }

    /// How many of the first turns of both sides are the prompt's last ones once more.
    fn prompt_in_sides(&self, renderer: &Renderer<'_>) -> usize {
        let longest = self.prompt.len().min(self.chosen.len() - 1).min(self.rejected.len() - 1);
        let [prompt, chosen, rejected] =
            [&self.prompt, &self.chosen, &self.rejected].map(|turns| Single::all(turns));
        let is_twice = |count: &usize| {
            let end = prompt.get(prompt.len() - count..).unwrap_or_default();
            let same =
                |side: &[Single<'_>]| end.iter().zip(side).all(|(a, b)| a.is_like(b, renderer));
            end.first().is_some_and(|single| is_asked(single.turn))
                && same(&chosen)
                && same(&rejected)
        };
        (1..=longest).rev().find(is_twice).unwrap_or(0)
    }
}

/// How many leading turns the template prints alike on both sides. A side always keeps its last turn.
fn shared(parts: &Parts<'_>, renderer: &Renderer<'_>) -> usize {
    let Parts { prompt, chosen, rejected, .. } = parts;
    let most = (chosen.len() - 1).min(rejected.len() - 1);
    let equal = |from: usize| {
        let sides = chosen.iter().zip(rejected).take(most).skip(from);
        from + sides.take_while(|(a, b)| a == b).count()
    };
    let mut shared = equal(0);
    if shared == most {
        return shared;
    }
    let whole: Vec<&Value<'_>> = prompt.iter().chain(rejected).collect();
    let Some(own) = renderer.try_render(&whole) else { return shared };
    // With the other side's turns in the place of its own the conversation must read as before.
    let reads_alike = |count: usize| {
        let sides = chosen.iter().take(count).chain(rejected.iter().skip(count));
        let swapped: Vec<&Value<'_>> = prompt.iter().chain(sides).collect();
        renderer.try_render(&swapped).as_deref() == Some(&own)
    };
    // Doubled and then halved: a long conversation that is spelt otherwise all along takes few renders.
    let (mut step, mut beyond) = (1, most + 1);
    while shared + 1 < beyond {
        let count = if beyond > most { (shared + step).min(most) } else { shared.midpoint(beyond) };
        if reads_alike(count) {
            shared = equal(count);
            step *= 2;
        } else {
            beyond = count;
        }
    }
    shared
}
