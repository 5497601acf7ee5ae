//! Lines of text: wrapping, numbers, and characters that are safe to print.

use crate::printable::steers;

/// Widest line, in characters.
pub(crate) const WIDTH: usize = 100;

/// A number with commas between groups of three digits.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Microseconds as milliseconds with one decimal.
#[must_use]
pub fn milliseconds(us: u64) -> String {
    format!("{}.{} ms", grouped(us / 1000), us % 1000 / 100)
}

/// Adds `text`, wrapped, each line indented. Line ends in it are kept; other control characters,
/// which could come from a guest, are shown as escapes.
pub(crate) fn paragraph(out: &mut String, indent: usize, text: &str) {
    labelled(out, indent, "", text);
}

/// Like [`paragraph`], with `label` in front of the first line and the others aligned behind it.
pub(crate) fn labelled(out: &mut String, indent: usize, label: &str, text: &str) {
    let hanging = indent + label.chars().count();
    let width = WIDTH - hanging;
    let mut lead = format!("{:indent$}{label}", "");
    for source in text.lines() {
        for line in wrapped(&printable(source), width) {
            out.push_str(&lead);
            out.push_str(&line);
            out.truncate(out.trim_end_matches(' ').len());
            out.push('\n');
            lead = " ".repeat(hanging);
        }
    }
}

fn printable(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '\t' => clean.push(' '),
            char if steers(char) => clean.extend(char.escape_default()),
            char => clean.push(char),
        }
    }
    clean
}

/// Lines of at most `width` characters, broken at spaces where there are any. Runs of spaces that
/// fit stay as they are.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest: Vec<char> = text.trim_end().chars().collect();
    while rest.len() > width {
        let space = rest[..=width].iter().rposition(|char| *char == ' ').filter(|at| *at > 0);
        let tail = rest.split_off(space.unwrap_or(width));
        lines.push(rest.iter().collect());
        rest = tail.into_iter().skip_while(|char| *char == ' ').collect();
    }
    lines.push(rest.into_iter().collect());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn digits_are_grouped_from_the_right() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(milliseconds(1_234_567), "1,234.5 ms");
    }

    #[test]
    fn lines_break_at_spaces_and_hang_behind_their_label() {
        let mut out = String::new();
        labelled(&mut out, 2, "note: ", &"word ".repeat(30));
        let lines: Vec<_> = out.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("  note: word word") && lines[0].ends_with("word"));
        assert!(lines[1].starts_with("        word"));
    }

    proptest! {
        #[test]
        fn any_text_fits_and_holds_no_control_character(
            text in any::<String>(), word in "[a-z]{90,250}", indent in 0usize..20,
        ) {
            let mut out = String::new();
            labelled(&mut out, indent, "label ", &format!("{text} {word}\n{text}"));
            for line in out.lines() {
                prop_assert!(line.chars().count() <= WIDTH, "{line}");
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
            }
            let letters = |text: &str| text.chars().filter(|c| c.is_ascii_lowercase()).count();
            prop_assert!(letters(&out) >= letters(&word));
        }
    }
}
