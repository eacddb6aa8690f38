//! The guards of a template's proof, in the form that is checked on every content.

use memchr::memmem;

use super::flow::Guards;
use super::probe::is_probe;
use super::python::{is_space, trim_end, trim_start};

/// What every content of a concatenation keeps to.
pub(super) struct Checks {
    needles: Vec<memmem::Finder<'static>>,
    ends: Vec<char>,
}

impl std::fmt::Debug for Checks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} needles, {} ends", self.needles.len(), self.ends.len())
    }
}

impl Checks {
    /// `None` if the probes themselves would break a guard.
    pub(super) fn new(guards: &Guards) -> Option<Self> {
        if guards.ends.iter().copied().any(is_probe)
            || guards.needles.iter().any(|needle| needle.chars().any(is_probe))
        {
            return None;
        }
        let needles = guards.needles.iter().map(|n| memmem::Finder::new(n.as_bytes()).into_owned());
        Some(Self { needles: needles.collect(), ends: guards.ends.iter().copied().collect() })
    }

    pub(super) fn hold(&self, content: &str) -> bool {
        let ends = |text: &str| {
            let at = [text.chars().next(), text.chars().next_back()];
            at.into_iter().flatten().any(|c| self.ends.contains(&c))
        };
        if content.chars().all(is_space) {
            return false;
        }
        if !self.ends.is_empty() && (ends(content) || ends(trim_end(trim_start(content)))) {
            return false;
        }
        self.needles.iter().all(|needle| needle.find(content.as_bytes()).is_none())
    }
}
