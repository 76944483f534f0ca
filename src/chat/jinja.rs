//! The dialect of Jinja that chat templates are written in, with bounds on what a hostile one can use up.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, syntax::SyntaxConfig};

/// What a rendering may cost, apart from its inputs. The largest known templates take some thousand steps.
const BASE_FUEL: u64 = 1_000_000;

/// Steps allowed per byte of input.
const FUEL_PER_BYTE: u64 = 16;

/// Nesting of macros, blocks and calls; small enough for the stack of any thread.
const MAX_RECURSION: usize = 100;

/// The message that a template gave to `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// An environment for a rendering over this many bytes of input.
pub(super) fn environment(input_bytes: usize) -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_fuel(Some(BASE_FUEL.saturating_add((input_bytes as u64).saturating_mul(FUEL_PER_BYTE))));
    env.set_recursion_limit(MAX_RECURSION);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", tojson);
    Ok(env)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn strftime_now(format: &str) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    strftime(now.map_or(0, |since| since.as_secs()), format)
}

/// JSON as Python's `json.dumps(ensure_ascii=False)` spells it.
fn tojson(_: &State, value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    for ignored in ["ensure_ascii", "sort_keys", "separators"] {
        let _: Option<Value> = options.get(ignored)?;
    }
    options.assert_all_used()?;
    let mut json = Json { out: String::new(), indent: indent.map(|spaces| spaces.min(16)) };
    json.write(&value, 0)?;
    Ok(Value::from_safe_string(json.out))
}

struct Json {
    out: String,
    indent: Option<usize>,
}

impl Json {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_RECURSION {
            return Err(Error::new(ErrorKind::BadSerialization, "the value is nested too deeply for JSON"));
        }
        match value.kind() {
            ValueKind::Undefined | ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool | ValueKind::Number => self.out.push_str(&value.to_string().to_lowercase()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.out.push('[');
                let mut empty = true;
                for item in value.try_iter()? {
                    self.separate(&mut empty, depth + 1);
                    self.write(&item, depth + 1)?;
                }
                self.close(empty, depth, ']');
            }
            ValueKind::Map => {
                self.out.push('{');
                let mut empty = true;
                for key in value.try_iter()? {
                    self.separate(&mut empty, depth + 1);
                    self.string(&key.to_string());
                    self.out.push_str(": ");
                    self.write(&value.get_item(&key)?, depth + 1)?;
                }
                self.close(empty, depth, '}');
            }
            _ => self.string(&value.to_string()),
        }
        Ok(())
    }

    fn separate(&mut self, first: &mut bool, depth: usize) {
        if !std::mem::replace(first, false) {
            self.out.push_str(if self.indent.is_some() { "," } else { ", " });
        }
        self.line(depth);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.line(depth);
        }
        self.out.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(spaces) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', spaces * depth));
        }
    }

    fn string(&mut self, text: &str) {
        // Escaping as in `json.dumps`; a string always serialises.
        self.out.push_str(&serde_json::Value::from(text).to_string());
    }
}

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
const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// A time in seconds since 1970, UTC, in the parts of strftime's language that templates use.
pub(super) fn strftime(seconds: u64, format: &str) -> String {
    let days = seconds / 86_400;
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let month_name = MONTHS.get((month as usize).saturating_sub(1)).copied().unwrap_or_default();
    let day_name = DAYS.get((days % 7) as usize).copied().unwrap_or_default();
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('Y') => out += &year.to_string(),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('e') => out += &format!("{day:2}"),
            Some('H') => out += &format!("{hour:02}"),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('B') => out += month_name,
            Some('b') => out += month_name.get(..3).unwrap_or_default(),
            Some('A') => out += day_name,
            Some('a') => out += day_name.get(..3).unwrap_or_default(),
            Some(other) if other != '%' => out.extend(['%', other]),
            _ => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a day counted from 1970, in the Gregorian calendar.
///
/// Years are counted from March, so that the leap day comes last; 400 years have 146 097 days.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}
