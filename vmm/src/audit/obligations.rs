//! Duties: translations that were revoked and that some CPU may still cache.
//!
//! What a TLB holds cannot be known; what it must have dropped can. A duty is kept for each
//! revoked window or direct-map translation until an operation that must remove it has followed
//! on every CPU that may cache it. Big flushes are epochs ([`Epochs`]) and are compared with, not
//! looped over; INVLPG and completed seals reach their duties through two indexes.

use super::duty::{Duty, Key, PageFlush, Spot, frame_part, va_part};
use super::epochs::{CpuSet, Epochs, members, only};
use lacuna_abi::addr::{FrameRange, Gfn, Gva};
use lacuna_abi::paging::Level;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Most duties that are kept. A guest that follows any flush discipline stays far below.
pub(super) const MAX_DUTIES: usize = 1 << 16;

/// All duties.
#[derive(Clone, Debug)]
pub(super) struct Obligations {
    duties: BTreeMap<u64, Duty>,
    by_frame: BTreeSet<Spot>,
    by_va: BTreeSet<Spot>,
    by_key: HashMap<Key, u64>,
    next: u64,
    sweep_at: usize,
}

/// A duty had to be dropped: there are too many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TooMany;

impl Obligations {
    pub(super) fn new() -> Self {
        Self {
            duties: BTreeMap::new(),
            by_frame: BTreeSet::new(),
            by_va: BTreeSet::new(),
            by_key: HashMap::new(),
            next: 0,
            sweep_at: 1024,
        }
    }

    /// Adds a run of entries of one table that map consecutive frames.
    pub(super) fn add(&mut self, run: &Duty, epochs: &Epochs) -> Result<(), TooMany> {
        if run.level == Level::Pt {
            return run
                .frames
                .by_block()
                .try_for_each(|frames| self.insert(run.part(frames), epochs));
        }
        let step = run.level.frames();
        (0..run.frames.count() / step).try_for_each(|entry| {
            let start = Gfn(run.frames.start().0 + entry * step);
            let frames = FrameRange::new(start, step).ok_or(TooMany)?;
            let va = run.va.wrapping_add(entry * run.level.span());
            self.insert(Duty { va, frames, ..*run }, epochs)
        })
    }

    /// INVLPG on one CPU.
    pub(super) fn invalidate(
        &mut self,
        cpu: u8,
        flush: &PageFlush,
        epochs: &Epochs,
    ) -> Result<(), TooMany> {
        for id in self.at_addresses(flush.va, flush.last()) {
            let Some(duty) = self.duties.get(&id).copied() else { continue };
            if duty.cpus & only(cpu) == 0 {
                continue;
            }
            if let Some(gone) = flush.removes(&duty) {
                self.remove(id);
                let others = Duty { cpus: duty.cpus & !only(cpu), ..duty.part(gone) };
                for piece in duty.without(gone).chain([others]) {
                    self.insert(piece, epochs)?;
                }
            }
        }
        Ok(())
    }

    /// No translation to these frames that was revoked before `seq` is left on any CPU: their seal
    /// completed.
    pub(super) fn discharge(
        &mut self,
        frames: FrameRange,
        seq: u64,
        epochs: &Epochs,
    ) -> Result<(), TooMany> {
        for id in self.on_frames(frames) {
            let Some(duty) = self.duties.get(&id).copied() else { continue };
            if duty.seq < seq && duty.frames.intersection(frames).is_some() {
                self.remove(id);
                duty.without(frames).try_for_each(|piece| self.insert(piece, epochs))?;
            }
        }
        Ok(())
    }

    /// Duties for any of these frames, with the CPUs that may still cache them.
    pub(super) fn of_frames(&self, frames: FrameRange, epochs: &Epochs) -> Vec<Duty> {
        let touching = |duty: &Duty| duty.frames.intersection(frames).is_some();
        self.pending(self.on_frames(frames), touching, epochs)
    }

    /// Duties for any address in `first..=last`, cut to these addresses where they are of small
    /// pages, with the CPUs that may still cache them.
    pub(super) fn at(&self, first: Gva, last: Gva, epochs: &Epochs) -> Vec<Duty> {
        let touching = |duty: &Duty| duty.va <= last && duty.last() >= first;
        let duties = self.pending(self.at_addresses(first, last), touching, epochs);
        duties.iter().map(|duty| duty.between(first, last)).collect()
    }

    fn pending(&self, ids: Vec<u64>, wanted: impl Fn(&Duty) -> bool, epochs: &Epochs) -> Vec<Duty> {
        ids.iter()
            .filter_map(|id| self.duties.get(id))
            .filter(|duty| wanted(duty))
            .map(|duty| Duty { cpus: left(duty, epochs), ..*duty })
            .filter(|duty| duty.cpus != 0)
            .collect()
    }

    fn on_frames(&self, frames: FrameRange) -> Vec<u64> {
        let last = Gfn(frames.end().0 - 1);
        let bounds = |wide| (frame_part(frames.start(), wide), frame_part(last, wide));
        ids_in(&self.by_frame, bounds)
    }

    fn at_addresses(&self, first: Gva, last: Gva) -> Vec<u64> {
        ids_in(&self.by_va, |wide| (va_part(first, wide), va_part(last, wide)))
    }

    /// Inserts a duty that lies in one block of frames and one of addresses.
    fn insert(&mut self, mut duty: Duty, epochs: &Epochs) -> Result<(), TooMany> {
        duty.cpus = left(&duty, epochs);
        if duty.cpus == 0 {
            return Ok(());
        }
        if let Some(id) = self.by_key.get(&duty.key())
            && let Some(old) = self.duties.get_mut(id)
        {
            // Only CPUs that may still cache the old one are carried over: its number changes.
            duty.cpus |= left(old, epochs);
            duty.seq = duty.seq.max(old.seq);
            *old = duty;
            return Ok(());
        }
        if self.duties.len() >= self.sweep_at {
            self.sweep(epochs);
        }
        if self.duties.len() >= MAX_DUTIES {
            return Err(TooMany);
        }
        let id = self.next;
        self.next += 1;
        let wide = duty.is_wide();
        self.by_frame.insert(duty.frame_spot(wide, id));
        self.by_va.insert(duty.va_spot(wide, id));
        self.by_key.insert(duty.key(), id);
        self.duties.insert(id, duty);
        Ok(())
    }

    fn remove(&mut self, id: u64) {
        if let Some(duty) = self.duties.remove(&id) {
            let wide = duty.is_wide();
            self.by_frame.remove(&duty.frame_spot(wide, id));
            self.by_va.remove(&duty.va_spot(wide, id));
            self.by_key.remove(&duty.key());
        }
    }

    /// Drops what epochs have discharged. The next sweep waits until as many have come anew.
    fn sweep(&mut self, epochs: &Epochs) {
        let done = |(_, duty): &(&u64, &Duty)| left(duty, epochs) == 0;
        let ids: Vec<u64> = self.duties.iter().filter(done).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.remove(id));
        let full = self.duties.len() >= MAX_DUTIES;
        let next = (2 * self.duties.len()).clamp(1024, MAX_DUTIES);
        // With nothing to drop at the limit, another sweep for each new duty would be in vain.
        self.sweep_at = if full { usize::MAX } else { next };
    }
}

fn left(duty: &Duty, epochs: &Epochs) -> CpuSet {
    epochs.may_cache_leaf(duty.cpus, (duty.pcid, duty.global), duty.seq)
}

fn ids_in(index: &BTreeSet<Spot>, bounds: impl Fn(bool) -> (u64, u64)) -> Vec<u64> {
    let mut ids = Vec::new();
    for wide in [false, true] {
        let (first, last) = bounds(wide);
        if first <= last {
            let spots = index.range((wide, first, 0)..=(wide, last, u64::MAX));
            ids.extend(spots.map(|(_, _, id)| *id));
        }
    }
    ids
}

/// The CPUs of a set, for messages.
pub(super) fn cpu_list(cpus: CpuSet) -> String {
    let names: Vec<_> = members(cpus).map(|cpu| cpu.to_string()).collect();
    format!("{} {}", if names.len() == 1 { "CPU" } else { "CPUs" }, names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::{Gpa, PAGE_SIZE};
    use lacuna_abi::event::Flush;

    fn duty(level: Level, va: u64, frame: u64, count: u64) -> Duty {
        let frames = FrameRange::new(Gfn(frame), count).unwrap();
        let (root, va) = (Gpa(0x1000), Gva(va));
        Duty { root, pcid: 0, global: true, level, va, frames, seq: 5, cpus: 1 }
    }

    fn invalidate(duties: &mut Obligations, va: u64, count: u32, level: Level) {
        let flush = PageFlush { va: Gva(va), count, level, pcid: 9, seq: 6 };
        duties.invalidate(0, &flush, &Epochs::default()).unwrap();
    }

    fn left_of(duties: &Obligations) -> u64 {
        let all = FrameRange::new(Gfn(0), 1 << 40).unwrap();
        duties.of_frames(all, &Epochs::default()).iter().map(|duty| duty.frames.count()).sum()
    }

    #[test]
    fn invlpg_of_any_address_removes_all_of_a_large_page_and_of_no_other() {
        for (level, order) in [(Level::Pd, 9), (Level::Pdpt, 18)] {
            let (va, frame) = (level.span() * 5, 3 << order);
            let mut duties = Obligations::new();
            duties.add(&duty(level, va, frame, level.frames()), &Epochs::default()).unwrap();
            invalidate(&mut duties, va - PAGE_SIZE, 1, Level::Pt);
            invalidate(&mut duties, va + level.span(), 4, Level::Pd);
            assert_eq!(left_of(&duties), level.frames());
            invalidate(&mut duties, va + level.span() - 1, 1, Level::Pt);
            assert_eq!(left_of(&duties), 0);
        }
    }

    #[test]
    fn invlpg_in_large_steps_removes_one_small_page_in_each_step() {
        let mut duties = Obligations::new();
        duties.add(&duty(Level::Pt, 4 << 21, 512, 512), &Epochs::default()).unwrap();
        invalidate(&mut duties, (3 << 21) + 7 * PAGE_SIZE, 2, Level::Pd);
        assert_eq!(left_of(&duties), 511);
        assert!(
            duties
                .at(
                    Gva((4 << 21) + 7 * PAGE_SIZE),
                    Gva((4 << 21) + 7 * PAGE_SIZE),
                    &Epochs::default()
                )
                .is_empty()
        );
    }

    #[test]
    fn a_seal_discharges_only_what_was_revoked_before_it() {
        let mut duties = Obligations::new();
        let run = duty(Level::Pt, 4 << 21, 512, 8);
        duties.add(&run, &Epochs::default()).unwrap();
        duties.discharge(run.frames, 5, &Epochs::default()).unwrap();
        assert_eq!(left_of(&duties), 8);
        duties.discharge(run.frames, 6, &Epochs::default()).unwrap();
        assert_eq!(left_of(&duties), 0);
    }

    #[test]
    fn a_cpu_that_flushed_is_not_blamed_again_for_a_newer_number() {
        let mut duties = Obligations::new();
        let mut epochs = Epochs::default();
        let run = Duty { cpus: 0b11, ..duty(Level::Pd, 4 << 21, 512, 512) };
        duties.add(&run, &epochs).unwrap();
        epochs.flush(1, 0, &Flush::Everything, 6);
        duties.add(&Duty { seq: 8, cpus: 0b01, ..run }, &epochs).unwrap();
        assert_eq!(duties.of_frames(run.frames, &epochs)[0].cpus, 0b01);
    }

    #[test]
    fn what_epochs_discharged_makes_room_and_a_full_list_says_so() {
        let mut duties = Obligations::new();
        let mut epochs = Epochs::default();
        let nth = |n: u64| duty(Level::Pd, n << 21, n << 9, 512);
        let limit = u64::try_from(MAX_DUTIES).unwrap();
        for n in 0..limit {
            duties.add(&nth(n), &epochs).unwrap();
        }
        assert_eq!(duties.add(&nth(limit), &epochs), Err(TooMany));
        epochs.flush(0, 0, &Flush::Everything, 6);
        let mut duties = Obligations::new();
        for n in 0..2 * limit {
            duties.add(&Duty { seq: 7 + n, ..nth(n) }, &epochs).unwrap();
            epochs.flush(0, 0, &Flush::Everything, 8 + n);
        }
        assert!(duties.duties.len() <= 1024);
    }

    #[test]
    fn invlpg_discharges_smaller_numbers_and_globals_of_any_pcid() {
        let run = duty(Level::Pt, 4 << 21, 512, 8);
        let cases = [
            (run, 0),
            (Duty { global: false, ..run }, 8),
            (Duty { global: false, pcid: 9, ..run }, 0),
            (Duty { seq: 6, ..run }, 8),
        ];
        for (run, left) in cases {
            let mut duties = Obligations::new();
            duties.add(&run, &Epochs::default()).unwrap();
            invalidate(&mut duties, run.va.0, 8, Level::Pt);
            assert_eq!(left_of(&duties), left, "{run:?}");
        }
    }

    #[test]
    fn a_rest_that_joins_a_newer_duty_brings_no_cpu_that_flushed() {
        let mut duties = Obligations::new();
        let mut epochs = Epochs::default();
        let run = Duty { cpus: 0b11, ..duty(Level::Pt, 4 << 21, 512, 8) };
        let half = FrameRange::new(Gfn(512), 4).unwrap();
        duties.add(&run, &epochs).unwrap();
        epochs.flush(1, 0, &Flush::Everything, 6);
        duties.add(&Duty { seq: 8, cpus: 0b01, ..run.part(half) }, &epochs).unwrap();
        duties.discharge(FrameRange::new(Gfn(516), 4).unwrap(), 7, &epochs).unwrap();
        let left: Vec<_> = duties.of_frames(run.frames, &epochs);
        assert_eq!(left, [Duty { seq: 8, cpus: 0b01, ..run.part(half) }]);
    }
}
