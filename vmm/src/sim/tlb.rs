//! What a simulated CPU caches of leaf entries, and what an invalidation must take from it (SDM
//! volume 3, "Caching Translation Information").
//!
//! Nothing leaves by itself but for want of room: translations stay for as long as the
//! architecture lets them. [`Tlb::vanish`] is how they go at random.

use super::random::Random;
use lacuna_abi::addr::{BLOCK_FRAMES, Gfn, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::paging::Level;

/// Translations of 4 KiB that a CPU has room for: its window twice over.
const SMALL: usize = 1024;
/// Translations of 2 MiB.
const LARGE: usize = 256;

/// A cached translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// First address.
    pub va: Gva,
    /// First frame.
    pub frame: Gfn,
    /// State of the second stage that it was made under ([`super::frames::Frames::stamp`]).
    pub stamp: u64,
    /// State of the tables that it was last compared with ([`super::versions::Versions`]).
    pub version: u64,
    /// Process-context identifier.
    pub pcid: u16,
    /// What is cached: 4 KiB or 2 MiB.
    pub size: Level,
    /// The entry that it comes from: a large page may be cached in parts.
    pub leaf: Level,
    /// It holds under every PCID and survives a CR3 load.
    pub global: bool,
    /// Stores are allowed.
    pub writable: bool,
}

impl Translation {
    /// Whether it translates `va` under `pcid`.
    #[inline]
    #[must_use]
    pub const fn serves(&self, va: Gva, pcid: u16) -> bool {
        va.align_down(self.size.span()).0 == self.va.0 && (self.global || self.pcid == pcid)
    }

    /// Physical address of `va`, which it translates.
    #[inline]
    #[must_use]
    pub const fn gpa(&self, va: Gva) -> Gpa {
        Gpa(self.frame.gpa().0 + (va.0 & (self.size.span() - 1)))
    }

    /// Whether `va` lies in the page that the entry maps, of which this may be a part.
    const fn is_of_page(&self, va: Gva) -> bool {
        va.align_down(self.leaf.span()).0 == self.va.align_down(self.leaf.span()).0
    }
}

/// An operation that invalidates cached translations, named after what must go (SDM volume 3,
/// "Operations that Invalidate TLBs and Paging-Structure Caches").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invalidation {
    /// INVLPG: the page under the current PCID, global or not, global translations of it under
    /// any PCID, and every path of the current PCID.
    Page {
        /// An address in the page.
        va: Gva,
        /// The current PCID.
        pcid: u16,
    },
    /// INVPCID of type 0: the page under this PCID and the paths to it, but no global translation.
    PageOfPcid {
        /// An address in the page.
        va: Gva,
        /// The PCID.
        pcid: u16,
    },
    /// INVPCID of type 1, and MOV to CR3 with bit 63 clear: what is not global of one PCID. With
    /// CR4.PCIDE clear there is only PCID 0.
    Pcid(u16),
    /// INVPCID of type 3: what is not global, of all PCIDs.
    NonGlobal,
    /// INVPCID of type 2, a change of CR4.PGE, CR4.PCIDE or CR0.PG: everything.
    Everything,
}

impl Invalidation {
    /// Whether `cached` must go.
    #[must_use]
    pub const fn removes(&self, cached: &Translation) -> bool {
        match *self {
            Self::Page { va, pcid } => {
                cached.is_of_page(va) && (cached.global || cached.pcid == pcid)
            }
            Self::PageOfPcid { va, pcid } => {
                cached.is_of_page(va) && !cached.global && cached.pcid == pcid
            }
            Self::Pcid(pcid) => !cached.global && cached.pcid == pcid,
            Self::NonGlobal => !cached.global,
            Self::Everything => true,
        }
    }
}

/// Of which 2 MiB pages parts may be cached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Parts {
    #[default]
    None,
    /// Of the one at this address.
    Of(Gva),
    Several,
}

/// The leaf translations that one CPU caches.
#[derive(Clone, Debug)]
pub struct Tlb {
    small: Box<[Option<Translation>]>,
    large: Box<[Option<Translation>]>,
    /// For each place of a 2 MiB page, of which that belongs there parts may be cached.
    parts: [Parts; LARGE],
    /// Parts of still larger pages were cached since everything was last dropped.
    of_giants: bool,
}

impl Default for Tlb {
    fn default() -> Self {
        let empty = |count| vec![None; count].into_boxed_slice();
        Self {
            small: empty(SMALL),
            large: empty(LARGE),
            parts: [Parts::None; LARGE],
            of_giants: false,
        }
    }
}

impl Tlb {
    /// What translates `va`: if two could, either.
    #[inline]
    pub fn lookup(&mut self, va: Gva, pcid: u16, random: &mut Random) -> Option<&mut Translation> {
        let serves = |cached: &Option<Translation>| cached.is_some_and(|c| c.serves(va, pcid));
        let (small, large) = (small_place(va), large_place(va));
        let mut use_small = serves(&self.small[small]);
        let use_large = serves(&self.large[large]);
        if use_small && use_large {
            use_small = random.one_in(2);
        }
        if use_small {
            self.small[small].as_mut()
        } else if use_large {
            self.large[large].as_mut()
        } else {
            None
        }
    }

    /// Caches a translation, unless another has its place and keeps it: which of them goes is left
    /// to chance.
    pub fn insert(&mut self, new: Translation, random: &mut Random) {
        let place = match new.size {
            Level::Pt => &mut self.small[small_place(new.va)],
            _ => &mut self.large[large_place(new.va)],
        };
        let other = place.is_some_and(|old| (old.va, old.pcid) != (new.va, new.pcid));
        if other && random.one_in(2) {
            return;
        }
        *place = Some(new);
        self.of_giants |= new.leaf > Level::Pd;
        if new.leaf > new.size {
            let (block, parts) = (block_of(new.va), &mut self.parts[large_place(new.va)]);
            *parts = match *parts {
                Parts::None => Parts::Of(block),
                Parts::Of(other) if other.0 == block.0 => Parts::Of(block),
                Parts::Of(_) | Parts::Several => Parts::Several,
            };
        }
    }

    /// Drops what translates `va` at this size.
    pub fn forget(&mut self, va: Gva, size: Level) {
        match size {
            Level::Pt => self.small[small_place(va)] = None,
            _ => self.large[large_place(va)] = None,
        }
    }

    /// Drops one translation, or none, by chance.
    pub fn vanish(&mut self, random: &mut Random) {
        if random.one_in(2) {
            self.small[random.below(SMALL as u64) as usize] = None;
        } else {
            self.large[random.below(LARGE as u64) as usize] = None;
        }
    }

    /// Drops what must go, and nothing else.
    pub fn invalidate(&mut self, what: &Invalidation) {
        if let Invalidation::Page { va, .. } | Invalidation::PageOfPcid { va, .. } = *what
            && !self.of_giants
        {
            // Each page has one place, and so has each of its parts.
            let place = large_place(va);
            drop_if(&mut self.large[place], what);
            let block = block_of(va);
            if !matches!(self.parts[place], Parts::Several) && self.parts[place] != Parts::Of(block)
            {
                drop_if(&mut self.small[small_place(va)], what);
                return;
            }
            let mut left = false;
            for page in 0..BLOCK_FRAMES {
                let cached = &mut self.small[small_place(block.wrapping_add(page * PAGE_SIZE))];
                drop_if(cached, what);
                left |= cached.is_some_and(|cached| cached.leaf > Level::Pt);
            }
            if !left && self.parts[place] == Parts::Of(block) {
                self.parts[place] = Parts::None;
            }
            return;
        }
        self.small.iter_mut().chain(&mut self.large).for_each(|cached| drop_if(cached, what));
        if *what == Invalidation::Everything {
            self.parts = [Parts::None; LARGE];
            self.of_giants = false;
        }
    }

    /// Everything cached.
    pub fn iter(&self) -> impl Iterator<Item = &Translation> {
        self.small.iter().chain(&self.large).flatten()
    }
}

fn drop_if(cached: &mut Option<Translation>, what: &Invalidation) {
    if cached.is_some_and(|cached| what.removes(&cached)) {
        *cached = None;
    }
}

/// First address of the 2 MiB that `va` lies in.
#[inline]
const fn block_of(va: Gva) -> Gva {
    va.align_down(Level::Pd.span())
}

/// Consecutive pages have consecutive places, and those of another 1 GiB are shifted.
#[inline]
const fn small_place(va: Gva) -> usize {
    let page = va.0 / PAGE_SIZE;
    ((page ^ (page >> 18).wrapping_mul(0x2b5)) % SMALL as u64) as usize
}

#[inline]
const fn large_place(va: Gva) -> usize {
    let block = va.0 >> Level::Pd.span_shift();
    ((block ^ (block >> 9).wrapping_mul(0x35)) % LARGE as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const VA: Gva = Gva(0xffff_9100_0040_3000);
    const SMALL_PAGE: Translation = Translation {
        va: VA,
        frame: Gfn(7),
        stamp: 0,
        version: 0,
        pcid: 1,
        size: Level::Pt,
        leaf: Level::Pt,
        global: false,
        writable: true,
    };
    const LARGE_PAGE: Translation = Translation {
        va: Gva(0xffff_9100_0040_0000),
        frame: Gfn(512),
        size: Level::Pd,
        leaf: Level::Pd,
        ..SMALL_PAGE
    };
    /// A part of a 2 MiB page: another page of the block that `VA` lies in.
    const PART: Translation =
        Translation { va: Gva(0xffff_9100_0040_9000), leaf: Level::Pd, ..SMALL_PAGE };

    const fn global(of: Translation) -> Translation {
        Translation { global: true, ..of }
    }

    const fn under(pcid: u16, of: Translation) -> Translation {
        Translation { pcid, ..of }
    }

    /// Whether `cached` is still there after `what`.
    fn survives(cached: Translation, what: Invalidation) -> bool {
        let mut tlb = Tlb::default();
        let mut random = Random::new(0, 0);
        tlb.insert(cached, &mut random);
        tlb.invalidate(&what);
        let left = tlb.lookup(cached.va, cached.pcid, &mut random).is_some();
        assert_eq!(left, tlb.iter().count() == 1);
        left
    }

    #[test]
    fn every_invalidation_removes_what_it_must_and_no_more() {
        let page = Invalidation::Page { va: VA, pcid: 1 };
        let of_pcid = Invalidation::PageOfPcid { va: VA, pcid: 1 };
        let pcid = Invalidation::Pcid(1);
        let [non_global, everything] = [Invalidation::NonGlobal, Invalidation::Everything];
        let elsewhere = Translation { va: VA.wrapping_add(PAGE_SIZE), ..SMALL_PAGE };
        let other_block = Translation { va: Gva(LARGE_PAGE.va.0 + (2 << 21)), ..LARGE_PAGE };
        let all = [page, of_pcid, pcid, non_global, everything];
        // Whether each of them, in this order, removes it.
        let table = [
            ("a page", SMALL_PAGE, [true, true, true, true, true]),
            ("a global page", global(SMALL_PAGE), [true, false, false, false, true]),
            ("another PCID's page", under(2, SMALL_PAGE), [false, false, false, true, true]),
            ("its global page", under(2, global(SMALL_PAGE)), [true, false, false, false, true]),
            ("the next page", elsewhere, [false, false, true, true, true]),
            ("its global page", global(elsewhere), [false, false, false, false, true]),
            ("a large page", LARGE_PAGE, [true, true, true, true, true]),
            ("a global large page", global(LARGE_PAGE), [true, false, false, false, true]),
            ("another large page", other_block, [false, false, true, true, true]),
            ("a part of the large page", PART, [true, true, true, true, true]),
            ("a global part of it", global(PART), [true, false, false, false, true]),
            ("a part of another PCID's", under(2, PART), [false, false, false, true, true]),
        ];
        for (name, cached, removed) in table {
            for (what, removed) in all.iter().zip(removed) {
                assert_eq!(!survives(cached, *what), removed, "{name} after {what:?}");
            }
        }
    }

    #[test]
    fn a_global_translation_serves_every_pcid_and_others_only_their_own() {
        assert!(SMALL_PAGE.serves(VA.wrapping_add(5), 1) && !SMALL_PAGE.serves(VA, 2));
        assert!(global(SMALL_PAGE).serves(VA, 2));
        assert!(!SMALL_PAGE.serves(VA.wrapping_add(PAGE_SIZE), 1));
        assert_eq!(LARGE_PAGE.gpa(VA), Gpa((512 << 12) + 0x3000));
    }

    #[test]
    fn of_two_that_translate_an_address_both_get_used() {
        let mut tlb = Tlb::default();
        let mut random = Random::new(3, 0);
        tlb.insert(SMALL_PAGE, &mut random);
        tlb.insert(LARGE_PAGE, &mut random);
        let mut seen = [false; 2];
        for _ in 0..50 {
            let frame = tlb.lookup(VA, 1, &mut random).unwrap().gpa(VA).frame();
            seen[usize::from(frame == Gfn(7))] = true;
        }
        assert_eq!(seen, [true; 2]);
    }

    #[test]
    fn what_has_the_place_of_another_sometimes_keeps_it() {
        let mut random = Random::new(3, 0);
        let mut others = (1..).map(|n| Gva(VA.0 + n * PAGE_SIZE * SMALL as u64));
        let other = others.find(|va| small_place(*va) == small_place(VA)).unwrap();
        let mut kept = 0;
        for _ in 0..100 {
            let mut tlb = Tlb::default();
            tlb.insert(SMALL_PAGE, &mut random);
            tlb.insert(Translation { va: other, ..SMALL_PAGE }, &mut random);
            assert_eq!(tlb.iter().count(), 1);
            kept += u32::from(tlb.lookup(VA, 1, &mut random).is_some());
        }
        assert!((20..80).contains(&kept), "{kept}");
    }

    #[test]
    fn a_window_fits_and_everything_vanishes_in_the_end() {
        let mut tlb = Tlb::default();
        let mut random = Random::new(3, 0);
        for page in 0..512 {
            tlb.insert(Translation { va: Gva(VA.0 + page * PAGE_SIZE), ..SMALL_PAGE }, &mut random);
        }
        assert_eq!(tlb.iter().count(), 512);
        (0..50_000).for_each(|_| tlb.vanish(&mut random));
        assert_eq!(tlb.iter().count(), 0);
    }
}
