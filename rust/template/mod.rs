//! Chat templates: `transformers`' jinja2 environment, in minijinja.
//!
//! A template is code of somebody else: each render has fuel and a cap on its output.

mod checks;
mod clock;
mod compiled;
mod conversation;
mod flow;
mod jinja;
mod json;
mod literals;
mod probe;
mod program;
mod python;
mod shown;

pub use compiled::{Answer, Fallback, Template};
pub use conversation::{Conversation, Now, RenderError, Rendered};
pub use literals::Literals;
pub(crate) use program::{concatenate, shows_contents};
pub(crate) use shown::{Places, Shown, strip};
