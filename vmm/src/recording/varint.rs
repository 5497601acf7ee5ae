//! Numbers as bytes: seven bits each, the lowest first.

/// Most bytes of a number.
const MAX_BYTES: u32 = 10;

/// Appends a number.
pub(super) fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        // The mask leaves seven bits.
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

/// Reads a number whose bytes `next` gives; `Ok(None)` if it is longer than any number is.
pub(super) fn get<E>(mut next: impl FnMut() -> Result<u8, E>) -> Result<Option<u64>, E> {
    let mut value = 0;
    for index in 0..MAX_BYTES {
        let byte = next()?;
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * index;
        if (bits << shift) >> shift != bits {
            return Ok(None);
        }
        value |= bits << shift;
        if byte < 0x80 {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// A difference as a number that is small if the difference is, up or down.
pub(super) const fn zigzag(from: u64, to: u64) -> u64 {
    let difference = to.wrapping_sub(from).cast_signed();
    (difference << 1 ^ difference >> 63).cast_unsigned()
}

/// What lies so far from `from`.
pub(super) const fn unzigzag(from: u64, by: u64) -> u64 {
    let difference = (by >> 1) ^ (by & 1).wrapping_neg();
    from.wrapping_add(difference)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_and_differences_come_back(value in any::<u64>(), from in any::<u64>()) {
            let mut bytes = Vec::new();
            put(&mut bytes, value);
            let mut rest = bytes.iter().copied();
            prop_assert_eq!(get(|| rest.next().ok_or(())), Ok(Some(value)));
            prop_assert_eq!(rest.next(), None);
            prop_assert_eq!(unzigzag(from, zigzag(from, value)), value);
        }

        #[test]
        fn any_bytes_are_a_number_or_none(bytes in prop::collection::vec(any::<u8>(), 0..12)) {
            let mut rest = bytes.iter().copied();
            let _ = get(|| rest.next().ok_or(()));
        }
    }

    #[test]
    fn a_number_of_more_than_64_bits_is_none() {
        let mut bytes = [0xff; 9].into_iter().chain([2]);
        assert_eq!(get(|| bytes.next().ok_or(())), Ok(None));
    }
}
