//! Code of another crate, made safe to call.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::error::{Error, Result};
use crate::pool::panic_text;

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Runs code of another crate: a panic becomes an error, and nothing is printed.
pub(super) fn guarded<T>(what: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                before(info);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    QUIET.set(false);
    match result {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Error::Tokenizer(format!("{what}: {e}"))),
        Err(payload) => {
            let text = panic_text(payload.as_ref());
            Err(Error::Tokenizer(format!("{what}: the `tokenizers` crate panicked: {text}")))
        }
    }
}
