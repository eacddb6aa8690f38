//! Expressions: what they may give.

use minijinja::machinery::ast::{BinOpKind, CallArg, CompareOpKind, Expr, UnaryOpKind};

use super::kind::{
    CLEAN, CONTENT, Kind, MESSAGE, MESSAGES, Out, PARTS, PRINTED, Refusal, SPACE, TEXT, only,
    refuse,
};
use super::path::{path_of, string_of};
use super::state::Flow;

impl Flow {
    /// An expression that is asked for its truth. A content that is not blank is true, and so is text with it.
    pub(super) fn truth(&mut self, expr: &Expr<'_>) -> Out {
        let kind = self.expression(expr)?;
        only(kind, !SPACE, "the truth of a namespace")?;
        Ok(CLEAN)
    }

    pub(super) fn clean(&mut self, expr: &Expr<'_>, what: &str) -> Out {
        let kind = self.expression(expr)?;
        only(kind, CLEAN, what)
    }

    pub(super) fn arguments<'e, 'a>(
        &mut self,
        args: &'e [CallArg<'a>],
        what: &str,
    ) -> Result<Vec<&'e Expr<'a>>, Refusal> {
        let mut positional = Vec::new();
        for arg in args {
            match arg {
                CallArg::Pos(expr) => {
                    self.clean(expr, what)?;
                    positional.push(expr);
                }
                CallArg::Kwarg(_, expr) => {
                    self.clean(expr, what)?;
                }
                CallArg::PosSplat(_) | CallArg::KwargSplat(_) => {
                    return Err("unpacked arguments".to_owned());
                }
            }
        }
        Ok(positional)
    }

    pub(super) fn expression(&mut self, expr: &Expr<'_>) -> Out {
        let kind = self.plain_expression(expr)?;
        let path = if self.refined.is_empty() { None } else { path_of(expr) };
        let known = self.refined.iter().filter(|(known, _, _)| Some(known) == path.as_ref());
        Ok(known.fold(kind, |kind, (_, left, _)| kind & left))
    }

    fn plain_expression(&mut self, expr: &Expr<'_>) -> Out {
        match expr {
            Expr::Const(_) => Ok(CLEAN),
            Expr::Var(var) => match var.id {
                "messages" => Ok(MESSAGES | self.variables.get("messages").copied().unwrap_or(0)),
                "loop" | "self" | "super" | "caller" => refuse(&format!("`{}` as a value", var.id)),
                name if self.parameters.contains_key(name) => refuse("a macro as a value"),
                name => Ok(CLEAN | self.variables.get(name).copied().unwrap_or(0)),
            },
            Expr::GetAttr(x) => {
                if matches!(&x.expr, Expr::Var(var) if var.id == "loop") {
                    return match x.name {
                        "previtem" | "nextitem" => Ok(MESSAGE | CONTENT | CLEAN),
                        "cycle" | "changed" => refuse("a method of `loop`"),
                        _ => Ok(CLEAN),
                    };
                }
                let owner = self.expression(&x.expr)?;
                self.lookup(owner, Some(x.name))
            }
            Expr::GetItem(x) => {
                let owner = self.expression(&x.expr)?;
                self.clean(&x.subscript_expr, "a lookup by contents")?;
                let name = string_of(&x.subscript_expr);
                self.item(owner, name.as_deref())
            }
            Expr::Slice(x) => {
                for bound in [&x.start, &x.stop, &x.step].into_iter().flatten() {
                    self.clean(bound, "a slice by contents")?;
                }
                let kind = self.expression(&x.expr)?;
                only(kind, CLEAN | MESSAGES, "a slice of a content")
            }
            Expr::UnaryOp(x) => match x.op {
                UnaryOpKind::Not => self.truth(&x.expr),
                UnaryOpKind::Neg => self.clean(&x.expr, "arithmetic on contents"),
            },
            Expr::BinOp(x) => self.operation(x.op, &x.left, &x.right),
            Expr::Compare(x) => match x.ops.as_slice() {
                [one] => {
                    let op = match one.op {
                        CompareOpKind::Eq | CompareOpKind::Ne => BinOpKind::Eq,
                        CompareOpKind::In | CompareOpKind::NotIn => BinOpKind::In,
                        _ => BinOpKind::Lt,
                    };
                    self.operation(op, &x.expr, &one.expr)
                }
                many => {
                    self.clean(&x.expr, "a chain of comparisons with contents")?;
                    for op in many {
                        self.clean(&op.expr, "a chain of comparisons with contents")?;
                    }
                    Ok(CLEAN)
                }
            },
            Expr::IfExpr(x) => {
                self.truth(&x.test_expr)?;
                let yes = self.knowing(&x.test_expr, true, |flow| flow.expression(&x.true_expr))?;
                Ok(match &x.false_expr {
                    Some(no) => {
                        yes | self.knowing(&x.test_expr, false, |flow| flow.expression(no))?
                    }
                    None => yes | CLEAN,
                })
            }
            Expr::Filter(x) => self.filter(x.name, x.expr.as_ref(), &x.args),
            Expr::Test(x) => {
                let kind = self.expression(&x.expr)?;
                let by_type = matches!(
                    x.name,
                    "defined"
                        | "undefined"
                        | "none"
                        | "string"
                        | "mapping"
                        | "iterable"
                        | "sequence"
                        | "number"
                        | "boolean"
                        | "true"
                        | "false"
                        | "integer"
                        | "float"
                );
                if by_type && x.args.is_empty() && kind & SPACE == 0 {
                    return Ok(CLEAN);
                }
                self.arguments(&x.args, "a test by contents")?;
                only(kind, CLEAN, &format!("the test `{}` of contents", x.name))
            }
            Expr::Call(x) => self.call(x),
            Expr::List(x) => self.literal(&x.items),
            Expr::Tuple(x) => self.literal(&x.items),
            Expr::Map(x) => {
                self.literal(&x.keys)?;
                self.literal(&x.values)
            }
        }
    }

    fn literal(&mut self, items: &[Expr<'_>]) -> Out {
        for item in items {
            self.clean(item, "contents in a list or dict")?;
        }
        Ok(CLEAN)
    }

    /// An attribute. `None` stands for a name that is not known here.
    pub(super) fn lookup(&mut self, owner: Kind, name: Option<&str>) -> Out {
        only(
            owner,
            CLEAN | MESSAGE | SPACE | CONTENT | TEXT,
            "an attribute of a list of contents",
        )?;
        let mut kind = 0;
        if owner & (CLEAN | CONTENT | TEXT) != 0 {
            kind |= CLEAN; // an attribute of a string is undefined, whatever the string
        }
        if owner & (SPACE | CLEAN) != 0 {
            kind |= name.and_then(|name| self.attributes.get(name)).copied().unwrap_or(0) | CLEAN;
        }
        if owner & MESSAGE != 0 {
            kind |= match name {
                Some("content") => CONTENT,
                Some(_) => CLEAN,
                None => CONTENT | CLEAN,
            };
        }
        Ok(kind)
    }

    pub(super) fn item(&mut self, owner: Kind, name: Option<&str>) -> Out {
        only(owner, CLEAN | MESSAGE | MESSAGES | PARTS, "a character of a content")?;
        let mut kind = 0;
        if owner & (CLEAN | MESSAGE) != 0 {
            kind |= self.lookup(owner & (CLEAN | MESSAGE), name)?;
        }
        if owner & MESSAGES != 0 {
            kind |= MESSAGE | CLEAN;
        }
        if owner & PARTS != 0 {
            kind |= CONTENT | CLEAN;
        }
        Ok(kind)
    }

    fn operation(&mut self, op: BinOpKind, left: &Expr<'_>, right: &Expr<'_>) -> Out {
        let a = self.expression(left)?;
        let b = match op {
            BinOpKind::ScAnd | BinOpKind::ScOr => {
                let outcome = matches!(op, BinOpKind::ScAnd);
                let b = self.knowing(left, outcome, |flow| flow.expression(right))?;
                return only(a | b, !SPACE, "a namespace as a value");
            }
            _ => self.expression(right)?,
        };
        match op {
            BinOpKind::Add | BinOpKind::Concat => {
                only(a | b, PRINTED, "messages joined to something")?;
                let clean = a & b & CLEAN;
                Ok(if (a | b) & !CLEAN == 0 { CLEAN } else { clean | TEXT })
            }
            BinOpKind::Eq | BinOpKind::Ne => {
                let (content, other) = if a & CONTENT != 0 { (a, right) } else { (b, left) };
                if (a | b) & !CLEAN == 0 {
                    return Ok(CLEAN);
                }
                if (a | b) & !(CLEAN | CONTENT) == 0
                    && a & b & CONTENT == 0
                    && content & CONTENT != 0
                    && let Expr::Const(value) = other
                {
                    // A content that is not blank equals nothing but text.
                    if let Some(text) = value.value.as_str().filter(|t| !t.trim().is_empty()) {
                        self.guards.needles.insert(text.to_owned());
                    }
                    return Ok(CLEAN);
                }
                refuse("a comparison of contents")
            }
            BinOpKind::In => {
                only(a, CLEAN, "contents sought in something")?;
                if b & (CONTENT | TEXT) == 0 {
                    only(b, CLEAN | MESSAGE, "something sought in messages")?;
                    return Ok(CLEAN);
                }
                only(b, CLEAN | CONTENT, "something sought in joined text")?;
                self.needle(Some(left))?;
                Ok(CLEAN)
            }
            _ => only(a | b, CLEAN, "an operator on contents"),
        }
    }

    /// The answer to a question about contents is the one of contents without this string.
    pub(super) fn needle(&mut self, arg: Option<&Expr<'_>>) -> Result<(), Refusal> {
        match arg.and_then(string_of).filter(|text| !text.is_empty()) {
            Some(text) => {
                self.guards.needles.insert(text);
                Ok(())
            }
            None => refuse("contents searched for something that is no constant").map(drop),
        }
    }
}
