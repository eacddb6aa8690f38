//! Statements: what they print, and what they assign.

use minijinja::machinery::ast::{Expr, Macro, Stmt};

use super::kind::{
    CLEAN, CONTENT, Kind, MESSAGE, MESSAGES, Out, PARTS, PRINTED, Refusal, SPACE, TEXT, only,
    refuse,
};
use super::state::Flow;

impl Flow {
    pub(super) fn macros(&mut self, statements: &[Stmt<'_>]) {
        for statement in statements {
            match statement {
                Stmt::Template(x) => self.macros(&x.children),
                Stmt::ForLoop(x) => {
                    self.macros(&x.body);
                    self.macros(&x.else_body);
                }
                Stmt::IfCond(x) => {
                    self.macros(&x.true_body);
                    self.macros(&x.false_body);
                }
                Stmt::WithBlock(x) => self.macros(&x.body),
                Stmt::SetBlock(x) => self.macros(&x.body),
                Stmt::Macro(x) => {
                    let names = x.args.iter().map(|arg| match arg {
                        Expr::Var(var) => var.id.to_owned(),
                        _ => String::new(),
                    });
                    self.parameters.insert(x.name.to_owned(), names.collect());
                    self.macros(&x.body);
                }
                _ => {}
            }
        }
    }

    fn assign(&mut self, target: &Expr<'_>, kind: Kind) -> Result<(), Refusal> {
        match target {
            Expr::Var(var) if self.parameters.contains_key(var.id) || var.id == "loop" => {
                refuse("a macro or `loop` is assigned to").map(drop)
            }
            Expr::Var(var) => {
                self.unrefine(|path| path.split('.').next() == Some(var.id))?;
                *self.variables.entry(var.id.to_owned()).or_default() |= kind;
                Ok(())
            }
            Expr::GetAttr(attr) => {
                let owner = self.expression(&attr.expr)?;
                only(owner, SPACE | CLEAN, "an attribute of a message is set")?;
                self.unrefine(|path| path.split('.').any(|part| part == attr.name))?;
                *self.attributes.entry(attr.name.to_owned()).or_default() |= kind;
                Ok(())
            }
            Expr::Tuple(items) => {
                only(kind, CLEAN, "contents are unpacked")?;
                items.items.iter().try_for_each(|item| self.assign(item, kind))
            }
            Expr::List(items) => {
                only(kind, CLEAN, "contents are unpacked")?;
                items.items.iter().try_for_each(|item| self.assign(item, kind))
            }
            _ => refuse("an unknown target of `set`").map(drop),
        }
    }

    fn body(&mut self, statements: &[Stmt<'_>]) -> Result<(), Refusal> {
        statements.iter().try_for_each(|statement| self.statement(statement))
    }

    /// What `statements` print when that is caught in a value.
    fn caught(&mut self, statements: &[Stmt<'_>]) -> Out {
        let outer = std::mem::replace(&mut self.emitted, CLEAN);
        let result = self.body(statements);
        let printed = std::mem::replace(&mut self.emitted, outer);
        result?;
        Ok(if printed == CLEAN { CLEAN } else { CLEAN | TEXT })
    }

    pub(super) fn statement(&mut self, statement: &Stmt<'_>) -> Result<(), Refusal> {
        match statement {
            Stmt::Template(x) => self.body(&x.children),
            Stmt::EmitRaw(_) | Stmt::Continue(_) | Stmt::Break(_) => Ok(()),
            Stmt::EmitExpr(x) => {
                let kind = self.expression(&x.expr)?;
                self.emitted |= only(kind, PRINTED, "messages are printed as they are")?;
                Ok(())
            }
            Stmt::ForLoop(x) => {
                if x.recursive {
                    return refuse("a recursive loop").map(drop);
                }
                let over = self.expression(&x.iter)?;
                only(over, CLEAN | MESSAGES | MESSAGE | PARTS, "a loop over characters")?;
                let mut item = 0;
                for (from, to) in [
                    (CLEAN, CLEAN),
                    (MESSAGES, MESSAGE),
                    (MESSAGE, CLEAN), // its keys
                    (PARTS, CONTENT | CLEAN),
                ] {
                    item |= if over & from != 0 { to } else { 0 };
                }
                self.assign(&x.target, item)?;
                self.loops += 1;
                if let Some(filter) = &x.filter_expr {
                    self.truth(filter)?;
                }
                self.body(&x.body)?;
                self.loops -= 1;
                self.body(&x.else_body)
            }
            Stmt::IfCond(x) => {
                self.truth(&x.expr)?;
                self.knowing(&x.expr, true, |flow| flow.body(&x.true_body))?;
                self.knowing(&x.expr, false, |flow| flow.body(&x.false_body))
            }
            Stmt::WithBlock(x) => {
                for (target, value) in &x.assignments {
                    let kind = self.expression(value)?;
                    self.assign(target, kind)?;
                }
                self.body(&x.body)
            }
            Stmt::Set(x) => {
                let kind = self.expression(&x.expr)?;
                self.assign(&x.target, kind)
            }
            Stmt::SetBlock(x) => {
                if x.filter.is_some() {
                    return refuse("a filter over a block").map(drop);
                }
                let kind = self.caught(&x.body)?;
                self.assign(&x.target, kind)
            }
            Stmt::Macro(x) => self.declare(x),
            Stmt::Do(x) => self.call(&x.call).map(drop),
            _ => refuse("a block, an include, `call`, `filter` or `autoescape`").map(drop),
        }
    }

    fn declare(&mut self, x: &Macro<'_>) -> Result<(), Refusal> {
        let first = x.args.len() - x.defaults.len();
        for (arg, default) in x.args.iter().skip(first).zip(&x.defaults) {
            let kind = self.expression(default)?;
            self.assign(arg, kind)?;
        }
        let known = std::mem::take(&mut self.refined);
        let printed = self.caught(&x.body)?;
        self.refined = known;
        *self.printed.entry(x.name.to_owned()).or_insert(CLEAN) |= printed;
        Ok(())
    }
}
