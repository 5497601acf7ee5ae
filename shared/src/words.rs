//! Structures that cross the boundary as a sequence of 64-bit words.

/// Defines a structure of `u64` fields together with its encoding: one word a field, in order.
#[macro_export]
macro_rules! words_struct {
    ($(#[$doc:meta])* $vis:vis struct $name:ident { $($(#[$fdoc:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        $vis struct $name { $($(#[$fdoc])* pub $field: u64,)* }

        impl $name {
            /// Number of words of the encoding.
            pub const WORDS: usize = [$(stringify!($field)),*].len();

            /// Names of the fields, in the order of the words.
            pub const FIELDS: [&'static str; Self::WORDS] = [$(stringify!($field)),*];

            /// One word a field, in order.
            #[must_use]
            pub const fn to_words(self) -> [u64; Self::WORDS] {
                [$(self.$field),*]
            }

            /// The structure of these words.
            #[must_use]
            pub const fn from_words(words: &[u64; Self::WORDS]) -> Self {
                let [$($field),*] = *words;
                Self { $($field),* }
            }
        }
    };
}

#[cfg(test)]
mod tests {
    words_struct! {
        /// A structure for the test.
        struct Pair { /// First.
            first, /// Second.
            second, }
    }

    #[test]
    fn words_keep_their_order() {
        let pair = Pair { first: 1, second: 2 };
        assert_eq!(pair.to_words(), [1, 2]);
        assert_eq!(Pair::from_words(&[1, 2]), pair);
        assert_eq!(Pair::FIELDS, ["first", "second"]);
    }
}
