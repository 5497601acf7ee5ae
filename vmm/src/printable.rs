//! Text that comes from a guest, made safe to print.

/// Whether a character could steer a terminal or turn the direction of text around, and so dress up
/// what surrounds it. Line ends count: who prints lines splits them first.
#[must_use]
pub fn steers(char: char) -> bool {
    char.is_control() || matches!(char, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_and_direction_marks_steer_and_letters_do_not() {
        assert!("\x1b\u{7}\n\r\u{9b}\u{202e}\u{2067}".chars().all(steers));
        assert!(!"abc äß漢 ~".chars().any(steers));
    }
}
