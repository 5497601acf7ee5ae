//! Guests that certainly do what a rule forbids: nothing of them depends on chance.

use super::asm::{Asm, RAX};
use super::elf::elf;
use super::rig::Rig;
use crate::audit::{Mediation, Rule};
use lacuna_abi::addr::{FrameRange, Gva};
use lacuna_abi::event::{EntryWrite, Event};
use lacuna_abi::gate::{Call, OpKind};
use lacuna_abi::layout::{IMAGE, POOL, window};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::locate;

/// MSR_KVM_SYSTEM_TIME_NEW (Linux, "KVM-specific MSRs").
const MSR_KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;

lacuna_abi::named_enum! {
    /// One thing that a rule forbids, done by a program that exits with status 0. All but the last are
    /// left as they are until then.
    pub enum Sin {
        /// A frame becomes secret while the direct map shows it.
        DirectMapped = "direct-mapped",
        /// A sealed frame is mapped in a window, and no record tells of it.
        MappedWhileSealed = "mapped-while-sealed",
        /// An open frame is mapped in its window with the Global bit.
        MappedGlobally = "mapped-globally",
        /// A block is sealed after it left the direct map, without a flush.
        NotFlushed = "not-flushed",
        /// A table is mapped writable in a window.
        TableWritable = "table-writable",
        /// The code is mapped writable in a window.
        CodeWritable = "code-writable",
        /// A page is mapped for ring 3.
        ForRing3 = "for-ring-3",
        /// CR0.WP is cleared.
        WriteProtectOff = "write-protect-off",
        /// A secret page is released with what it held.
        NotScrubbed = "not-scrubbed",
        /// A store to a table is not recorded.
        NotRecorded = "not-recorded",
        /// A table is mapped writable in a window and taken down again, and no record tells of it.
        WritableForAMoment = "writable-for-a-moment",
    }
}

impl Sin {
    /// The rule that must find it.
    #[must_use]
    pub const fn rule(self) -> Rule {
        match self {
            Self::DirectMapped => Rule::DirectMapAlias,
            Self::MappedWhileSealed => Rule::ForeignAlias,
            Self::MappedGlobally => Rule::GlobalWindow,
            Self::NotFlushed => Rule::StaleDirectMap,
            Self::TableWritable | Self::WritableForAMoment => Rule::TableAlias,
            Self::CodeWritable => Rule::WriteExecute,
            Self::ForRing3 => Rule::UserAccess,
            Self::WriteProtectOff => Rule::ControlState,
            Self::NotScrubbed => Rule::Residue,
            Self::NotRecorded => Rule::TraceHonesty,
        }
    }

    /// Whether it is undone before anybody looks who does not see every store: then only `step` finds it.
    #[must_use]
    pub const fn is_undone(self) -> bool {
        matches!(self, Self::WritableForAMoment)
    }

    /// The guest's image, an ELF file.
    ///
    /// # Errors
    /// A sentence, if there is no memory to lay the guest out in.
    pub fn image(self) -> Result<Vec<u8>, String> {
        // One CPU, 16 MiB, no input: where its tables lie follows from that.
        let rig = Rig::new(1, true, Mediation::Trace)?;
        Ok(elf(&self.code(&rig).code))
    }

    /// The image of a guest that has KVM write to a page table: by the MSR that says where it keeps the
    /// guest's clock. What a CPU does not offer ends in an exception.
    ///
    /// # Errors
    /// As [`Self::image`].
    pub fn clock_in_a_table() -> Result<Vec<u8>, String> {
        let rig = Rig::new(1, true, Mediation::Trace)?;
        let mut asm = Asm::default();
        asm.wrmsr(MSR_KVM_SYSTEM_TIME, (rig.layout().pool.end().0 - 4096) | 1).exit(0);
        let end = asm.code.len();
        asm.jump_to(end);
        Ok(elf(&asm.code))
    }

    fn code(self, rig: &Rig) -> Asm {
        let mut asm = Asm::default();
        let layout = rig.layout();
        let frame = FrameRange::single(layout.zone_frames().start());
        let own = window(0);
        let map = |asm: &mut Asm, frame: lacuna_abi::addr::Gfn, flags| {
            place(rig, own, Level::Pt).map(|at| asm.store(at, Entry::new(frame, flags).0));
        };
        match self {
            Self::DirectMapped => _ = asm.operation(OpKind::Seal, frame),
            Self::MappedWhileSealed => {
                asm.operation(OpKind::Seal, frame);
                map(&mut asm, frame.start(), Entry::DATA);
            }
            Self::MappedGlobally => {
                asm.operation(OpKind::Seal, frame).operation(OpKind::Open, frame);
                map(&mut asm, frame.start(), Entry::DATA | Entry::GLOBAL);
            }
            Self::NotFlushed => {
                let (root, va) = (rig.root, layout.zone.va);
                if let Some(at) = place(rig, va, Level::Pd) {
                    let old = locate(&*rig.memory, root, va, Level::Pd);
                    let old = old.map_or(Entry::EMPTY, |at| Entry(rig.load(at)));
                    asm.store(at, 0);
                    asm.record(
                        1,
                        Event::EntryWrite(EntryWrite {
                            root,
                            pcid: 0,
                            va,
                            level: Level::Pd,
                            count: 1,
                            old,
                            new: Entry::EMPTY,
                            grant: 0,
                        }),
                    );
                }
                asm.operation(OpKind::Seal, frame);
            }
            Self::TableWritable => map(&mut asm, rig.root.frame(), Entry::DATA),
            Self::WritableForAMoment => {
                map(&mut asm, rig.root.frame(), Entry::DATA);
                place(rig, own, Level::Pt).map(|at| asm.store(at, 0));
            }
            Self::CodeWritable => {
                map(&mut asm, layout.image.gpa_of(IMAGE).frame(), Entry::DATA);
            }
            Self::ForRing3 => {
                // The way to the window must grant it too.
                for level in [Level::Pml4, Level::Pdpt, Level::Pd] {
                    if let (Some(at), Ok(old)) =
                        (place(rig, own, level), locate(&*rig.memory, rig.root, own, level))
                    {
                        asm.store(at, rig.load(old) | Entry::USER);
                    }
                }
                map(&mut asm, layout.metadata.gpa.frame(), Entry::DATA | Entry::USER);
            }
            Self::WriteProtectOff => {
                // MOV RAX, CR0; BTR RAX, 16; MOV CR0, RAX.
                asm.raw(&[0x0f, 0x20, 0xc0, 0x48, 0x0f, 0xba, 0xf0, 0x10, 0x0f, 0x22, 0xc0]);
            }
            Self::NotScrubbed => {
                asm.store(layout.zone.va, 0x5345_4352_4554).operation(OpKind::Seal, frame);
                asm.operation(OpKind::Release, frame);
            }
            Self::NotRecorded => {
                if let Some(at) = place(rig, own, Level::Pt) {
                    asm.set(RAX, 0);
                    asm.store(at, Entry::new(layout.metadata.gpa.frame(), Entry::READ_ONLY).0);
                }
            }
        }
        asm.call(Call::Checkpoint).exit(0);
        let end = asm.code.len();
        asm.jump_to(end);
        asm
    }
}

/// Where the guest has the entry for an address mapped, in the table pool.
fn place(rig: &Rig, va: Gva, level: Level) -> Option<Gva> {
    let at = locate(&*rig.memory, rig.root, va, level).ok()?;
    at.offset_from(rig.layout().pool.gpa).map(|offset| POOL.wrapping_add(offset))
}
