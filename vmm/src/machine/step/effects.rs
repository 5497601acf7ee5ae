//! What an instruction is about to do, as far as it matters: the words of the table pool that it may
//! store to, what it invalidates, the control register that it loads, and where it may go on.

use super::Space;
use crate::machine::state::Registers;
use iced_x86::{
    FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};
use lacuna_abi::addr::{Gpa, Gva, PAGE_SIZE};

/// Most pages that one instruction's stores are followed over; a step that goes further is lost.
const MAX_PAGES: u64 = 1024;
/// Largest operand that is no string.
const MAX_OPERAND: u64 = 4096;

/// A word of the table pool that may be stored to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Watch {
    /// Its place.
    pub at: Gpa,
    /// What it held.
    pub old: u64,
    /// Whether the instruction may leave it alone.
    pub conditional: bool,
    /// Of a string instruction: how far into the string it lies, in bytes.
    pub offset: u64,
}

/// A page of a window that is read or written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Access {
    /// Its first address.
    pub page: Gva,
    pub write: bool,
    /// As [`Watch::offset`].
    pub offset: u64,
}

/// What an instruction does beside loads and stores.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Special {
    /// INVLPG of this address.
    Invalidate(Gva),
    /// INVPCID of this type and descriptor.
    Pcid(u64, [u64; 2]),
    /// MOV to CR3 of this value.
    LoadRoot(u64),
    /// It may change CR0, CR4 or EFER.
    Control,
    /// A command for the CPU's own interrupt controller.
    OwnInterrupt,
    /// HLT.
    Halt,
    /// IRETQ.
    InterruptReturn,
    /// It may be followed by another instruction in the same step.
    Shadow,
    /// PUSHF: the flags are in the word at this address.
    PushFlags(Gva),
    /// OUT, which comes out of the guest before it is complete.
    Out,
}

/// Where the CPU may go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Flow {
    /// At one of these addresses.
    To(u64, Option<u64>),
    /// Only where an exception or interrupt leads.
    Elsewhere,
}

impl Flow {
    pub(super) fn allows(self, rip: u64) -> bool {
        matches!(self, Self::To(one, other) if one == rip || other == Some(rip))
    }
}

/// What an instruction is about to do.
#[derive(Debug)]
pub(super) struct Intended {
    pub instruction: Instruction,
    pub flow: Flow,
    pub special: Option<Special>,
    pub watches: Vec<Watch>,
    /// Accesses through windows.
    pub accesses: Vec<Access>,
    /// Bytes of each element of a repeated string instruction.
    pub element: Option<u64>,
    /// It may store where its stores are not followed any more: bytes into the string.
    pub beyond: Option<u64>,
}

/// An operand in memory.
struct Operand {
    va: Gva,
    bytes: u64,
    /// It is stored to; or may be.
    store: Option<Certainty>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Certainty {
    Always,
    Perhaps,
}

/// Works out what instructions are about to do.
pub(super) struct Foresight {
    factory: InstructionInfoFactory,
}

impl Default for Foresight {
    fn default() -> Self {
        Self { factory: InstructionInfoFactory::new() }
    }
}

impl Foresight {
    /// What the instruction at RIP is about to do; the text of why that cannot be told.
    pub(super) fn of(
        &mut self,
        instruction: Instruction,
        space: &Space<'_>,
    ) -> Result<Intended, &'static str> {
        if let Some(why) = not_followed(&instruction) {
            return Err(why);
        }
        let flow = flow(&instruction, space)?;
        let special = special(&instruction, space)?;
        let mut intended = Intended {
            instruction,
            flow,
            special,
            watches: Vec::new(),
            accesses: Vec::new(),
            element: None,
            beyond: None,
        };
        if repeats(&instruction) {
            let element =
                string_element(&instruction).ok_or("it is no known string instruction")?;
            let bytes = space.registers.general[Registers::RCX].saturating_mul(element);
            intended.element = Some(element);
            for (va, stores) in strings(&instruction, space)? {
                intended.string(va, bytes, stores, space);
            }
            return Ok(intended);
        }
        for operand in self.operands(&instruction, space)? {
            intended.operand(&operand, &|_, _| 0, space);
        }
        Ok(intended)
    }

    fn operands(
        &mut self,
        instruction: &Instruction,
        space: &Space<'_>,
    ) -> Result<Vec<Operand>, &'static str> {
        let mut operands = Vec::new();
        for memory in self.factory.info(instruction).used_memory() {
            let store = match memory.access() {
                OpAccess::Write | OpAccess::ReadWrite => Some(Certainty::Always),
                OpAccess::CondWrite | OpAccess::ReadCondWrite => Some(Certainty::Perhaps),
                OpAccess::Read | OpAccess::CondRead => None,
                OpAccess::None | OpAccess::NoMemAccess => continue,
            };
            let address = memory.virtual_address(0, |register, _, _| space.value(register));
            let va = match address {
                Some(va) => Gva(va),
                None if store.is_some() => {
                    return Err("the address of its operand cannot be worked out");
                }
                // A gather.
                None => continue,
            };
            let bytes = u64::try_from(memory.memory_size().size()).unwrap_or(0);
            if store.is_some() && (bytes == 0 || bytes > MAX_OPERAND) {
                return Err("the size of its operand is not known");
            }
            let va = va.wrapping_add(bit_offset(instruction, bytes, space)?);
            operands.push(Operand { va, bytes: bytes.clamp(1, MAX_OPERAND), store });
        }
        Ok(operands)
    }
}

impl Intended {
    /// Watches the words of the table pool that an operand's store touches, and notes the pages of
    /// windows that it lies in; `offset_of` says, by the first and the last of its bytes in a word or a
    /// page, how much is done before that is touched.
    fn operand(
        &mut self,
        operand: &Operand,
        offset_of: &dyn Fn(u64, u64) -> u64,
        space: &Space<'_>,
    ) {
        let mut done = 0;
        while done < operand.bytes {
            let va = operand.va.wrapping_add(done);
            let part = (PAGE_SIZE - va.0 % PAGE_SIZE).min(operand.bytes - done);
            if space.in_window(va) {
                let (page, write) = (Gva(va.0 - va.0 % PAGE_SIZE), operand.store.is_some());
                let offset = offset_of(done, done + part - 1);
                self.accesses.push(Access { page, write, offset });
            }
            if let Some(certainty) = operand.store
                && let Some(gpa) = space.translate(va)
                && space.in_pool(gpa)
            {
                let first = gpa.0 / 8 * 8;
                for at in (first..gpa.0 + part).step_by(8).map(Gpa) {
                    let Some(old) = space.word(at) else { continue };
                    let (low, high) = (at.0.max(gpa.0), (at.0 + 8).min(gpa.0 + part) - 1);
                    let offset = offset_of(done + (low - gpa.0), done + (high - gpa.0));
                    let conditional = certainty == Certainty::Perhaps;
                    self.watches.push(Watch { at, old, conditional, offset });
                }
            }
            done += part;
        }
    }

    /// The same of a string that may be long.
    fn string(&mut self, va: Gva, bytes: u64, write: bool, space: &Space<'_>) {
        let followed = bytes.min(MAX_PAGES * PAGE_SIZE);
        if followed < bytes && write {
            self.beyond = Some(followed);
        }
        let store = write.then_some(Certainty::Always);
        let down = space.registers.rflags & super::RFLAGS_DF != 0;
        let Some(element) = self.element else { return };
        if down {
            // Downwards from the first element: the string starts at its last.
            let start = va.0.wrapping_add(element).wrapping_sub(followed);
            let operand = Operand { va: Gva(start), bytes: followed, store };
            self.operand(&operand, &|_, last| followed.saturating_sub(last + 1), space);
        } else {
            let operand = Operand { va, bytes: followed, store };
            self.operand(&operand, &|first, _| first, space);
        }
    }
}

/// Whether a string instruction repeats.
fn repeats(instruction: &Instruction) -> bool {
    instruction.is_string_instruction()
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

/// Why an instruction is not followed, if it is one of those: where it leads, or what it stores, is more
/// than its operands say.
fn not_followed(instruction: &Instruction) -> Option<&'static str> {
    match instruction.mnemonic() {
        Mnemonic::Syscall | Mnemonic::Sysenter | Mnemonic::Sysret | Mnemonic::Sysexit => {
            Some("it changes the privilege, which is not followed")
        }
        Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Int3 | Mnemonic::Into => {
            Some("it is a software interrupt, which is not followed")
        }
        Mnemonic::Clzero => Some("it stores a line of the cache, which is not followed"),
        _ => None,
    }
}

/// How far from its address an instruction reaches whose bit offset is in a register (SDM volume 2,
/// "BTS"): whole operands, in either direction.
fn bit_offset(
    instruction: &Instruction,
    bytes: u64,
    space: &Space<'_>,
) -> Result<u64, &'static str> {
    let tests = matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    );
    if !tests || instruction.op1_kind() != OpKind::Register {
        return Ok(0);
    }
    let value = space.value(instruction.op1_register()).ok_or("its bit offset is not known")?;
    let offset = match bytes {
        2 => {
            i64::from(value.to_le_bytes().first_chunk().map_or(0, |v| i16::from_le_bytes(*v))) >> 4
        }
        4 => {
            i64::from(value.to_le_bytes().first_chunk().map_or(0, |v| i32::from_le_bytes(*v))) >> 5
        }
        _ => value.cast_signed() >> 6,
    };
    Ok(offset.cast_unsigned().wrapping_mul(bytes))
}

/// Bytes of an element of a string instruction.
fn string_element(instruction: &Instruction) -> Option<u64> {
    use Mnemonic as M;
    Some(match instruction.mnemonic() {
        M::Stosb | M::Movsb | M::Insb | M::Scasb | M::Cmpsb | M::Lodsb | M::Outsb => 1,
        M::Stosw | M::Movsw | M::Insw | M::Scasw | M::Cmpsw | M::Lodsw | M::Outsw => 2,
        M::Stosd | M::Movsd | M::Insd | M::Scasd | M::Cmpsd | M::Lodsd | M::Outsd => 4,
        M::Stosq | M::Movsq | M::Scasq | M::Cmpsq | M::Lodsq => 8,
        _ => return None,
    })
}

/// Where the strings of a repeated instruction start, and whether it stores there.
fn strings(instruction: &Instruction, space: &Space<'_>) -> Result<Vec<(Gva, bool)>, &'static str> {
    let mut strings = Vec::new();
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::MemoryESRDI | OpKind::MemorySegRSI => {}
            OpKind::MemoryESEDI
            | OpKind::MemoryESDI
            | OpKind::MemorySegESI
            | OpKind::MemorySegSI => {
                return Err("its addresses are cut to 32 bits, which is not followed");
            }
            _ => continue,
        }
        let value = |register, _, _| space.value(register);
        let va = instruction.virtual_address(operand, 0, value);
        let va = Gva(va.ok_or("the address of its operand cannot be worked out")?);
        // SCAS and CMPS have RDI as their second operand, and only read.
        let stores = operand == 0 && instruction.op0_kind() == OpKind::MemoryESRDI;
        strings.push((va, stores));
    }
    Ok(strings)
}

/// Where the CPU may go on behind the instruction.
fn flow(instruction: &Instruction, space: &Space<'_>) -> Result<Flow, &'static str> {
    let next = instruction.next_ip();
    let rsp = space.registers.general[Registers::RSP];
    Ok(match instruction.flow_control() {
        FlowControl::Next if repeats(instruction) => Flow::To(next, Some(instruction.ip())),
        FlowControl::Next => Flow::To(next, None),
        FlowControl::UnconditionalBranch | FlowControl::Call if is_near(instruction) => {
            Flow::To(instruction.near_branch_target(), None)
        }
        FlowControl::ConditionalBranch => Flow::To(next, Some(instruction.near_branch_target())),
        FlowControl::IndirectBranch | FlowControl::IndirectCall => {
            let target = match instruction.op0_kind() {
                OpKind::Register => space.value(instruction.op0_register()),
                OpKind::Memory => instruction
                    .virtual_address(0, 0, |register, _, _| space.value(register))
                    .and_then(|va| space.read_word(Gva(va))),
                _ => None,
            };
            Flow::To(target.ok_or("where it branches to cannot be worked out")?, None)
        }
        FlowControl::Return if instruction.mnemonic() == Mnemonic::Ret => {
            let target = space.read_word(Gva(rsp));
            Flow::To(target.ok_or("its return address cannot be read")?, None)
        }
        _ => Flow::Elsewhere,
    })
}

fn is_near(instruction: &Instruction) -> bool {
    matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    )
}

fn special(instruction: &Instruction, space: &Space<'_>) -> Result<Option<Special>, &'static str> {
    let general = &space.registers.general;
    let address = |operand| {
        let va = instruction.virtual_address(operand, 0, |register, _, _| space.value(register));
        va.map(Gva).ok_or("the address of its operand cannot be worked out")
    };
    let to_shadow = |register: Register| matches!(register, Register::SS);
    Ok(Some(match instruction.mnemonic() {
        Mnemonic::Invlpg => Special::Invalidate(address(0)?),
        Mnemonic::Invpcid => {
            let kind = space.value(instruction.op0_register()).ok_or("its type is not known")?;
            let at = address(1)?;
            let words = [at, at.wrapping_add(8)].map(|at| space.read_word(at));
            let [Some(pcid), Some(va)] = words else { return Err("its descriptor cannot be read") };
            Special::Pcid(kind, [pcid, va])
        }
        Mnemonic::Mov => match instruction.op0_register() {
            Register::CR3 => {
                let value = space.value(instruction.op1_register());
                Special::LoadRoot(value.ok_or("the root that it loads is not known")?)
            }
            Register::CR0 | Register::CR4 => Special::Control,
            register if to_shadow(register) => Special::Shadow,
            _ => return Ok(None),
        },
        Mnemonic::Pop if to_shadow(instruction.op0_register()) => Special::Shadow,
        Mnemonic::Lmsw | Mnemonic::Clts => Special::Control,
        Mnemonic::Wrmsr if general[Registers::RCX] & 0xffff_ffff == super::X2APIC_COMMAND => {
            Special::OwnInterrupt
        }
        Mnemonic::Wrmsr => Special::Control,
        Mnemonic::Hlt => Special::Halt,
        Mnemonic::Iretq => Special::InterruptReturn,
        Mnemonic::Sti | Mnemonic::Swapgs => Special::Shadow,
        Mnemonic::Pushfq => Special::PushFlags(Gva(general[Registers::RSP].wrapping_sub(8))),
        Mnemonic::Out => Special::Out,
        _ => return Ok(None),
    }))
}
