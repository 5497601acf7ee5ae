//! The test machine's host: who may map what, what is secret and open, and which translations a
//! CPU may still cache. It discharges nothing by a seal, so it is stricter than a real host.

use super::memory::{Contents, Tables};
use super::tables::TableState;
use crate::platform::GateError;
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::event::{EntryWrite, Flush, Life, mapped_frames};
#[cfg(feature = "faults")]
use lacuna_abi::fault::Fault;
use lacuna_abi::gate::{OpKind, Status};
use lacuna_abi::layout::{Layout, Place};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk;
use std::collections::HashMap;
use std::format;
use std::string::String;
use std::vec::Vec;

/// Something that happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Seen {
    Write(EntryWrite),
    /// A table was filled.
    Fill(Gfn),
    Flush(Flush),
    Shootdown(Flush, crate::platform::CpuSet),
    Gate(OpKind, FrameRange),
    Life(Life, FrameRange),
    /// Frames were zeroed through a window.
    Zero(FrameRange),
    InputDone,
    Checkpoint,
}

/// A frame as the host and the tables have it.
pub(crate) struct Frame {
    pub(crate) contents: Contents,
    pub(crate) secret: bool,
    pub(crate) open: [u8; MAX_CPUS],
    /// The direct map shows it.
    pub(crate) direct: bool,
    /// Window entries that map it.
    pub(crate) windows: u32,
}

/// A translation that a CPU may still cache although its entry is gone.
pub(super) struct Stale {
    pub(super) cpu: usize,
    pub(super) va: Gva,
    pub(super) bytes: u64,
    pub(super) global: bool,
    pub(super) frames: FrameRange,
    pub(super) window: bool,
}

/// Everything behind the machine's lock.
pub(crate) struct State {
    pub(crate) layout: Layout,
    pub(crate) tables: Tables,
    pub(crate) frames: Vec<Frame>,
    pub(crate) scratch: HashMap<u64, u64>,
    pub(crate) input: Vec<u64>,
    pub(crate) interrupts_off: [bool; MAX_CPUS],
    pub(crate) refuse: Option<(usize, Status)>,
    pub(crate) refuse_write: Option<usize>,
    pub(crate) recording: bool,
    pub(crate) seen: Vec<Seen>,
    pub(crate) violations: Vec<String>,
    pub(crate) progress: u64,
    /// Gate calls made.
    pub(crate) calls: u64,
    pub(crate) clock: u64,
    #[cfg(feature = "faults")]
    pub(crate) faults: u64,
    pub(super) stale: Vec<Stale>,
    /// First page of the table pool that holds no table at the start.
    pub(crate) free_tables: Gpa,
    pub(super) made: TableState,
}

impl State {
    pub(crate) fn new(layout: Layout) -> Self {
        let frame = |_| Frame {
            contents: Contents::DIRTY,
            secret: false,
            open: [0; MAX_CPUS],
            direct: true,
            windows: 0,
        };
        let (tables, free_tables) = super::memory::boot_tables(&layout);
        Self {
            layout,
            tables,
            free_tables,
            made: TableState::default(),
            frames: (0..layout.zone_frames().count()).map(frame).collect(),
            scratch: HashMap::new(),
            input: Vec::new(),
            interrupts_off: [false; MAX_CPUS],
            refuse: None,
            refuse_write: None,
            recording: true,
            seen: Vec::new(),
            violations: Vec::new(),
            progress: 0,
            calls: 0,
            clock: 0,
            #[cfg(feature = "faults")]
            faults: 0,
            stale: Vec::new(),
        }
    }

    pub(crate) fn see(&mut self, seen: Seen) {
        if self.recording {
            self.seen.push(seen);
        }
    }

    pub(crate) fn violation(&mut self, rule: &str, frames: FrameRange) {
        self.violations.push(format!("{rule}: {frames}"));
    }

    fn index(&self, frame: Gfn) -> usize {
        let zone = self.layout.zone_frames();
        assert!(zone.contains(frame), "{frame} is not in the zone");
        (frame.0 - zone.start().0) as usize
    }

    pub(crate) fn frame(&self, frame: Gfn) -> &Frame {
        &self.frames[self.index(frame)]
    }

    pub(crate) fn frame_mut(&mut self, frame: Gfn) -> &mut Frame {
        let index = self.index(frame);
        &mut self.frames[index]
    }

    /// Whether `test` holds for every one of the frames.
    fn all(&self, frames: FrameRange, test: impl Fn(&Frame) -> bool) -> bool {
        frames.iter().all(|frame| test(self.frame(frame)))
    }

    pub(crate) fn read_entry(&self, at: Gpa) -> Option<Entry> {
        self.layout.pool.contains(at).then(|| self.tables.get(&at.0).copied().unwrap_or_default())
    }

    /// Refuses the write that a test said.
    pub(crate) fn admit_write(&mut self) -> Result<(), GateError> {
        match self.refuse_write {
            Some(0) => {
                self.refuse_write = None;
                Err(GateError { status: Status::Refused, index: 0 })
            }
            left => {
                self.refuse_write = left.map(|left| left - 1);
                Ok(())
            }
        }
    }

    pub(crate) fn write_entries(&mut self, cpu: usize, at: Gpa, write: &EntryWrite) {
        assert!(write.is_well_formed(), "{write:?}");
        let read = |at| self.read_entry(at);
        let place = walk::locate(&read, write.root, write.va, write.level);
        assert_eq!(place, Ok(at), "{write:?}");
        self.see(Seen::Write(*write));
        for index in 0..u64::from(write.count) {
            let at = at.wrapping_add(8 * index);
            let old = write.old.nth_of_run(write.level, index);
            assert_eq!(self.read_entry(at), Some(old), "what {write:?} says was there");
            self.tables.insert(at.0, write.new.nth_of_run(write.level, index));
        }
        if let Some(frames) = mapped_frames(write.old, write.level, write.count) {
            self.revoke(cpu, write, frames);
        }
        if let Some(frames) = mapped_frames(write.new, write.level, write.count) {
            self.grant(cpu, write, frames);
        }
        if write.level > Level::Pt {
            self.relink(write);
        }
        self.check_watched();
    }

    fn revoke(&mut self, cpu: usize, write: &EntryWrite, frames: FrameRange) {
        let window = self.layout.place_of(write.va) != Place::DirectMap;
        for frame in frames.iter() {
            let frame = self.frame_mut(frame);
            if window {
                frame.windows -= 1;
            } else {
                frame.direct = false;
            }
        }
        // Of a window only its own CPU is judged, as the host does.
        let cpus = if window { cpu..cpu + 1 } else { 0..self.layout.cpus };
        self.stale.extend(cpus.map(|cpu| Stale {
            cpu,
            va: write.va,
            bytes: write.span(),
            global: write.old.has(Entry::GLOBAL),
            frames,
            window,
        }));
    }

    fn grant(&mut self, cpu: usize, write: &EntryWrite, frames: FrameRange) {
        if !write.new.has(Entry::NO_EXECUTE) {
            self.violation("write-execute", frames);
        }
        if self.layout.place_of(write.va) == Place::DirectMap {
            if !self.all(frames, |frame| !frame.secret) {
                self.violation("direct-map-alias", frames);
            }
            frames.iter().for_each(|frame| self.frame_mut(frame).direct = true);
            return;
        }
        if self.layout.place_of(write.va) != Place::Window(cpu) {
            self.violation("foreign-alias: not this CPU's window", frames);
        }
        if write.new.has(Entry::GLOBAL) {
            self.violation("global-window", frames);
        }
        if !self.all(frames, |frame| !frame.secret || frame.open[cpu] > 0) {
            self.violation("foreign-alias: mapped before it is open", frames);
        }
        let end = write.va.0 + write.span();
        let cached =
            |s: &Stale| s.window && s.cpu == cpu && s.va.0 < end && write.va.0 < s.va.0 + s.bytes;
        if self.stale.iter().any(cached) {
            self.violation("stale-window: remapped", frames);
        }
        frames.iter().for_each(|frame| self.frame_mut(frame).windows += 1);
    }

    /// What an invalidation on `cpu` must remove (SDM volume 3, "Operations that Invalidate TLBs
    /// and Paging-Structure Caches").
    pub(crate) fn forget(&mut self, cpu: usize, flush: Flush) {
        self.made.forget(cpu);
        self.stale.retain(|stale| {
            let gone = match flush {
                Flush::Everything => true,
                // One address space, one PCID.
                Flush::NonGlobal | Flush::Pcid(_) | Flush::AllPcids => !stale.global,
                Flush::PageOfPcid { va, .. } => {
                    !stale.global && stale.bytes <= PAGE_SIZE && va == stale.va
                }
                Flush::Pages { va, count, level } => {
                    let end = va.0 + u64::from(count) * level.span();
                    va.0 <= stale.va.0 && stale.va.0 + stale.bytes <= end
                }
            };
            stale.cpu != cpu || !gone
        });
    }

    /// One operation of a gate call.
    pub(crate) fn operation(
        &mut self,
        cpu: usize,
        kind: OpKind,
        frames: FrameRange,
    ) -> Result<(), Status> {
        if let Some((nth, status)) = self.refuse {
            self.refuse = nth.checked_sub(1).map(|left| (left, status));
            if nth == 0 {
                return Err(status);
            }
        }
        self.see(Seen::Gate(kind, frames));
        let overlaps =
            |s: &Stale, window| s.window == window && s.frames.intersection(frames).is_some();
        if kind != OpKind::Release && self.stale.iter().any(|s| overlaps(s, false)) {
            self.violation("stale-direct-map", frames);
        }
        match kind {
            OpKind::Seal => {
                if !self.all(frames, |frame| !frame.direct) {
                    self.violation("direct-map-alias", frames);
                }
                if !self.all(frames, |frame| frame.windows == 0) {
                    self.violation("foreign-alias: sealed while it is mapped", frames);
                }
                if !self.all(frames, |frame| !frame.secret || frame.open[cpu] > 0) {
                    self.violation("sealed twice", frames);
                }
                for frame in frames.iter() {
                    let frame = self.frame_mut(frame);
                    frame.open[cpu] = frame.open[cpu].saturating_sub(u8::from(frame.secret));
                    frame.secret = true;
                }
            }
            OpKind::Open => {
                if !self.all(frames, |frame| frame.secret) {
                    return Err(Status::NotSecret);
                }
                frames.iter().for_each(|frame| self.frame_mut(frame).open[cpu] += 1);
            }
            OpKind::Release => {
                if !self.all(frames, |frame| frame.secret) {
                    return Err(Status::NotSecret);
                }
                if !self.all(frames, |frame| frame.open == [0; MAX_CPUS]) {
                    return Err(Status::StillOpen);
                }
                if !self.all(frames, |frame| frame.contents.is_zero()) {
                    self.violation("residue: released", frames);
                }
                if self.stale.iter().any(|s| overlaps(s, true)) {
                    self.violation("stale-window: released", frames);
                }
                frames.iter().for_each(|frame| self.frame_mut(frame).secret = false);
            }
        }
        Ok(())
    }

    pub(crate) fn life(&mut self, life: Life, frames: FrameRange) {
        self.see(Seen::Life(life, frames));
        if matches!(life, Life::TableAllocated | Life::TableFreed) {
            self.table_life(life, frames);
            return;
        }
        let closed = |frame: &Frame| frame.secret && frame.open == [0; MAX_CPUS];
        if !self.all(frames, closed) {
            self.violation("second-stage-open", frames);
        }
        let zero = matches!(life, Life::PooledZero | Life::HandedOutZero);
        if zero && !self.all(frames, |frame| frame.contents.is_zero()) {
            self.violation("residue: said to be zero", frames);
        }
    }

    #[cfg(feature = "faults")]
    pub(crate) fn planted(&self, fault: Fault) -> bool {
        self.faults & fault.bit() != 0
    }

    /// The frame and offset that a data access reaches. Panics where hardware would refuse it.
    pub(crate) fn reach(&self, cpu: usize, va: Gva, write: bool) -> (Gfn, u64) {
        let read = |at| self.read_entry(at);
        let leaf = walk::translate(&read, self.layout.pool.gpa, va)
            .unwrap_or_else(|error| panic!("page fault at {va}: {error:?}"));
        assert!(leaf.writable || !write, "a store to read-only {va}");
        let gpa = leaf.gpa_of(va);
        let place = self.layout.place_of(va);
        // No hardware refuses another CPU's window; that the mapping is there was judged before.
        #[cfg(feature = "faults")]
        let own = matches!(place, Place::Window(_)) && self.planted(Fault::WrongCpuWindow);
        #[cfg(not(feature = "faults"))]
        let own = false;
        let own = own || place == Place::Window(cpu);
        assert!(place == Place::DirectMap || own, "{va}");
        let frame = self.frame(gpa.frame());
        assert!(!frame.secret || frame.open[cpu] > 0, "an access to sealed {gpa} at {va}");
        assert!(!frame.secret || own, "a secret through the direct map");
        (gpa.frame(), gpa.0 % PAGE_SIZE)
    }

    /// Entries of the window of `cpu` that are present.
    pub(crate) fn window_entries(&self, cpu: usize) -> usize {
        let read = |at| self.read_entry(at);
        let start = lacuna_abi::layout::window(cpu);
        let table = walk::locate(&read, self.layout.pool.gpa, start, Level::Pt).unwrap();
        let large = start.wrapping_add(lacuna_abi::layout::WINDOW_LARGE_OFFSET);
        let directory = walk::locate(&read, self.layout.pool.gpa, large, Level::Pd).unwrap();
        let present = |at: Gpa, count| {
            (0..count).filter(|i| read(at.wrapping_add(8 * i)).unwrap().is_present()).count()
        };
        present(table, 512) + present(directory, lacuna_abi::layout::WINDOW_LARGE_SLOTS)
    }
}
