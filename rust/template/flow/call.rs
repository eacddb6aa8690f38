//! Filters, functions and methods: what they make of contents.

use minijinja::machinery::ast::{Call, CallArg, CallType, Expr};

use super::kind::{CLEAN, CONTENT, MESSAGE, MESSAGES, Out, PARTS, SPACE, TEXT, only, refuse};
use super::path::{string_of, text_of};
use super::state::Flow;

impl Flow {
    pub(super) fn filter(
        &mut self,
        name: &str,
        of: Option<&Expr<'_>>,
        args: &[CallArg<'_>],
    ) -> Out {
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

    pub(super) fn call(&mut self, call: &Call<'_>) -> Out {
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
