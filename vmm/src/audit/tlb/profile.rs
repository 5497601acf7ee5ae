//! What processors do differently.

use lacuna_abi::named_enum;

named_enum! {
    /// How a processor invalidates, where processors differ.
    pub enum Profile {
        /// AMD: with EFER.TCE set, INVLPG drops only the cached paths that lead to its address (AMD
        /// APM volume 2, "Extended Feature Enable Register (EFER)").
        Amd = "amd",
        /// Intel, as the manual says.
        Intel = "intel",
        /// Intel processors on which INVLPG may leave global translations while CR4.PCIDE is set
        /// (Linux, commit ce0b15d11ad8, "x86/mm: Avoid incomplete Global INVLPG flushes").
        IntelInvlpgErratum = "intel-invlpg-erratum",
    }
}

/// Models of family 6 with the INVLPG erratum: Alder Lake, Alder Lake-L, Gracemont, and Raptor Lake,
/// -P, -S.
const ERRATUM: [u32; 6] = [0x97, 0x9a, 0xbe, 0xb7, 0xba, 0xbf];

impl Profile {
    /// The profile of a processor with this vendor string and family, model and stepping as leaf 1 of
    /// CPUID gives them in EAX. What is not AMD's is taken for Intel's.
    #[must_use]
    pub fn of_cpuid(vendor: &[u8; 12], signature: u32) -> Self {
        let family = (signature >> 8 & 0xf)
            + if signature >> 8 & 0xf == 0xf { signature >> 20 & 0xff } else { 0 };
        let model = (signature >> 4 & 0xf) | (signature >> 12 & 0xf0);
        match vendor {
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            b"GenuineIntel" if family == 6 && ERRATUM.contains(&model) => Self::IntelInvlpgErratum,
            _ => Self::Intel,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_follow_vendor_family_and_model() {
        let intel = |signature| Profile::of_cpuid(b"GenuineIntel", signature);
        assert_eq!(intel(0x0009_0672), Profile::IntelInvlpgErratum, "Alder Lake");
        assert_eq!(intel(0x000b_06a2), Profile::IntelInvlpgErratum, "Raptor Lake-P");
        assert_eq!(intel(0x0003_06c3), Profile::Intel, "Haswell");
        assert_eq!(intel(0x0080_0f12), Profile::Intel, "another family");
        assert_eq!(Profile::of_cpuid(b"AuthenticAMD", 0x00a2_0f12), Profile::Amd);
        assert_eq!(Profile::of_cpuid(b"HygonGenuine", 0x0090_0f01), Profile::Amd);
        assert_eq!(Profile::of_cpuid(b"CentaurHauls", 0), Profile::Intel);
    }
}
