//! Allocation flags as Linux prints them in its trace events.
//!
//! The kernel takes the longest known combinations first (`GFP_KERNEL`, `GFP_HIGHUSER_MOVABLE`, …)
//! and then single bits (`__GFP_ZERO`, …), joined by a bar; bits without a name follow as one
//! hexadecimal number, and no bits at all are printed as `none`. So `__GFP_DIRECT_RECLAIM`, which
//! says that the caller may block, is mostly hidden inside a combination.

/// The flags of one allocation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flags<'a>(pub &'a str);

impl<'a> Flags<'a> {
    /// The single names.
    pub fn names(self) -> impl Iterator<Item = &'a str> {
        self.0.split('|').map(str::trim).filter(|name| !name.is_empty())
    }

    /// Whether a flag of exactly this name is given.
    #[must_use]
    pub fn has(self, name: &str) -> bool {
        self.names().any(|n| n == name)
    }

    /// Whether the memory must be zeroed.
    #[must_use]
    pub fn zero(self) -> bool {
        self.has("__GFP_ZERO")
    }

    /// Whether this is memory of a user process.
    #[must_use]
    pub fn user(self) -> bool {
        self.names().any(|name| name.starts_with("GFP_HIGHUSER"))
    }

    /// Whether the caller must not block: the flags do not contain `__GFP_DIRECT_RECLAIM`.
    ///
    /// Single bits contain it if they say so. Of the combinations, those in `lacks_reclaim` do
    /// not. All others do, including combinations that this version does not know: a caller that
    /// blocks is the ordinary case. `GFP_NOWAIT` and `GFP_ATOMIC` decide against other
    /// combinations, but not against the bit itself: the kernel prints `__GFP_RECLAIM` alone as
    /// `GFP_NOWAIT|__GFP_DIRECT_RECLAIM`.
    #[must_use]
    pub fn noblock(self) -> bool {
        if self.has("__GFP_DIRECT_RECLAIM") || self.has("__GFP_RECLAIM") {
            return false;
        }
        self.has("GFP_NOWAIT") || self.has("GFP_ATOMIC") || self.names().all(lacks_reclaim)
    }
}

/// Whether a name other than `__GFP_DIRECT_RECLAIM` and `__GFP_RECLAIM` stands for flags that do
/// not contain them.
fn lacks_reclaim(name: &str) -> bool {
    name.starts_with("__GFP_")
        || name.starts_with("0x")
        || matches!(
            name,
            "none" | "GFP_NOWAIT" | "GFP_ATOMIC" | "GFP_TRANSHUGE_LIGHT" | "GFP_DMA" | "GFP_DMA32"
        )
}

/// Whether `name` could be the name of a flag: `GFP_` or `__GFP_`, then capital letters, digits
/// and underscores.
#[must_use]
pub fn is_gfp_name(name: &str) -> bool {
    let rest = name.strip_prefix("__").unwrap_or(name).strip_prefix("GFP_");
    rest.is_some_and(|rest| {
        let proper = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
        !rest.is_empty() && rest.bytes().all(proper)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn combinations_with_direct_reclaim_may_block() {
        for flags in [
            "GFP_KERNEL",
            "GFP_KERNEL_ACCOUNT|__GFP_ZERO|__GFP_COMP",
            "GFP_USER",
            "GFP_HIGHUSER",
            "GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP",
            "GFP_NOFS|__GFP_HIGHMEM|__GFP_MOVABLE|__GFP_NOWARN|__GFP_NORETRY",
            "GFP_NOIO",
            "GFP_TRANSHUGE",
            "GFP_NEVER_SEEN_BEFORE",
            "GFP_DMA32|GFP_KERNEL",
        ] {
            assert!(!Flags(flags).noblock(), "{flags}");
        }
    }

    #[test]
    fn flags_without_direct_reclaim_must_not_block() {
        for flags in [
            "GFP_NOWAIT",
            "GFP_NOWAIT|__GFP_NOWARN|__GFP_COMP",
            "GFP_ATOMIC|__GFP_ZERO",
            "GFP_TRANSHUGE_LIGHT|__GFP_ZERO",
            "GFP_TRANSHUGE_LIGHT|__GFP_KSWAPD_RECLAIM",
            "__GFP_ZERO",
            "__GFP_HIGHMEM|__GFP_NEVER_SEEN_BEFORE",
            "GFP_DMA32",
            "none",
            "0x1000000",
            "GFP_KERNEL|GFP_ATOMIC",
        ] {
            assert!(Flags(flags).noblock(), "{flags}");
        }
    }

    #[test]
    fn the_bit_itself_decides() {
        for flags in
            ["GFP_NOWAIT|__GFP_DIRECT_RECLAIM", "__GFP_RECLAIM", "GFP_ATOMIC|__GFP_RECLAIM"]
        {
            assert!(!Flags(flags).noblock(), "{flags}");
        }
    }

    #[test]
    fn user_memory_and_zeroing_are_recognised_by_whole_names() {
        assert!(Flags("__GFP_COMP|GFP_HIGHUSER_MOVABLE").user());
        assert!(Flags("GFP_HIGHUSER").user());
        assert!(!Flags("GFP_NOFS|__GFP_HIGHMEM").user());
        assert!(Flags("GFP_KERNEL|__GFP_ZERO").zero());
        assert!(!Flags("GFP_KERNEL|__GFP_ZEROTAGS").zero());
    }

    #[test]
    fn only_names_of_flags_are_names_of_flags() {
        for name in ["GFP_USER", "__GFP_ZERO", "GFP_DMA32", "GFP_HIGHUSER_MOVABLE"] {
            assert!(is_gfp_name(name), "{name}");
        }
        for name in ["", "GFP_", "__GFP_", "_GFP_USER", "gfp_user", "GFP_USER|__GFP_ZERO", "USER"] {
            assert!(!is_gfp_name(name), "{name}");
        }
    }
}
