//! What a template does with contents, found without running it.
//!
//! A render is a concatenation if contents are only printed, joined to other text and trimmed, whatever is asked of
//! roles, positions and the number of messages. This folder proves that from the syntax tree, or says what stands against
//! it. Every expression has a set of [`Kind`](kind::Kind)s that it may give; variables are followed by name, in all scopes at once,
//! until nothing changes. What is not listed here is refused, so that an unknown construct is never compiled.
//!
//! Questions about contents that have one answer for ordinary text (`'</think>' in content`) are answered "no" and
//! become [`Guards`]: a conversation that breaks one is rendered.

mod call;
mod expression;
mod kind;
mod path;
mod state;
mod statement;

use minijinja::machinery::ast::Stmt;

use kind::Refusal;
use state::Flow;
pub(super) use state::Guards;

/// Proves that renders are concatenations.
///
/// # Errors
/// The construct that stands against it.
pub(super) fn analyse(tree: &Stmt<'_>) -> Result<Guards, Refusal> {
    let mut flow = Flow::default();
    flow.macros(std::slice::from_ref(tree));
    // Kinds only grow, and there are finitely many: this ends.
    loop {
        let before = (flow.variables.clone(), flow.attributes.clone(), flow.printed.clone());
        flow.statement(tree)?;
        if before == (flow.variables.clone(), flow.attributes.clone(), flow.printed.clone()) {
            return Ok(flow.guards);
        }
    }
}
