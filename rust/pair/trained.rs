//! Which bytes of a render are trained: the contents of turns and what ends them, and not what begins them.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::ops::Range;

use super::options::{EmptyThink, TrainOn};
use super::places::{ends, places, text_of};
use super::render::Renderer;
use crate::error::Reason;
use crate::read::bad::Bad;
use crate::read::json::Value;
use crate::read::turns::is_asked;
use crate::template::strip;

/// So many renders of the largest size are made of one conversation.
const MOST_RENDERS: usize = 64;
/// What begins thoughts.
const THINK: &str = "<think>";

/// A conversation, its render, and where its completion begins.
pub(super) struct Render<'r> {
    pub(super) renderer: &'r Renderer<'r>,
    pub(super) messages: Vec<&'r Value<'r>>,
    /// The first message of the completion.
    pub(super) first: usize,
    pub(super) whole: &'r str,
    /// Bytes of the prompt.
    pub(super) cut: usize,
    /// Whether the template prints the prompt as it does alone, so that all of it stands before the cut.
    is_whole: bool,
    /// Where each content begins, and where it ends.
    contents: [OnceCell<Option<Vec<Vec<usize>>>>; 2],
    /// Where turns end, as far as it was looked for.
    ends: RefCell<HashMap<usize, Option<usize>>>,
}

impl<'r> Render<'r> {
    pub(super) fn new(
        renderer: &'r Renderer<'r>,
        prompt: &'r [Value<'r>],
        side: &'r [Value<'r>],
        whole: &'r str,
        (cut, is_whole): (usize, bool),
    ) -> Self {
        let messages: Vec<_> = prompt.iter().chain(side).collect();
        let (contents, ends) = Default::default();
        Self { renderer, messages, first: prompt.len(), whole, cut, is_whole, contents, ends }
    }

    /// The stretches of the completion that are trained, sorted; `None` where they cannot be told.
    ///
    /// # Errors
    /// A bad row for a conversation of which too many parts would be rendered.
    pub(super) fn trained(&self, train_on: TrainOn) -> Result<Option<Vec<Range<usize>>>, Bad> {
        let Some(last) = self.messages.iter().rposition(|turn| !is_asked(turn)) else {
            return Ok(None);
        };
        if last < self.first {
            return Ok(None);
        }
        let from = match train_on {
            TrainOn::Completion | TrainOn::Assistant => self.first,
            TrainOn::Last => last,
        };
        let tagged = self.renderer.regions(&self.messages, self.whole);
        if tagged.is_none() {
            let count = (self.run_before(from)..=last).filter(|at| self.is_answer(*at)).count();
            let most = self.renderer.options.limits.max_rendered_bytes;
            if count.saturating_mul(self.whole.len()) > most.saturating_mul(MOST_RENDERS) {
                let bytes = self.whole.len();
                let message = format!(
                    "finding {count} turns of {bytes} bytes takes more than {MOST_RENDERS} times \
                     {most} rendered bytes"
                );
                return Err(Bad::new(Reason::Limit, "max_rendered_bytes", message));
            }
        }
        Ok(self.stretches(from, last, tagged))
    }

    fn is_answer(&self, message: usize) -> bool {
        self.messages.get(message).is_some_and(|turn| !is_asked(turn))
    }

    /// The first of the answers that stand one behind the other before the turn `from`.
    fn run_before(&self, from: usize) -> usize {
        from - (self.first..from).rev().take_while(|at| self.is_answer(*at)).count()
    }

    /// Those of the turns `from` to `last`.
    fn stretches(
        &self,
        from: usize,
        last: usize,
        tagged: Option<Vec<Range<usize>>>,
    ) -> Option<Vec<Range<usize>>> {
        // An end may be needed for the next: found in order, none asks for more than the one before it.
        for at in self.run_before(from) + 1..=from {
            self.end_of(at);
        }
        let turns: Vec<Range<usize>> = if let Some(tagged) = tagged {
            let before = if from == self.first { self.cut } else { self.end_of(from)? };
            let inside = |region: Range<usize>| region.start.max(self.cut)..region.end;
            let later = tagged.into_iter().filter(|region| region.end > before).map(inside);
            later.filter(|region| !region.is_empty()).collect()
        } else {
            let turn = |at| Some(self.begin_of(at)?..self.end_of(at + 1)?);
            (from..=last).filter(|at| self.is_answer(*at)).map(turn).collect::<Option<_>>()?
        };
        let is_sorted = turns.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let is_whole = turns.iter().all(|turn| turn.start < turn.end);
        (is_sorted && is_whole && !turns.is_empty()).then_some(turns)
    }

    /// Where content `message` begins, or with `which` 1 ends, without the white space around it.
    fn content(&self, message: usize, which: usize) -> Option<usize> {
        let found = self.contents.get(which)?.get_or_init(|| {
            let at = |turn: &&Value<'_>| ends(&text_of(turn)).map(|ends| ends[which]);
            let at: Vec<Vec<usize>> =
                self.messages.iter().map(|turn| at(turn).into_iter().collect()).collect();
            places(&self.messages, &at, self.renderer, self.whole)
        });
        found.as_ref()?.get(message)?.first().copied()
    }

    /// How EOS is spelt; what no text has where there is none.
    fn eos(&self) -> &str {
        self.renderer.tokenizer.eos_spelling().unwrap_or("\0")
    }

    /// Where the turns before `message` end.
    fn end_of(&self, message: usize) -> Option<usize> {
        if message == self.messages.len() {
            return Some(self.whole.len());
        }
        let known = self.ends.borrow().get(&message).copied();
        known.unwrap_or_else(|| {
            let end = self.found_end_of(message);
            self.ends.borrow_mut().insert(message, end);
            end
        })
    }

    fn found_end_of(&self, message: usize) -> Option<usize> {
        let turns = self.messages.get(..message)?;
        let eos = self.eos();
        let alone = self.renderer.try_render(turns)?;
        // Some templates put EOS behind the last turn alone.
        let shorter = alone.strip_suffix(eos).unwrap_or(&alone);
        let end = if self.whole.starts_with(&alone) {
            alone.len()
        } else if self.whole.starts_with(shorter) {
            shorter.len()
        } else {
            let last = message.checked_sub(1)?;
            self.end_behind(last, &alone).or_else(|| self.end_of_thoughtless(last, &alone))?
        };
        // Others put it behind every turn but the last.
        let rest = self.whole.get(end..)?;
        let is_cut = !self.whole.get(..end)?.ends_with(eos) && rest.starts_with(eos);
        Some(if is_cut { end + eos.len() } else { end })
    }

    /// Where the turn `last` ends, which `alone` ends with: the turns before may be printed otherwise with others behind
    /// them, but not what stands behind its content.
    fn end_behind(&self, last: usize, alone: &str) -> Option<usize> {
        let own = Render::new(self.renderer, &[], &[], alone, (0, true));
        let own = Render { messages: self.messages.get(..=last)?.to_vec(), ..own };
        let marker = alone.get(own.content(last, 1)?..)?;
        let shorter = marker.strip_suffix(self.eos()).unwrap_or(marker);
        let begin = self.content(last, 1)?;
        let rest = self.whole.get(begin..)?;
        let marker = [marker, shorter].into_iter().find(|marker| rest.starts_with(*marker))?;
        Some(begin + marker.len())
    }

    /// The same for an answer that has an empty block of thoughts in `alone`, where nothing is behind it.
    fn end_of_thoughtless(&self, last: usize, alone: &str) -> Option<usize> {
        if self.messages.get(last).is_none_or(|turn| is_asked(turn)) {
            return None;
        }
        let turns = self.messages.get(..last)?;
        let said = alone.strip_prefix(&*self.renderer.try_begin(turns)?)?;
        let said = said.get(empty_think(said)?..)?;
        let begin = self.begin_of(last)?;
        self.whole.get(begin..)?.starts_with(said).then_some(begin + said.len())
    }

    /// Where what the model says in the turn `message` begins, behind what the template begins an answer with.
    fn begin_of(&self, message: usize) -> Option<usize> {
        if message == self.first {
            let is_before = |at| self.content(at, 1).is_some_and(|end| end <= self.cut);
            let is_border = self.is_whole || (0..self.first).all(is_before);
            return is_border.then_some(self.cut);
        }
        let before = self.end_of(message)?;
        let turns = self.messages.get(..message)?;
        let begun = self.renderer.try_begin(turns)?;
        let alone = self.renderer.try_render(turns)?;
        let shorter = alone.strip_suffix(self.eos()).unwrap_or(&alone);
        let header = [&alone, shorter].into_iter().find_map(|turns| begun.strip_prefix(turns))?;
        let rest = self.whole.get(before..)?;
        // It may begin thoughts, which old answers go without.
        let thoughtless = header.trim_end().strip_suffix(THINK).unwrap_or_default();
        let begun = |header: &&str| !header.is_empty() && rest.starts_with(*header);
        if let Some(header) = [header, thoughtless].into_iter().find(begun) {
            let begin = before + header.len();
            let skips = self.renderer.options.empty_think == EmptyThink::Prompt;
            let block = rest.get(header.len()..).filter(|_| skips).and_then(empty_think);
            return Some(begin + block.unwrap_or(0));
        }
        let content = self.content(message, 0)?;
        let lead = self.whole.get(before..content)?;
        // A template may have no header, or none that it shows; another may go on with more than thoughts.
        if header.is_empty() && strip(lead).is_empty() {
            return Some(before);
        }
        header.starts_with(lead).then_some(content)
    }
}

/// How long the block of thoughts is with which an answer begins, if there is none in it.
pub(super) fn empty_think(answer: &str) -> Option<usize> {
    let rest = answer.strip_prefix(THINK)?.trim_start().strip_prefix("</think>")?;
    Some(answer.len() - rest.trim_start_matches('\n').len())
}
