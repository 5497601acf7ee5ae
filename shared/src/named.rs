//! Enumerations whose values have names: programs, faults, rules, settings.

/// Defines an enumeration with a name for each value. Derives and other attributes stand before
/// it; numbers count from 0 in the order of the list.
#[macro_export]
macro_rules! named_enum {
    ($(#[$edoc:meta])* $vis:vis enum $enum:ident {
        $($(#[$doc:meta])* $variant:ident = $name:literal,)*
    }) => {
        $(#[$edoc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        $vis enum $enum { $($(#[$doc])* $variant,)* }

        impl $enum {
            /// All values, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The name that people and files use.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The value with this name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|value| value.name() == name)
            }

            /// The value with this number.
            #[must_use]
            pub fn from_number(number: u64) -> Option<Self> {
                usize::try_from(number).ok().and_then(|index| Self::ALL.get(index).copied())
            }
        }
    };
}

#[cfg(test)]
mod tests {
    named_enum! {
        /// Seasons, for the test.
        enum Season {
            /// Warm.
            Summer = "summer",
            /// Cold.
            Winter = "winter",
        }
    }

    #[test]
    fn names_and_numbers_lead_back() {
        for (number, season) in (0..).zip(Season::ALL) {
            assert_eq!(Season::from_name(season.name()), Some(*season));
            assert_eq!(Season::from_number(number), Some(*season));
        }
        assert_eq!(Season::from_number(2), None);
        assert_eq!(Season::from_name("spring"), None);
    }
}
