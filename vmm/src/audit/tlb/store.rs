//! The duties: stored once, found by frame and by address, discharged one by one or by epochs.

use super::duty::{Duty, PageFlush};
use super::epochs::Epochs;
use super::set::only;
use super::spots::{Spot, chain, frame_spot, frame_spots, va_spot, va_spots};
use lacuna_abi::addr::{FrameRange, Gfn, Gva};
use lacuna_abi::paging::Level;

/// Most duties that are kept. A guest that follows any flush discipline stays far below.
pub(in crate::audit) const MAX_DUTIES: usize = 1 << 16;

/// Duties below which none are swept.
const FEW: usize = 1024;

/// Something had to be dropped: there is too much of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::audit) struct TooMany;

/// No duty.
const NONE: u32 = u32::MAX;

/// Which index.
#[derive(Clone, Copy)]
enum By {
    Frame,
    Address,
}

#[derive(Clone, Copy, Debug)]
struct Link {
    before: u32,
    after: u32,
}

const LOOSE: Link = Link { before: NONE, after: NONE };

#[derive(Clone, Debug)]
struct Slot {
    /// `None` in a free slot.
    duty: Option<Duty>,
    /// Where it is found, in each index.
    spots: [Spot; 2],
    /// Neighbours in the chain of the spot, in each index.
    links: [Link; 2],
}

/// Chains at the start, and most of them; there are about as many as duties.
const CHAINS: usize = 64;
const MAX_CHAINS: usize = 1 << 14;

/// All duties.
#[derive(Clone, Debug, Default)]
pub(super) struct Duties {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// The first duty of each chain, in each index. Spots that fall together share a chain.
    heads: [Vec<u32>; 2],
    /// Duties of pages above 2 MiB.
    wide: usize,
    sweep_at: usize,
    /// Kept to be filled again.
    found: Vec<u32>,
}

impl Duties {
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Adds a run of entries of one table that map consecutive frames.
    #[inline]
    pub(super) fn add(&mut self, run: &Duty, epochs: &Epochs) -> Result<(), TooMany> {
        if run.level == Level::Pt {
            let last = Gfn(run.frames.end().0 - 1);
            if run.frames.start().block_start() == last.block_start() {
                return self.insert(*run, epochs);
            }
            return run
                .frames
                .by_block()
                .try_for_each(|frames| self.insert(run.part(frames), epochs));
        }
        let step = run.level.frames();
        (0..run.frames.count().div_ceil(step)).try_for_each(|entry| {
            let start = run.frames.start().0 + entry * step;
            let frames = FrameRange::new(Gfn(start), step.min(run.frames.end().0 - start));
            let va = run.va.wrapping_add(entry * run.level.span());
            self.insert(Duty { va, frames: frames.ok_or(TooMany)?, ..*run }, epochs)
        })
    }

    /// Pages are invalidated on one CPU.
    pub(super) fn invalidate(
        &mut self,
        cpu: u8,
        flush: &PageFlush,
        epochs: &Epochs,
    ) -> Result<(), TooMany> {
        let found = self.at_addresses(flush.va, flush.last());
        let mut kept = Ok(());
        for id in &found {
            let duty = self.get(*id).filter(|duty| duty.cpus & only(cpu) != 0);
            let Some(duty) = duty.copied() else { continue };
            if let Some(gone) = flush.removes(&duty) {
                self.remove(*id);
                let others = Duty { cpus: duty.cpus & !only(cpu), ..duty.part(gone) };
                for piece in duty.without(gone).chain([others]) {
                    kept = kept.and(self.insert(piece, epochs));
                }
            }
        }
        self.found = found;
        kept
    }

    /// No translation to these frames that was revoked before `seq` is left on any CPU.
    pub(super) fn discharge(
        &mut self,
        frames: FrameRange,
        seq: u64,
        epochs: &Epochs,
    ) -> Result<(), TooMany> {
        if self.len() == 0 {
            return Ok(());
        }
        let found = self.on_frames(frames);
        let mut kept = Ok(());
        for id in &found {
            let Some(duty) = self.get(*id).filter(|duty| duty.seq < seq) else { continue };
            if frames.contains_range(duty.frames) {
                self.remove(*id);
            } else if duty.frames.intersection(frames).is_some() {
                let duty = *duty;
                self.remove(*id);
                for piece in duty.without(frames) {
                    kept = kept.and(self.insert(piece, epochs));
                }
            }
        }
        self.found = found;
        kept
    }

    /// The CPU caches nothing any more.
    pub(super) fn forget_cpu(&mut self, cpu: u8) {
        for id in self.all() {
            if let Some(duty) = self.duty_mut(id) {
                duty.cpus &= !only(cpu);
                if duty.cpus == 0 {
                    self.remove(id);
                }
            }
        }
    }

    /// Those of the duties for any of these frames that are `wanted`, with the CPUs that may still
    /// cache them.
    pub(super) fn of_frames(
        &self,
        frames: FrameRange,
        epochs: &Epochs,
        all: &mut Vec<Duty>,
        wanted: impl Fn(&Duty) -> bool,
    ) {
        self.visit(By::Frame, frame_spots(frames), |_, duty| {
            all.extend(pending(duty, epochs).filter(&wanted));
        });
    }

    /// Those of the duties for any address in `first..=last` that are `wanted`, likewise.
    pub(super) fn at(
        &self,
        (first, last): (Gva, Gva),
        epochs: &Epochs,
        all: &mut Vec<Duty>,
        wanted: impl Fn(&Duty) -> bool,
    ) {
        self.visit(By::Address, va_spots(first, last), |_, duty| {
            all.extend(pending(duty, epochs).filter(&wanted));
        });
    }

    fn get(&self, id: u32) -> Option<&Duty> {
        self.slots.get(usize::try_from(id).ok()?)?.duty.as_ref()
    }

    fn duty_mut(&mut self, id: u32) -> Option<&mut Duty> {
        self.slots.get_mut(usize::try_from(id).ok()?)?.duty.as_mut()
    }

    fn link_mut(&mut self, id: u32, by: By) -> Option<&mut Link> {
        Some(&mut self.slots.get_mut(usize::try_from(id).ok()?)?.links[by as usize])
    }

    fn on_frames(&mut self, frames: FrameRange) -> Vec<u32> {
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        self.visit(By::Frame, frame_spots(frames), |id, _| found.push(id));
        found
    }

    fn at_addresses(&mut self, first: Gva, last: Gva) -> Vec<u32> {
        let mut found = std::mem::take(&mut self.found);
        found.clear();
        self.visit(By::Address, va_spots(first, last), |id, _| found.push(id));
        found
    }

    fn all(&self) -> impl Iterator<Item = u32> + use<> {
        0..u32::try_from(self.slots.len()).unwrap_or(NONE)
    }

    /// Visits every duty that has one of the spots, and where these are more than there are duties
    /// perhaps others too.
    #[inline]
    fn visit(&self, by: By, spots: [(u64, u64); 2], mut each: impl FnMut(u32, &Duty)) {
        let live = self.len();
        if live == 0 {
            return;
        }
        let [(first, last), _] = spots;
        if first == last && self.wide == 0 {
            self.visit_spot(by, first << 1, &mut each);
            return;
        }
        let wanted = spots
            .iter()
            .fold(0_u64, |sum, (first, last)| sum.saturating_add((last - first).saturating_add(1)));
        if wanted > u64::try_from(live).unwrap_or(u64::MAX).max(2) {
            for (id, slot) in (0..).zip(&self.slots) {
                slot.duty.iter().for_each(|duty| each(id, duty));
            }
            return;
        }
        for (wide, (first, last)) in [false, true].into_iter().zip(spots) {
            if wide && self.wide == 0 {
                continue;
            }
            for part in first..=last {
                self.visit_spot(by, part << 1 | u64::from(wide), &mut each);
            }
        }
    }

    #[inline]
    fn visit_spot(&self, by: By, spot: Spot, each: &mut impl FnMut(u32, &Duty)) {
        let mut next = self.head(by, spot);
        while let Some(slot) = usize::try_from(next).ok().and_then(|n| self.slots.get(n)) {
            if slot.spots[by as usize] == spot {
                slot.duty.iter().for_each(|duty| each(next, duty));
            }
            next = slot.links[by as usize].after;
        }
    }

    fn head(&self, by: By, spot: Spot) -> u32 {
        let heads = &self.heads[by as usize];
        heads.get(chain(spot, heads.len())).copied().unwrap_or(NONE)
    }

    /// Inserts a duty that lies in one part of memory and one of the address space.
    #[inline]
    fn insert(&mut self, mut duty: Duty, epochs: &Epochs) -> Result<(), TooMany> {
        duty.cpus = epochs.left(&duty);
        if duty.cpus == 0 {
            return Ok(());
        }
        let spots = [frame_spot(&duty), va_spot(&duty)];
        let mut next = self.head(By::Address, spots[1]);
        while let Some(slot) = usize::try_from(next).ok().and_then(|n| self.slots.get_mut(n)) {
            let (id, after) = (next, slot.links[By::Address as usize].after);
            next = after;
            let Some(old) = slot.duty.as_mut() else { continue };
            let left = epochs.left(old);
            if old.is_same(&duty) {
                // Only CPUs that may still cache the old one are carried over: its number changes.
                *old = Duty { cpus: duty.cpus | left, seq: duty.seq.max(old.seq), ..duty };
                return Ok(());
            }
            if left == 0 {
                self.remove(id);
            }
        }
        if self.len() >= self.sweep_at.max(FEW) {
            self.sweep(epochs);
        }
        if self.len() >= MAX_DUTIES {
            return Err(TooMany);
        }
        if self.len() >= self.heads[0].len().min(MAX_CHAINS) {
            self.rehang();
        }
        let slot = Slot { duty: Some(duty), spots, links: [LOOSE; 2] };
        let id = match self.free.pop() {
            Some(id) => {
                self.slots[usize::try_from(id).map_err(|_| TooMany)?] = slot;
                id
            }
            None => {
                self.slots.push(slot);
                u32::try_from(self.slots.len() - 1).map_err(|_| TooMany)?
            }
        };
        self.wide += usize::from(duty.level > Level::Pd);
        self.hang(id, By::Frame, spots[0]);
        self.hang(id, By::Address, spots[1]);
        Ok(())
    }

    /// Makes twice as many chains.
    fn rehang(&mut self) {
        let chains = (2 * self.heads[0].len()).clamp(CHAINS, MAX_CHAINS);
        if chains == self.heads[0].len() {
            return;
        }
        for by in [By::Frame, By::Address] {
            let old = std::mem::replace(&mut self.heads[by as usize], vec![NONE; chains]);
            for head in old {
                // The newest comes first, as before.
                let mut ids = std::mem::take(&mut self.found);
                ids.clear();
                let mut next = head;
                while let Some(slot) = usize::try_from(next).ok().and_then(|n| self.slots.get(n)) {
                    ids.push(next);
                    next = slot.links[by as usize].after;
                }
                for id in ids.iter().rev() {
                    let slot = usize::try_from(*id).ok().and_then(|n| self.slots.get_mut(n));
                    let Some(slot) = slot else { continue };
                    slot.links[by as usize] = LOOSE;
                    let spot = slot.spots[by as usize];
                    self.hang(*id, by, spot);
                }
                self.found = ids;
            }
        }
    }

    fn hang(&mut self, id: u32, by: By, spot: Spot) {
        let heads = &mut self.heads[by as usize];
        let chain = chain(spot, heads.len());
        let Some(head) = heads.get_mut(chain) else { return };
        let after = std::mem::replace(head, id);
        if let Some(link) = self.link_mut(id, by) {
            link.after = after;
        }
        if let Some(link) = self.link_mut(after, by) {
            link.before = id;
        }
    }

    fn remove(&mut self, id: u32) {
        let Some(slot) = usize::try_from(id).ok().and_then(|n| self.slots.get_mut(n)) else {
            return;
        };
        let Some(duty) = slot.duty.take() else { return };
        let Slot { links, spots, .. } = *slot;
        self.wide -= usize::from(duty.level > Level::Pd);
        self.unhang(links[0], By::Frame, spots[0]);
        self.unhang(links[1], By::Address, spots[1]);
        self.free.push(id);
    }

    fn unhang(&mut self, Link { before, after }: Link, by: By, spot: Spot) {
        if let Some(link) = self.link_mut(after, by) {
            link.before = before;
        }
        if let Some(link) = self.link_mut(before, by) {
            link.after = after;
        } else {
            let heads = &mut self.heads[by as usize];
            let chain = chain(spot, heads.len());
            if let Some(head) = heads.get_mut(chain) {
                *head = after;
            }
        }
    }

    /// Drops what epochs have discharged. The next sweep waits until as many have come anew.
    pub(super) fn sweep(&mut self, epochs: &Epochs) {
        for id in self.all() {
            if let Some(duty) = self.duty_mut(id) {
                duty.cpus = epochs.left(duty);
                if duty.cpus == 0 {
                    self.remove(id);
                }
            }
        }
        let full = self.len() >= MAX_DUTIES;
        let next = (2 * self.len()).clamp(FEW, MAX_DUTIES);
        // With nothing to drop at the limit, another sweep for each new duty would be in vain.
        self.sweep_at = if full { usize::MAX } else { next };
    }
}

fn pending(duty: &Duty, epochs: &Epochs) -> Option<Duty> {
    let cpus = epochs.left(duty);
    (cpus != 0).then_some(Duty { cpus, ..*duty })
}
