//! `strftime_now`: the date that templates print, in English, as in Python's C locale.

use minijinja::State;

use super::python::bad;

/// Name of the hidden variable that carries the time.
pub(super) const NOW: &str = "_dpo_ext_now";

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

pub(super) fn strftime_now(state: &State, format: &str) -> Result<String, minijinja::Error> {
    let parts: Vec<i32> = state
        .lookup(NOW)
        .and_then(|now| now.try_iter().ok()?.map(|n| i32::try_from(n).ok()).collect())
        .unwrap_or_default();
    let [year, month, day, hour, minute, second, weekday, yearday] = *parts.as_slice() else {
        return Err(bad("no time is known"));
    };
    let name = |names: &[&'static str], i: i32| {
        usize::try_from(i).ok().and_then(|i| names.get(i).copied()).unwrap_or_default()
    };
    let half = match hour % 12 {
        0 => 12,
        h => h,
    };
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = rest.next();
        let plain = directive == Some('-');
        let directive = if plain { rest.next() } else { directive };
        let number = |n: i32, width: usize| {
            if plain { n.to_string() } else { format!("{n:0width$}") }
        };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year.rem_euclid(100), 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('H') => number(hour, 2),
            Some('I') => number(half, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(yearday, 3),
            Some('B') => name(&MONTHS, month - 1).to_owned(),
            Some('b') => name(&MONTHS, month - 1).chars().take(3).collect(),
            Some('A') => name(&DAYS, weekday).to_owned(),
            Some('a') => name(&DAYS, weekday).chars().take(3).collect(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            other => {
                let other = other.map(String::from).unwrap_or_default();
                return Err(bad(format!("`strftime_now` does not know `%{other}`")));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}
