//! `second-stage-open` by real accesses: at a quiesce point some frames are touched on purpose, by a
//! CPU that is not the guest's. Here is decided which, and what it means.
//!
//! A sealed frame must trap, whatever the back end says of itself; any other frame must not.
//!
//! Touches come after everything that looks for stale translations: closing and opening the probe's
//! own memory, and what KVM does when an access traps, may remove some.

use super::finding::{Finding, Rule};
use super::story::Moment;
use super::{Audit, Denial, World};
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn, PAGE_SIZE};
use lacuna_abi::named_enum;
use serde::Serialize;

named_enum! {
    /// How a frame is touched.
    #[derive(PartialOrd, Ord, Hash)]
    pub enum ProbeKind {
        /// A load.
        Read = "read",
        /// A store, of what is there.
        Write = "write",
        /// An instruction fetch.
        Fetch = "fetch",
    }
}

/// One touch that is to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Probe {
    /// The frame.
    pub frame: Gfn,
    /// Where in it, in bytes; a multiple of 8.
    pub offset: u64,
    /// How.
    pub kind: ProbeKind,
}

/// What came of a touch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Touched {
    /// The second stage stopped it.
    Trapped,
    /// It was carried out.
    WentThrough,
    /// It could not be made, or nothing follows from how it ended; why.
    Failed(String),
}

/// What was touched so far, and what was not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct ProbeTally {
    /// Touches that trapped.
    pub trapped: u64,
    /// Touches that went through.
    pub went_through: u64,
    /// Touches that failed.
    pub failed: u64,
    /// Touches left out because the frame was held open by its granule.
    pub held_open: u64,
    /// Touches left out because the seal is off.
    pub seal_off: u64,
    /// Quiesce points without touches, because there is nothing to touch with, or they were turned
    /// off.
    pub without: u64,
}

/// Of so many touches one is of a frame that is not sealed.
const OPEN_ONE_IN: u64 = 4;
/// Draws in the search for a frame that is not secret.
const DRAWS: u32 = 8;

impl Audit {
    /// Draws `count` touches of these kinds: most of sealed frames, the others of frames that a CPU
    /// has open and of frames that are not secret. `draw` gives a number below its argument. What
    /// is due and cannot be touched is counted as not checked.
    pub fn choose_probes(
        &mut self,
        count: u64,
        kinds: &[ProbeKind],
        draw: &mut dyn FnMut(u64) -> u64,
        world: &impl World,
    ) -> Vec<Probe> {
        // Open frames are touched to see that the seal spares them: without a seal nothing is due.
        let Some(some) = self.sealed_at(0) else { return Vec::new() };
        if world.denial(some) == Denial::NotEnforced {
            self.probes.seal_off += count.max(1);
            self.ledger.not_checked(Rule::SecondStageOpen, count.max(1));
            return Vec::new();
        }
        if count == 0 || kinds.is_empty() {
            self.probes.without += 1;
            self.ledger.not_checked(Rule::SecondStageOpen, 1);
            return Vec::new();
        }
        let mut probes = Vec::new();
        for number in 1..=count {
            let frame = match number % OPEN_ONE_IN {
                0 => self.unsealed(draw),
                _ => self.sealed_at(draw(self.config.layout.zone_frames().count())),
            };
            let kind = usize::try_from(draw(kinds.len() as u64)).ok().and_then(|i| kinds.get(i));
            let offset = draw(PAGE_SIZE / 8) * 8;
            let (Some(frame), Some(kind)) = (frame, kind) else { continue };
            if self.frames.may_close(frame) && world.denial(frame) == Denial::HeldOpen {
                self.probes.held_open += 1;
                self.ledger.not_checked(Rule::SecondStageOpen, 1);
            } else {
                probes.push(Probe { frame, offset, kind: *kind });
            }
        }
        probes
    }

    /// Judges what came of these touches; no vCPU has run since they were drawn.
    pub fn judge_probes(&mut self, touched: &[(Probe, Touched)], seq: u64, world: &impl World) {
        for (probe, outcome) in touched {
            let sealed = self.frames.may_close(probe.frame);
            let right = match outcome {
                Touched::Trapped => {
                    self.probes.trapped += 1;
                    sealed
                }
                Touched::WentThrough => {
                    self.probes.went_through += 1;
                    !sealed
                }
                Touched::Failed(why) => {
                    self.probes.failed += 1;
                    self.ledger.not_checked(Rule::SecondStageOpen, 1);
                    self.ledger.inconclusive(format!("a probe of the second stage failed: {why}"));
                    continue;
                }
            };
            self.ledger.checked(Rule::SecondStageOpen, 1);
            if !right {
                let finding = Finding::new(Rule::SecondStageOpen, seq, self.wrong(probe, sealed));
                // One finding for each way in which a frame is touched.
                let topic = 1 + probe.kind as u64;
                let frame = Some(probe.frame);
                self.ledger.violation_about(topic, Finding { frame, ..finding });
            }
        }
        self.tell(&Moment::Probe, world);
    }

    /// What was touched so far.
    #[must_use]
    pub const fn probe_tally(&self) -> ProbeTally {
        self.probes
    }

    fn wrong(&self, probe: &Probe, sealed: bool) -> String {
        let kind = probe.kind.name();
        if sealed {
            return format!(
                "sealed, and a probe's {kind} at offset {:#x} went through; the second stage must \
                 stop it, whatever its own state says",
                probe.offset
            );
        }
        let state = match self.frames.is_open(probe.frame) {
            true => "open for a CPU",
            false => "not secret",
        };
        format!(
            "denied although open: the frame is {state}, and a probe's {kind} at offset {:#x} \
             trapped; the second stage must let it through",
            probe.offset
        )
    }

    /// A sealed frame, near the one with this number: in the first pageblock from there on that has
    /// one, and in it from a place on that follows from the number too.
    fn sealed_at(&self, at: u64) -> Option<Gfn> {
        let zone = self.config.layout.zone_frames();
        let found = self.frames.find_sealed(self.behind(at));
        let found = found.or_else(|| self.frames.find_sealed(zone))?;
        let block = FrameRange::new(found.block_start(), BLOCK_FRAMES)?;
        let start = at % BLOCK_FRAMES;
        let rest = FrameRange::new(block.start().wrapping_add(start), BLOCK_FRAMES - start)?;
        self.frames.find_sealed(rest).or(Some(found))
    }

    /// A frame that is not sealed: as often one that a CPU has open, if there is any, as one that is
    /// not secret.
    fn unsealed(&self, draw: &mut dyn FnMut(u64) -> u64) -> Option<Gfn> {
        let zone = self.config.layout.zone_frames();
        let open = (draw(2) == 0).then(|| {
            let from = draw(zone.count());
            self.frames.find_open(self.behind(from)).or_else(|| self.frames.find_open(zone))
        });
        open.flatten().or_else(|| {
            let mut drawn = (0..DRAWS).map(|_| zone.start().wrapping_add(draw(zone.count())));
            drawn.find(|frame| !self.frames.is_secret(*frame))
        })
    }

    /// The frames of the zone from the one with this number on.
    fn behind(&self, at: u64) -> FrameRange {
        let zone = self.config.layout.zone_frames();
        let rest = FrameRange::new(zone.start().wrapping_add(at), zone.count().saturating_sub(at));
        rest.unwrap_or(zone)
    }
}
