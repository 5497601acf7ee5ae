//! Interrupts that the VMM delivers, returns from them, and the delivery of exceptions as KVM does it
//! (SDM volume 3, "Interrupt and Exception Handling").

use super::effects::Intended;
use super::{RFLAGS_TF, Space, Stepper, Why};
use crate::machine::state::Registers;
use lacuna_abi::addr::{Gpa, Gva};

/// Words of a frame: RIP, CS, RFLAGS, RSP, SS.
const FRAME: usize = 5;
/// RFLAGS that the delivery clears: TF, IF, NT, RF.
const CLEARED: u64 = 1 << 8 | 1 << 9 | 1 << 14 | 1 << 16;
/// Of RFLAGS, what IRETQ takes from the frame.
const RETURNED: u64 = 0x0025_7fd5;
/// The bit of RFLAGS that is always set.
const FIXED: u64 = 2;
/// Exceptions have vectors below this.
const EXCEPTIONS: u8 = 32;
/// Words on an exception's stack among which the frame starts: an error code, and what the handler's
/// first instruction pushed.
const ABOVE_FRAME: u64 = 3;

/// A gate of the IDT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Gate {
    entry: u64,
    selector: u16,
    /// Stack, from 1; 0 for the current one.
    ist: u64,
    /// Whether interrupts stay as they are.
    trap: bool,
}

impl Stepper {
    /// The registers behind the delivery of an interrupt, whose frame is on its stack.
    pub(super) fn deliver(&self, vector: u8) -> Result<Registers, Why> {
        let space = self.space();
        let registers = space.registers;
        let gate = gate(&space, vector);
        let gate = gate.ok_or_else(|| format!("interrupt {vector:#x} has no gate"))?;
        if gate.selector != registers.cs {
            return Err(format!("the gate of interrupt {vector:#x} leads to another segment"));
        }
        let top = if gate.ist == 0 {
            Some(registers.general[Registers::RSP])
        } else {
            space.read_word(Gva(registers.tss_base.wrapping_add(28 + 8 * gate.ist)))
        };
        let top = top.ok_or_else(|| format!("interrupt {vector:#x} has no stack"))? & !0xf;
        let words = [
            registers.rip,
            registers.cs.into(),
            registers.rflags & !RFLAGS_TF,
            registers.general[Registers::RSP],
            registers.ss.into(),
        ];
        let rsp = top.wrapping_sub(8 * FRAME as u64);
        for (index, word) in (0..).zip(words) {
            let at = stack_word(&space, Gva(rsp.wrapping_add(8 * index)));
            let stored = at.is_some_and(|at| self.memory.store(at, word).is_ok());
            if !stored {
                return Err(format!("the stack of interrupt {vector:#x} is no memory for one"));
            }
        }
        let cleared = if gate.trap { CLEARED & !super::RFLAGS_IF } else { CLEARED };
        let mut after = *registers;
        after.rip = gate.entry;
        after.rflags &= !cleared;
        after.general[Registers::RSP] = rsp;
        Ok(after)
    }

    /// The registers behind an IRETQ to the same privilege.
    pub(super) fn interrupt_return(&self) -> Result<Registers, Why> {
        let space = self.space();
        let registers = space.registers;
        let rsp = registers.general[Registers::RSP];
        let mut frame = [0; FRAME];
        for (index, word) in (0..).zip(&mut frame) {
            let at = Gva(rsp.wrapping_add(8 * index));
            *word = space.read_word(at).ok_or("its frame cannot be read")?;
        }
        let [rip, cs, rflags, rsp, ss] = frame;
        if cs != u64::from(registers.cs) || (ss != u64::from(registers.ss) && ss != 0) {
            return Err("it returns to another segment, which is not followed".into());
        }
        let mut after = *registers;
        after.rip = rip;
        after.rflags = rflags & RETURNED & !RFLAGS_TF | FIXED;
        after.general[Registers::RSP] = rsp;
        Ok(after)
    }

    /// Whether the stop is at the start of an exception's handler, or behind its first instruction, with
    /// a frame that leads back to where the exception came from.
    pub(super) fn is_exception(
        &self,
        before: &Registers,
        intended: &Intended,
        after: &Registers,
    ) -> Result<bool, Why> {
        let space = Space { registers: after, memory: &self.memory };
        let behind = intended.instruction.next_ip();
        let rsp = after.general[Registers::RSP];
        let frame = (0..ABOVE_FRAME).find(|above| {
            let word = |index: u64| space.read_word(Gva(rsp.wrapping_add(8 * (above + index))));
            let rip = word(0).is_some_and(|rip| rip == before.rip || rip == behind);
            rip && word(1) == Some(before.cs.into())
                && word(3) == Some(before.general[Registers::RSP])
        });
        let Some(above) = frame else { return Ok(false) };
        let words = 0..above + FRAME as u64;
        let mut stack = words.filter_map(|word| space.translate(Gva(rsp.wrapping_add(8 * word))));
        if stack.any(|at| space.in_pool(at)) {
            return Err("the frame of an exception lies in a page table".into());
        }
        let is_there = (0..EXCEPTIONS).filter_map(|vector| gate(&space, vector)).any(|gate| {
            let first = space.decode_at(gate.entry);
            after.rip == gate.entry || first.is_some_and(|first| after.rip == first.next_ip())
        });
        if is_there {
            self.hide_trap_flag(Gva(rsp.wrapping_add(8 * (above + 2))));
        }
        Ok(is_there)
    }
}

/// A gate, if it is present and an interrupt or trap gate.
fn gate(space: &Space<'_>, vector: u8) -> Option<Gate> {
    let offset = 16 * u64::from(vector);
    if offset + 15 > space.registers.idt_limit {
        return None;
    }
    let at = Gva(space.registers.idt_base.wrapping_add(offset));
    let (low, high) = (space.read_word(at)?, space.read_word(at.wrapping_add(8))?);
    let kind = low >> 40 & 0xf;
    let present = low >> 47 & 1 != 0;
    if !present || !matches!(kind, 0xe | 0xf) {
        return None;
    }
    Some(Gate {
        entry: low & 0xffff | low >> 32 & 0xffff_0000 | high << 32,
        selector: u16::try_from(low >> 16 & 0xffff).ok()?,
        ist: low >> 32 & 7,
        trap: kind == 0xf,
    })
}

/// Place of a word of a stack, which must be writable and no page table.
fn stack_word(space: &Space<'_>, va: Gva) -> Option<Gpa> {
    space.translate_for_write(va).filter(|at| at.is_aligned(8) && !space.in_pool(*at))
}
