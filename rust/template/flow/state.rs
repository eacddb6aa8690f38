//! What is known of a template so far.

use std::collections::{BTreeMap, BTreeSet};

use minijinja::machinery::ast::Expr;

use super::kind::{CONTENT, Kind, Refusal, TEXT, refuse};
use super::path::excluded;

/// What contents must not have for the proof to hold.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(in crate::template) struct Guards {
    /// Strings that no content may contain.
    pub(in crate::template) needles: BTreeSet<String>,
    /// Characters that no content may begin or end with, trimmed or not.
    pub(in crate::template) ends: BTreeSet<char>,
}

#[derive(Default)]
pub(super) struct Flow {
    pub(super) variables: BTreeMap<String, Kind>,
    /// Attributes of all namespaces, by name.
    pub(super) attributes: BTreeMap<String, Kind>,
    /// Parameters of each macro.
    pub(super) parameters: BTreeMap<String, Vec<String>>,
    /// What each macro prints.
    pub(super) printed: BTreeMap<String, Kind>,
    /// What the block in hand prints.
    pub(super) emitted: Kind,
    /// What tests around the statement in hand exclude: a path, the kinds left to it, and the loops around the test.
    pub(super) refined: Vec<(String, Kind, usize)>,
    pub(super) loops: usize,
    pub(super) guards: Guards,
}

impl Flow {
    /// Forgets what is known of paths that an assignment changes.
    pub(super) fn unrefine(&mut self, changes: impl Fn(&str) -> bool) -> Result<(), Refusal> {
        let loops = self.loops;
        if self.refined.iter().any(|(path, _, at)| *at < loops && changes(path)) {
            return refuse("a loop sets what was tested outside of it").map(drop);
        }
        self.refined.retain(|(path, _, _)| !changes(path));
        Ok(())
    }

    /// Runs `work` knowing that the truth of `test` is `outcome`.
    pub(super) fn knowing<T>(
        &mut self,
        test: &Expr<'_>,
        outcome: bool,
        work: impl FnOnce(&mut Self) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let mut paths = Vec::new();
        excluded(test, outcome, &mut paths);
        let outer = self.refined.clone();
        let loops = self.loops;
        let left = !(CONTENT | TEXT);
        self.refined.extend(paths.into_iter().map(|path| (path, left, loops)));
        let result = work(self);
        // An assignment inside may have been made on the way out, too.
        let kept = std::mem::take(&mut self.refined);
        self.refined = outer.into_iter().filter(|known| kept.contains(known)).collect();
        result
    }
}
