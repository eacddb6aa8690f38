//! Paths such as `message.content`, and what a test says of them.

use minijinja::machinery::ast::{BinOpKind, Expr, UnaryOpKind};

pub(super) fn text_of<'e>(expr: &'e Expr<'_>) -> Option<&'e str> {
    match expr {
        Expr::Const(value) => value.value.as_str(),
        _ => None,
    }
}

/// `message.content` for both spellings of it; `None` for anything but a variable and constant keys.
pub(super) fn path_of(expr: &Expr<'_>) -> Option<String> {
    Some(match expr {
        Expr::Var(var) => var.id.to_owned(),
        Expr::GetAttr(x) => path_of(&x.expr)? + "." + x.name,
        Expr::GetItem(x) => match &x.subscript_expr {
            Expr::Const(key) => path_of(&x.expr)? + "." + &key.value.to_string(),
            _ => return None,
        },
        _ => return None,
    })
}

/// Which paths hold no content if the truth of `test` is `outcome`: contents are strings and not blank.
pub(super) fn excluded(test: &Expr<'_>, outcome: bool, out: &mut Vec<String>) {
    match test {
        Expr::UnaryOp(x) if matches!(x.op, UnaryOpKind::Not) => excluded(&x.expr, !outcome, out),
        Expr::BinOp(x)
            if matches!((x.op, outcome), (BinOpKind::ScAnd, true) | (BinOpKind::ScOr, false)) =>
        {
            excluded(&x.left, outcome, out);
            excluded(&x.right, outcome, out);
        }
        Expr::Test(x) if x.args.is_empty() => {
            let never = match x.name {
                "string" | "defined" => !outcome,
                "none" | "undefined" | "mapping" | "number" | "boolean" => outcome,
                _ => false,
            };
            out.extend(path_of(&x.expr).filter(|_| never));
        }
        _ => out.extend(path_of(test).filter(|_| !outcome)),
    }
}

pub(super) fn string_of(expr: &Expr<'_>) -> Option<String> {
    text_of(expr).map(str::to_owned)
}
