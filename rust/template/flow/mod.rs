//! What a template does with contents, found without running it.
//!
//! A render is a concatenation if contents are only printed, joined to other text and trimmed, whatever is asked of
//! roles, positions and the number of messages. This file proves that from the syntax tree, or says what stands against
//! it. Every expression has a set of [`Kind`]s that it may give; variables are followed by name, in all scopes at once,
//! until nothing changes. What is not listed here is refused, so that an unknown construct is never compiled.
//!
//! Questions about contents that have one answer for ordinary text (`'</think>' in content`) are answered "no" and
//! become [`Guards`]: a conversation that breaks one is rendered.

use std::collections::{BTreeMap, BTreeSet};

use minijinja::machinery::ast::{
    BinOpKind, Call, CallArg, CallType, CompareOpKind, Expr, Macro, Stmt, UnaryOpKind,
};

/// A set of things that an expression may give.
type Kind = u8;
/// Nothing of a content: decided by roles, positions and the template's own variables.
const CLEAN: Kind = 1;
/// The list of messages, or some of them.
const MESSAGES: Kind = 2;
/// One message.
const MESSAGE: Kind = 4;
/// The content of a message, white space at its ends perhaps cut off.
const CONTENT: Kind = 8;
/// Text with a whole content in it.
const TEXT: Kind = 16;
/// A list with one content in it, and perhaps empty strings.
const PARTS: Kind = 32;
/// A namespace.
const SPACE: Kind = 64;

const PRINTED: Kind = CLEAN | CONTENT | TEXT;

/// What contents must not have for the proof to hold.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Guards {
    /// Strings that no content may contain.
    pub(super) needles: BTreeSet<String>,
    /// Characters that no content may begin or end with, trimmed or not.
    pub(super) ends: BTreeSet<char>,
}

/// Why a template cannot be compiled.
pub(super) type Refusal = String;

type Out = Result<Kind, Refusal>;

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

#[derive(Default)]
struct Flow {
    variables: BTreeMap<String, Kind>,
    /// Attributes of all namespaces, by name.
    attributes: BTreeMap<String, Kind>,
    /// Parameters of each macro.
    parameters: BTreeMap<String, Vec<String>>,
    /// What each macro prints.
    printed: BTreeMap<String, Kind>,
    /// What the block in hand prints.
    emitted: Kind,
    /// What tests around the statement in hand exclude: a path, the kinds left to it, and the loops around the test.
    refined: Vec<(String, Kind, usize)>,
    loops: usize,
    guards: Guards,
}

fn refuse(what: &str) -> Out {
    Err(what.to_owned())
}

fn only(kind: Kind, allowed: Kind, what: &str) -> Out {
    if kind & !allowed == 0 { Ok(kind) } else { refuse(what) }
}

fn text_of<'e>(expr: &'e Expr<'_>) -> Option<&'e str> {
    match expr {
        Expr::Const(value) => value.value.as_str(),
        _ => None,
    }
}

/// `message.content` for both spellings of it; `None` for anything but a variable and constant keys.
fn path_of(expr: &Expr<'_>) -> Option<String> {
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
fn excluded(test: &Expr<'_>, outcome: bool, out: &mut Vec<String>) {
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

fn string_of(expr: &Expr<'_>) -> Option<String> {
    text_of(expr).map(str::to_owned)
}

impl Flow {
    fn macros(&mut self, statements: &[Stmt<'_>]) {
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

    /// Forgets what is known of paths that an assignment changes.
    fn unrefine(&mut self, changes: impl Fn(&str) -> bool) -> Result<(), Refusal> {
        let loops = self.loops;
        if self.refined.iter().any(|(path, _, at)| *at < loops && changes(path)) {
            return refuse("a loop sets what was tested outside of it").map(drop);
        }
        self.refined.retain(|(path, _, _)| !changes(path));
        Ok(())
    }

    /// Runs `work` knowing that the truth of `test` is `outcome`.
    fn knowing<T>(
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

    fn statement(&mut self, statement: &Stmt<'_>) -> Result<(), Refusal> {
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

    /// An expression that is asked for its truth. A content that is not blank is true, and so is text with it.
    fn truth(&mut self, expr: &Expr<'_>) -> Out {
        let kind = self.expression(expr)?;
        only(kind, !SPACE, "the truth of a namespace")?;
        Ok(CLEAN)
    }

    fn clean(&mut self, expr: &Expr<'_>, what: &str) -> Out {
        let kind = self.expression(expr)?;
        only(kind, CLEAN, what)
    }

    fn arguments<'e, 'a>(
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

    fn expression(&mut self, expr: &Expr<'_>) -> Out {
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
    fn lookup(&mut self, owner: Kind, name: Option<&str>) -> Out {
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

    fn item(&mut self, owner: Kind, name: Option<&str>) -> Out {
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
    fn needle(&mut self, arg: Option<&Expr<'_>>) -> Result<(), Refusal> {
        match arg.and_then(string_of).filter(|text| !text.is_empty()) {
            Some(text) => {
                self.guards.needles.insert(text);
                Ok(())
            }
            None => refuse("contents searched for something that is no constant").map(drop),
        }
    }

    fn filter(&mut self, name: &str, of: Option<&Expr<'_>>, args: &[CallArg<'_>]) -> Out {
        let Some(of) = of else { return refuse("a filter without a value") };
        let kind = self.expression(of)?;
        let what = format!("the filter `{name}` on contents");
        if matches!(name, "default" | "d") {
            let mut all = kind;
            for arg in args {
                match arg {
                    CallArg::Pos(expr) | CallArg::Kwarg(_, expr) => all |= self.expression(expr)?,
                    _ => return refuse("unpacked arguments"),
                }
            }
            return only(all, !SPACE, &what);
        }
        let given = self.arguments(args, &what)?;
        if kind == CLEAN {
            return Ok(CLEAN);
        }
        match name {
            "trim" if args.is_empty() => only(kind, CLEAN | CONTENT, &what),
            "string" => only(kind, CLEAN | CONTENT | TEXT, &what),
            "length" | "count" => {
                only(kind, CLEAN | MESSAGES | PARTS | MESSAGE, &what)?;
                Ok(CLEAN)
            }
            "first" | "last" => {
                only(kind, CLEAN | MESSAGES | PARTS, &what)?;
                self.item(kind, None)
            }
            "list" | "reverse" => only(kind, CLEAN | MESSAGES, &what),
            "selectattr" | "rejectattr"
                if given.first().and_then(|e| text_of(e)) == Some("role") =>
            {
                only(kind, CLEAN | MESSAGES, &what)
            }
            "map" => {
                only(kind, CLEAN | MESSAGES, &what)?;
                match args {
                    [CallArg::Kwarg("attribute", e)] if text_of(e) == Some("role") => Ok(CLEAN),
                    _ => refuse(&what),
                }
            }
            _ => refuse(&what),
        }
    }

    fn call(&mut self, call: &Call<'_>) -> Out {
        match call.identify_call() {
            CallType::Function(name) => self.function(name, &call.args),
            CallType::Method(owner, name) => {
                if matches!(owner, Expr::Var(var) if var.id == "loop") {
                    return refuse("a method of `loop`");
                }
                self.method(owner, name, &call.args)
            }
            _ => refuse("a call of a value"),
        }
    }

    fn function(&mut self, name: &str, args: &[CallArg<'_>]) -> Out {
        if let Some(parameters) = self.parameters.get(name).cloned() {
            let mut positional = parameters.iter();
            for arg in args {
                let (parameter, expr) = match arg {
                    CallArg::Pos(expr) => (positional.next().map(String::as_str), expr),
                    CallArg::Kwarg(name, expr) => (Some(*name), expr),
                    _ => return refuse("unpacked arguments"),
                };
                let kind = self.expression(expr)?;
                if let Some(parameter) = parameter {
                    *self.variables.entry(parameter.to_owned()).or_default() |= kind;
                }
            }
            return Ok(self.printed.get(name).copied().unwrap_or(CLEAN));
        }
        match name {
            "namespace" => {
                for arg in args {
                    match arg {
                        CallArg::Kwarg(name, expr) => {
                            let kind = self.expression(expr)?;
                            *self.attributes.entry((*name).to_owned()).or_default() |= kind;
                        }
                        CallArg::Pos(expr) => {
                            self.clean(expr, "a namespace of contents")?;
                        }
                        _ => return refuse("unpacked arguments"),
                    }
                }
                Ok(SPACE)
            }
            "raise_exception" => {
                for arg in args {
                    if let CallArg::Pos(expr) | CallArg::Kwarg(_, expr) = arg {
                        self.expression(expr)?;
                    }
                }
                Ok(CLEAN)
            }
            "range" | "strftime_now" | "dict" => {
                self.arguments(args, "a function of contents")?;
                Ok(CLEAN)
            }
            _ => refuse(&format!("the function `{name}`")),
        }
    }

    fn method(&mut self, owner: &Expr<'_>, name: &str, args: &[CallArg<'_>]) -> Out {
        let kind = self.expression(owner)?;
        let what = format!("the method `{name}` of contents");
        if kind == CLEAN {
            self.arguments(args, &what)?;
            return Ok(CLEAN);
        }
        if name == "get" && kind & !(CLEAN | MESSAGE) == 0 {
            let mut fallback = CLEAN;
            let mut key = None;
            for (i, arg) in args.iter().enumerate() {
                match arg {
                    CallArg::Pos(expr) if i == 0 => {
                        self.clean(expr, &what)?;
                        key = string_of(expr);
                    }
                    CallArg::Pos(expr) => fallback |= self.expression(expr)?,
                    _ => return refuse(&what),
                }
            }
            return Ok(self.lookup(kind, key.as_deref())? | fallback);
        }
        if name == "keys" && kind & !(CLEAN | MESSAGE) == 0 {
            return Ok(CLEAN);
        }
        only(kind, CLEAN | CONTENT, &what)?;
        let given = self.arguments(args, &what)?;
        if given.len() != args.len() {
            return refuse("named arguments of a method");
        }
        let first = given.first().copied();
        match name {
            "strip" | "lstrip" | "rstrip" => match first.map(string_of) {
                None => Ok(kind),
                Some(Some(set)) => {
                    self.guards.ends.extend(set.chars());
                    Ok(kind)
                }
                Some(None) => refuse(&what),
            },
            "split" | "rsplit" | "partition" | "rpartition" => {
                self.needle(first)?;
                // A clean owner gives a list of clean strings.
                Ok(PARTS | CLEAN)
            }
            "replace" | "removeprefix" | "removesuffix" => {
                self.needle(first)?;
                Ok(kind)
            }
            "startswith" | "endswith" => {
                self.needle(first)?;
                Ok(CLEAN)
            }
            _ => refuse(&what),
        }
    }
}
