//! What processors do differently.

use lacuna_abi::named_enum;

named_enum! {
    /// How a processor invalidates, where processors differ. By default as the one that promises
    /// least.
    #[derive(Default)]
    pub enum Profile {
        /// AMD: with EFER.TCE set, INVLPG drops only the cached paths that lead to its address (AMD
        /// APM volume 2, "Extended Feature Enable Register (EFER)").
        Amd = "amd",
        /// Intel, as the manual says.
        Intel = "intel",
        /// Intel processors on which INVLPG may leave global translations while CR4.PCIDE is set
        /// (Linux, commit ce0b15d11ad8, "x86/mm: Avoid incomplete Global INVLPG flushes").
        #[default]
        IntelInvlpgErratum = "intel-invlpg-erratum",
    }
}

/// Models of family 6 with the INVLPG erratum: Alder Lake, Alder Lake-L, Gracemont, and Raptor Lake,
/// -P, -S.
const ERRATUM: [u32; 6] = [0x97, 0x9a, 0xbe, 0xb7, 0xba, 0xbf];

impl Profile {
    /// The profile of a processor, by vendor, family and model as CPUID gives them. One that is
    /// neither AMD's nor Intel's gets the profile that promises least.
    #[must_use]
    pub fn of(vendor: &str, family: u32, model: u32) -> Self {
        match vendor {
            "AuthenticAMD" | "HygonGenuine" => Self::Amd,
            "GenuineIntel" if family != 6 || !ERRATUM.contains(&model) => Self::Intel,
            _ => Self::IntelInvlpgErratum,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_follow_vendor_family_and_model() {
        let intel = |family, model| Profile::of("GenuineIntel", family, model);
        assert_eq!(intel(6, 0x97), Profile::IntelInvlpgErratum, "Alder Lake");
        assert_eq!(intel(6, 0xba), Profile::IntelInvlpgErratum, "Raptor Lake-P");
        assert_eq!(intel(6, 0x3c), Profile::Intel, "Haswell");
        assert_eq!(intel(15, 0x97), Profile::Intel, "another family");
        assert_eq!(Profile::of("AuthenticAMD", 25, 0x21), Profile::Amd);
        assert_eq!(Profile::of("HygonGenuine", 24, 0), Profile::Amd);
        assert_eq!(Profile::of("CentaurHauls", 6, 0), Profile::IntelInvlpgErratum);
    }
}
