//! Rows in small pieces: threads take one each as they come free, and what becomes of them is put together in order.
//!
//! No thread waits for another one. One at a time reads, so that some pieces always lie ready; one at a time puts
//! together what is finished and has its turn; a thread that finds nothing to do leaves, and comes back when there is.
//! How far all this may run ahead of the piece whose turn it is, and with it the memory, is bounded.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::Scope;

use super::job::{Job, Origin, Progress, settle};
use super::outcome::Encoded;
use crate::error::{Error, Result};
use crate::pair::{Pair, Refusal};
use crate::pool;
use crate::read::cell::Kind;
use crate::read::row::{Row, Rules};

/// Rows that one thread takes at a time: at most so many, and of so many bytes of text before the last one.
pub const PIECE_ROWS: usize = 32;
pub(super) const PIECE_BYTES: usize = 1 << 15;

/// Some rows, with what they are read from.
pub(super) trait Piece: Send {
    fn rows(&self) -> usize;
    fn row(
        &self,
        i: usize,
        names: &[&str],
        rules: &Rules<'_>,
    ) -> (Origin<'_>, Result<Row<'_>, Refusal>);
    /// Further fields of row `i`, for a hint.
    fn others(&self, i: usize, names: &[&str], rules: &Rules<'_>) -> Vec<String>;
    /// What there is to count beside the rows.
    fn count(&self, out: &mut Encoded);
}

/// Where pieces come from, in order.
pub(super) trait Source: Send {
    type Piece: Piece;
    /// Some further pieces; `None` at the end. Waits until there are any.
    fn next(&mut self, progress: &Progress) -> Result<Option<Vec<Self::Piece>>>;
}

/// A piece that was worked on.
enum Finished<P> {
    /// What came out, and what the extra columns were taken to hold.
    Made(P, Vec<Option<Kind>>, Result<Box<Encoded>>),
    /// The source failed behind all pieces before.
    Failed(Error),
}

struct State<P> {
    /// Pieces to work on, with their numbers.
    waiting: VecDeque<(usize, P)>,
    finished: BTreeMap<usize, Finished<P>>,
    /// Pieces that came from the source so far.
    queued: usize,
    /// The piece whose turn it is to be put behind the others.
    turn: usize,
    /// What the extra columns hold.
    kinds: Vec<Option<Kind>>,
    /// Threads at work.
    runners: usize,
    is_reading: bool,
    is_appending: bool,
    is_ended: bool,
    /// Why everybody leaves: an error, or enough.
    halted: Option<Result<()>>,
}

/// A source, and how far the work on its pieces is.
pub(super) struct Desk<S: Source> {
    source: Mutex<S>,
    state: Mutex<State<S::Piece>>,
}

impl<S: Source> std::fmt::Debug for Desk<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

impl<S: Source> Desk<S> {
    pub(super) fn new(source: S) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            finished: BTreeMap::new(),
            queued: 0,
            turn: 0,
            kinds: Vec::new(),
            runners: 0,
            is_reading: false,
            is_appending: false,
            is_ended: false,
            halted: None,
        };
        Self { source: Mutex::new(source), state: Mutex::new(state) }
    }

    pub(super) fn source_mut(&mut self) -> &mut S {
        self.source.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State<S::Piece>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends to `all`, on the threads of this pool, until it has `enough` pairs or nothing more comes; whether
    /// anything came. What is begun beyond that is kept for the next call.
    ///
    /// # Errors
    /// The first one in the order of the rows; [`Error::Interrupted`]. Then there is nothing to go on with.
    pub(super) fn run(&self, job: &Job<'_>, all: &mut Encoded, enough: u64) -> Result<bool> {
        let rules = job.rules();
        let before = {
            let mut state = self.state();
            (state.halted, state.kinds) = (None, all.kinds());
            state.runners = 1;
            state.turn
        };
        let work = Work {
            desk: self,
            job,
            names: rules.keys.names(),
            rules,
            enough,
            threads: rayon::current_num_threads(),
            all: Mutex::new(all),
        };
        rayon::scope(|scope| work.run(scope));
        let mut state = self.state();
        match state.halted.take() {
            Some(Err(error)) => Err(error),
            _ => Ok(state.turn > before),
        }
    }
}

enum Task<P> {
    Append(Vec<Finished<P>>),
    Read,
    Encode(usize, P, Vec<Option<Kind>>),
    Leave,
}

struct Work<'a, S: Source> {
    desk: &'a Desk<S>,
    job: &'a Job<'a>,
    names: Vec<&'a str>,
    rules: Rules<'a>,
    enough: u64,
    threads: usize,
    all: Mutex<&'a mut Encoded>,
}

impl<S: Source> Work<'_, S> {
    /// What one thread does until there is nothing to do.
    fn run<'s>(&'s self, scope: &Scope<'s>) {
        loop {
            if pool::is_wanted() {
                rayon::yield_now();
            }
            match self.task() {
                Task::Append(finished) => self.append(finished),
                Task::Read => {
                    for _ in 0..self.read() {
                        scope.spawn(|scope| self.run(scope));
                    }
                }
                Task::Encode(number, piece, kinds) => {
                    let made = self.encode(&piece, &kinds).map(Box::new);
                    let rows = piece.rows() as u64;
                    self.job.progress.rows.fetch_add(rows, std::sync::atomic::Ordering::Relaxed);
                    let made = Finished::Made(piece, kinds, made);
                    self.desk.state().finished.insert(number, made);
                }
                Task::Leave => return,
            }
        }
    }

    fn task(&self) -> Task<S::Piece> {
        let mut guard = self.desk.state();
        let state = &mut *guard;
        if let (None, Err(stopped)) = (&state.halted, self.job.progress.check()) {
            state.halted = Some(Err(stopped));
        }
        if state.halted.is_none() {
            if !state.is_appending {
                let mut ready = Vec::new();
                while let Some(made) = state.finished.remove(&(state.turn + ready.len())) {
                    ready.push(made);
                }
                if !ready.is_empty() {
                    state.is_appending = true;
                    return Task::Append(ready);
                }
            }
            // While a block is read, the others take what lies ready.
            let is_low = state.waiting.len() < 4 * self.threads + 64
                && state.queued - state.turn < 16 * self.threads + 128;
            if is_low && !state.is_reading && !state.is_ended {
                state.is_reading = true;
                return Task::Read;
            }
            if let Some((number, piece)) = state.waiting.pop_front() {
                return Task::Encode(number, piece, state.kinds.clone());
            }
        }
        state.runners -= 1;
        Task::Leave
    }

    /// Takes pieces from the source; how many threads are to come for them.
    fn read(&self) -> usize {
        let mut source = self.desk.source.lock().unwrap_or_else(PoisonError::into_inner);
        let next = source.next(self.job.progress);
        drop(source);
        let mut guard = self.desk.state();
        let state = &mut *guard;
        state.is_reading = false;
        match next {
            Ok(Some(pieces)) => {
                for piece in pieces {
                    state.waiting.push_back((state.queued, piece));
                    state.queued += 1;
                }
            }
            Ok(None) => state.is_ended = true,
            Err(error) => {
                state.finished.insert(state.queued, Finished::Failed(error));
                state.queued += 1;
                state.is_ended = true;
            }
        }
        let more = state.waiting.len().min(self.threads.saturating_sub(state.runners));
        state.runners += more;
        more
    }

    fn encode(&self, piece: &S::Piece, kinds: &[Option<Kind>]) -> Result<Encoded> {
        let (mut out, mut pair) = (Encoded::new(kinds.to_vec()), Pair::default());
        for i in 0..piece.rows() {
            self.job.progress.check()?;
            let (origin, row) = piece.row(i, &self.names, &self.rules);
            let others = || piece.others(i, &self.names, &self.rules);
            settle(self.job, &mut out, &mut pair, row, &origin, others)?;
        }
        piece.count(&mut out);
        Ok(out)
    }

    /// Puts pieces whose turn it is behind the others.
    fn append(&self, finished: Vec<Finished<S::Piece>>) {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut finished, mut done, mut halt) = (finished.into_iter(), 0, None);
        for made in finished.by_ref() {
            done += 1;
            if let Err(error) = self.put(made, &mut all) {
                halt = Some(Err(error));
                break;
            }
            if all.tally.kept >= self.enough {
                halt = Some(Ok(()));
                break;
            }
        }
        let mut guard = self.desk.state();
        let state = &mut *guard;
        state.turn += done;
        state.finished.extend((state.turn..).zip(finished));
        state.kinds = all.kinds();
        state.is_appending = false;
        state.halted = state.halted.take().or(halt);
    }

    fn put(&self, made: Finished<S::Piece>, all: &mut Encoded) -> Result<()> {
        match made {
            Finished::Failed(error) => Err(error),
            Finished::Made(piece, kinds, made) => {
                // The first pair says what an extra column holds. A piece that did not know it yet may have chosen
                // otherwise.
                let known = all.kinds();
                let agrees = known == kinds || made.as_ref().is_ok_and(|made| made.agrees(&known));
                all.append(if agrees { *made? } else { self.encode(&piece, &known)? });
                Ok(())
            }
        }
    }
}
