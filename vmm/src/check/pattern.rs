//! Patterns of names of cases.

/// A part of a name, or, with `*`, `?` or `[`, a pattern of a whole one.
#[derive(Clone, Debug)]
pub(super) enum Pattern {
    Part(String),
    Whole(glob::Pattern),
}

impl Pattern {
    /// # Errors
    /// What is wrong with it, in a few words.
    pub(super) fn new(text: &str) -> Result<Self, String> {
        if text.contains(['*', '?', '[']) {
            return glob::Pattern::new(text).map(Self::Whole).map_err(|error| error.msg.to_owned());
        }
        Ok(Self::Part(text.to_owned()))
    }

    /// Whether a name matches. A `*` stands for any characters, `/` among them.
    pub(super) fn matches(&self, name: &str) -> bool {
        match self {
            Self::Part(part) => name.contains(part),
            Self::Whole(pattern) => pattern.matches(name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_found_anywhere_and_a_pattern_takes_the_whole_name() {
        let name = "replay/sim/trace/off/vcpus=2/skip-seal";
        for (text, matches) in [
            ("", true),
            ("/sim/", true),
            ("skip", true),
            ("kvm", false),
            ("*/sim/*", true),
            ("sim/*", false),
            ("*vcpus=?/*", true),
            ("*vcpus=[13]/*", false),
            ("replay/*/skip-seal", true),
        ] {
            assert_eq!(Pattern::new(text).unwrap().matches(name), matches, "{text}");
        }
        assert!(Pattern::new("a[").is_err());
    }
}
