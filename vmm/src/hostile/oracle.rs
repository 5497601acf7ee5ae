//! What a guest left in its tables and registers, found out without the audit: a walk of its own, over
//! memory as a processor would read it.

use super::notes::Told;
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use lacuna_abi::addr::{Gfn, Gpa};
use lacuna_abi::layout::{MERMAP, POOL, WINDOW_STRIDE};
use std::collections::{BTreeMap, BTreeSet};

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const NO_EXECUTE: u64 = 1 << 63;

const WP: u64 = 1 << 16;
const PG: u64 = 1 << 31;
const PGE: u64 = 1 << 7;
const NXE: u64 = 1 << 11;

/// Most entries that are looked at: what lies beyond is not claimed.
const BUDGET: u64 = 1 << 16;

/// What a guest left.
pub(super) struct Left<'a> {
    pub(super) memory: &'a Memory,
    /// The root that all CPUs start with.
    pub(super) root: Gpa,
    /// Roots that were registered beside it, if that is known.
    pub(super) roots: Option<&'a BTreeSet<Gpa>>,
    /// Of each CPU that runs.
    pub(super) registers: Vec<(u8, Registers)>,
    pub(super) told: &'a Told,
}

/// One thing that a rule forbids, if there is one. Only what is there for certain: addresses with
/// reserved bits, which a processor faults on, map nothing.
pub(super) fn forbidden(left: &Left<'_>) -> Option<String> {
    registers(left).or_else(|| {
        let mut walk = Walk { left, budget: BUDGET, rights: BTreeMap::new() };
        let others = left.roots.into_iter().flatten().copied();
        let mut roots = std::iter::once(left.root).chain(others);
        roots.find_map(|root| walk.table(root, 4, 0, (true, true, true)))
    })
}

fn registers(left: &Left<'_>) -> Option<String> {
    for (cpu, registers) in &left.registers {
        for (name, value, bits) in [
            ("CR0", registers.cr0, WP | PG),
            ("CR4", registers.cr4, PGE),
            ("EFER", registers.efer, NXE),
        ] {
            if value & bits != bits {
                return Some(format!("CPU {cpu} has {name} = {value:#x}"));
            }
        }
        let root = Gpa(registers.cr3 & ADDRESS);
        let known = |roots: &BTreeSet<Gpa>| root == left.root || roots.contains(&root);
        if !left.roots.is_none_or(known) {
            return Some(format!("CPU {cpu} is on the root {root}, which is not registered"));
        }
    }
    None
}

struct Walk<'a> {
    left: &'a Left<'a>,
    budget: u64,
    /// Of each frame, whether it is writable and executable somewhere.
    rights: BTreeMap<u64, (bool, bool)>,
}

impl Walk<'_> {
    /// Looks through a table of `level` that spans from `base` on, reached with these rights: writable,
    /// user, executable.
    fn table(
        &mut self,
        table: Gpa,
        level: u32,
        base: u64,
        rights: (bool, bool, bool),
    ) -> Option<String> {
        if !self.left.memory.layout().pool.contains(table) {
            return Some(format!("a table of level {level} at {table}, outside the table pool"));
        }
        for index in 0..512 {
            self.budget = self.budget.checked_sub(1)?;
            let entry = self.left.memory.load(Gpa(table.0 + 8 * index)).unwrap_or(0);
            if entry & PRESENT == 0 || (level == 4 && entry & LARGE != 0) {
                continue;
            }
            let (writable, user, executable) = rights;
            let rights = (
                writable && entry & WRITABLE != 0,
                user && entry & USER != 0,
                executable && entry & NO_EXECUTE == 0,
            );
            let va = base + (index << (12 + 9 * (level - 1)));
            let leaf = level == 1 || (level < 4 && entry & LARGE != 0);
            let found = if leaf {
                self.leaf(entry, level, va, rights)
            } else if entry & ADDRESS & !0xff_ffff_ffff != 0 {
                // Beyond the 40 bits that every processor has.
                None
            } else {
                self.table(Gpa(entry & ADDRESS), level - 1, va, rights)
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }

    fn leaf(
        &mut self,
        entry: u64,
        level: u32,
        va: u64,
        (writable, user, executable): (bool, bool, bool),
    ) -> Option<String> {
        let frames = 1_u64 << (9 * (level - 1));
        let address = entry & ADDRESS;
        // Bit 12 of a large entry chooses the memory type; those up to the page's size are reserved.
        let reserved = if level == 1 { 0 } else { ((frames << 12) - 1) & !0x1fff };
        if address & reserved != 0 || address & !0xff_ffff_ffff != 0 {
            return None;
        }
        let first = (address >> 12) & !(frames - 1);
        let va = if va >> 47 == 0 { va } else { va | 0xffff_0000_0000_0000 };
        let layout = *self.left.memory.layout();
        let (low_end, zone) = (layout.scratch.end().0 >> 12, layout.zone_frames());
        let there = |frame: u64| frame < low_end || zone.contains(Gfn(frame));
        let told = self.left.told;
        for (nth, frame) in (first..first + frames).enumerate().filter(|(_, frame)| there(*frame)) {
            if user {
                return Some(format!("{frame:#x} is mapped at {va:#x} for ring 3"));
            }
            let pool = layout.pool.contains(Gpa(frame << 12));
            let own = POOL.0.wrapping_add((frame << 12).wrapping_sub(layout.pool.gpa.0));
            if pool && writable && own != va + ((nth as u64) << 12) {
                return Some(format!("the table {frame:#x} is mapped writable at {va:#x}"));
            }
            let rights = self.rights.entry(frame).or_default();
            *rights = (rights.0 || writable, rights.1 || executable);
            if *rights == (true, true) {
                return Some(format!("{frame:#x} is writable and executable"));
            }
            if told.secret.contains(&Gfn(frame)) {
                if entry & GLOBAL != 0 {
                    return Some(format!("the secret {frame:#x} is mapped globally at {va:#x}"));
                }
                let window = va.checked_sub(MERMAP.0).map(|offset| offset / WINDOW_STRIDE);
                let owner = window.and_then(|window| u8::try_from(window).ok());
                let opens = owner.and_then(|owner| told.open.get(&(Gfn(frame), owner)));
                if opens.is_none_or(|opens| *opens == 0) {
                    return Some(format!("the secret {frame:#x} is mapped at {va:#x}"));
                }
            }
        }
        None
    }
}
