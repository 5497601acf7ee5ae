//! Which access to a sealed frame stopped a vCPU, when KVM does not say so itself.
//!
//! Depending on the host, KVM reports an address, or only that an instruction cannot be emulated,
//! or only `EFAULT`. The VMM then decodes the instruction and walks the guest's tables; what it
//! cannot tell that way it does not claim.

use crate::machine::exit::AccessKind;
use crate::machine::state::Registers;
use iced_x86::{
    Decoder, DecoderOptions, Formatter, Instruction, InstructionInfoFactory, IntelFormatter,
    OpAccess, Register,
};
use lacuna_abi::addr::{Gfn, Gpa, Gva, PAGE_SIZE};
use lacuna_abi::walk::{NoLeaf, Tables, translate};

/// Longest x86 instruction.
const MAX_INSTRUCTION: usize = 15;
/// Longest function that is decoded from its start to find the instruction before an address.
const MAX_FUNCTION: u64 = 64 << 10;

/// An access to a sealed frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SealedAccess {
    /// Physical address.
    pub gpa: Gpa,
    /// How.
    pub kind: AccessKind,
    /// Virtual address, where it is known.
    pub va: Option<Gva>,
    /// The instruction's address.
    pub rip: u64,
    /// The instruction, in Intel syntax, where it could be read.
    pub instruction: Option<String>,
}

/// What decoding needs of the machine.
pub struct View<'a, T> {
    /// Registers of the vCPU that stopped.
    pub registers: &'a Registers,
    /// The table pool.
    pub tables: &'a T,
    /// Reads guest memory, sealed or not; `false` where there is none.
    pub inspect: &'a dyn Fn(Gpa, &mut [u8]) -> bool,
    /// Whether the second stage closed a frame.
    pub denied: &'a dyn Fn(Gfn) -> bool,
    /// Start of the function that holds an address.
    pub function: &'a dyn Fn(u64) -> Option<u64>,
}

/// Where a virtual address leads, as far as sealed frames go.
enum Way {
    /// To this physical address.
    To(Gpa),
    /// Through a sealed frame that is used as a table, at this entry.
    SealedTable(Gpa),
    /// Nowhere.
    Nowhere,
}

impl<T: Tables> View<'_, T> {
    /// Finds the access of the current instruction that a sealed frame stopped: the fetch, a walk,
    /// or one of the operands.
    #[must_use]
    pub fn find(&self) -> Option<SealedAccess> {
        let rip = self.registers.rip;
        match self.way(Gva(rip)) {
            Way::To(gpa) if (self.denied)(gpa.frame()) => {
                return Some(self.access(gpa, AccessKind::Fetch, Gva(rip), rip, None));
            }
            Way::SealedTable(gpa) => {
                return Some(self.access(gpa, AccessKind::PageWalk, Gva(rip), rip, None));
            }
            _ => {}
        }
        let instruction = self.decode(rip)?;
        self.operands(&instruction).find_map(|(va, kind)| match self.way(va) {
            Way::To(gpa) if (self.denied)(gpa.frame()) => {
                Some(self.access(gpa, kind, va, rip, Some(&instruction)))
            }
            Way::SealedTable(gpa) => {
                Some(self.access(gpa, AccessKind::PageWalk, va, rip, Some(&instruction)))
            }
            _ => None,
        })
    }

    /// Adds what can be known to an access whose address KVM reported. KVM may already have
    /// advanced RIP past a store, so the instruction before it is tried too.
    #[must_use]
    pub fn explain(&self, gpa: Gpa, kind: AccessKind) -> SealedAccess {
        let rip = self.registers.rip;
        let here = self.decode(rip).map(|instruction| (rip, instruction));
        let candidates = here.into_iter().chain(self.instruction_before(rip));
        for (at, instruction) in candidates {
            let hits: Vec<_> = self
                .operands(&instruction)
                .filter(|(va, _)| matches!(self.way(*va), Way::To(to) if to.frame() == gpa.frame()))
                .collect();
            // A read-modify-write arrives as a read on some hosts; its operand counts as written.
            let hit = hits.iter().find(|(_, operand)| *operand == kind).or(hits.first());
            if let Some((va, operand)) = hit {
                // KVM's address is exact; that of the operand may be off, where the instruction has
                // already moved its own pointer.
                let va = Gva(va.align_down(PAGE_SIZE).0 + gpa.0 % PAGE_SIZE);
                return self.access(gpa, *operand, va, at, Some(&instruction));
            }
            // With nested tables KVM is told the address of a table that a walk could not read, and
            // may take it for the operand's.
            let walked = self.operands(&instruction).find_map(|(va, _)| match self.way(va) {
                Way::SealedTable(entry) if entry.frame() == gpa.frame() => Some((va, entry)),
                _ => None,
            });
            if let Some((va, entry)) = walked {
                return self.access(entry, AccessKind::PageWalk, va, at, Some(&instruction));
            }
        }
        SealedAccess { gpa, kind, va: None, rip, instruction: None }
    }

    /// Finds out how the frame at `gpa` was touched, when KVM says only which frame it was: the
    /// fetch, a walk, an operand, the delivery of an event.
    #[must_use]
    pub fn identify(&self, gpa: Gpa) -> SealedAccess {
        let same = |access: &SealedAccess| access.gpa.frame() == gpa.frame();
        let found = self.find().filter(same).or_else(|| self.find_delivery().filter(same));
        found.unwrap_or_else(|| self.explain(gpa, AccessKind::Unknown))
    }

    /// Finds a walk of `va` that leads through a sealed frame: behind a page fault of the guest.
    #[must_use]
    pub fn walk_of(&self, va: Gva) -> Option<SealedAccess> {
        match self.way(va) {
            Way::SealedTable(gpa) => {
                let rip = self.registers.rip;
                let instruction = self.decode(rip);
                Some(self.access(gpa, AccessKind::PageWalk, va, rip, instruction.as_ref()))
            }
            _ => None,
        }
    }

    /// Finds a sealed frame under one of the stacks that exceptions are delivered on, after a
    /// triple fault: the TSS's RSP0 and IST stacks, and the current stack.
    #[must_use]
    pub fn find_delivery(&self) -> Option<SealedAccess> {
        let tss = Gva(self.registers.tss_base);
        // RSP0 at byte 4, IST 1 to 7 at bytes 36 to 91 (SDM volume 3, "Task Management in 64-bit
        // Mode").
        let stacks = [4].into_iter().chain((36..92).step_by(8));
        let tops = stacks.filter_map(|offset| self.read_word(tss.wrapping_add(offset)));
        let current = self.registers.general[Registers::RSP];
        tops.chain([current]).find_map(|top| {
            let va = Gva(top.wrapping_sub(8));
            match self.way(va) {
                Way::To(gpa) if top != 0 && (self.denied)(gpa.frame()) => {
                    let rip = self.registers.rip;
                    Some(self.access(gpa, AccessKind::EventDelivery, va, rip, None))
                }
                _ => None,
            }
        })
    }

    fn access(
        &self,
        gpa: Gpa,
        kind: AccessKind,
        va: Gva,
        rip: u64,
        instruction: Option<&Instruction>,
    ) -> SealedAccess {
        let instruction = instruction.map(|instruction| {
            let mut text = String::new();
            IntelFormatter::new().format(instruction, &mut text);
            text
        });
        SealedAccess { gpa, kind, va: Some(va), rip, instruction }
    }

    fn way(&self, va: Gva) -> Way {
        match translate(self.tables, self.registers.root(), va) {
            Ok(leaf) => Way::To(leaf.gpa_of(va)),
            Err(NoLeaf::Unreadable(_, at)) if (self.denied)(at.frame()) => Way::SealedTable(at),
            Err(_) => Way::Nowhere,
        }
    }

    /// Reads bytes at a virtual address, up to the first page that is not mapped.
    fn read(&self, va: Gva, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let at = va.wrapping_add(done as u64);
            let Way::To(gpa) = self.way(at) else { break };
            let in_page = PAGE_SIZE - at.0 % PAGE_SIZE;
            let len = usize::try_from(in_page).unwrap_or(0).min(into.len() - done);
            if !(self.inspect)(gpa, &mut into[done..done + len]) {
                break;
            }
            done += len;
        }
        done
    }

    fn read_word(&self, va: Gva) -> Option<u64> {
        let mut bytes = [0; 8];
        (self.read(va, &mut bytes) == bytes.len()).then(|| u64::from_le_bytes(bytes))
    }

    fn decode(&self, rip: u64) -> Option<Instruction> {
        let mut bytes = [0; MAX_INSTRUCTION];
        let len = self.read(Gva(rip), &mut bytes);
        let mut decoder = Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// The instruction that ends at `rip`, found by decoding its function from the start.
    fn instruction_before(&self, rip: u64) -> Option<(u64, Instruction)> {
        let start = (self.function)(rip.checked_sub(1)?)?;
        let len = rip.checked_sub(start).filter(|len| (1..=MAX_FUNCTION).contains(len))?;
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        if self.read(Gva(start), &mut bytes) != bytes.len() {
            return None;
        }
        let decoder = Decoder::with_ip(64, &bytes, start, DecoderOptions::NONE);
        let last = decoder.into_iter().last().filter(|i| !i.is_invalid() && i.next_ip() == rip)?;
        Some((last.ip(), last))
    }

    /// Addresses that an instruction accesses, first and last byte of each operand; stores first,
    /// because an operand that is read and written counts as written.
    fn operands(&self, instruction: &Instruction) -> impl Iterator<Item = (Gva, AccessKind)> {
        let mut found = Vec::new();
        let mut factory = InstructionInfoFactory::new();
        for memory in factory.info(instruction).used_memory() {
            let kind = match memory.access() {
                OpAccess::Write
                | OpAccess::CondWrite
                | OpAccess::ReadWrite
                | OpAccess::ReadCondWrite => AccessKind::Write,
                OpAccess::Read | OpAccess::CondRead => AccessKind::Read,
                _ => continue,
            };
            let address = memory.virtual_address(0, |register, _, _| self.value(register));
            let Some(address) = address else { continue };
            let last = u64::try_from(memory.memory_size().size()).unwrap_or(1).max(1) - 1;
            found.push((Gva(address), kind));
            found.push((Gva(address.wrapping_add(last)), kind));
        }
        found.sort_by_key(|(_, kind)| *kind != AccessKind::Write);
        found.into_iter()
    }

    fn value(&self, register: Register) -> Option<u64> {
        self.registers.value(register)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::paging::{Entry, Level};
    use lacuna_abi::walk::entry_address;
    use std::collections::BTreeMap;

    const ROOT: Gpa = Gpa(0x1000);
    const CODE: u64 = 0x40_0000;
    const DATA: u64 = 0x40_1000;
    const CLOSED: Gpa = Gpa(0x1_0000_0000);

    /// Code at CODE (frame 0x10), the closed frame at DATA.
    struct World {
        tables: BTreeMap<u64, u64>,
        code: Vec<u8>,
        registers: Registers,
    }

    impl World {
        fn new(code: &[u8]) -> Self {
            let mut tables = BTreeMap::new();
            let mut set = |table, level, va, entry: Entry| {
                tables.insert(entry_address(Gpa(table), level, Gva(va)).0, entry.0);
            };
            set(0x1000, Level::Pml4, CODE, Entry::new(Gfn(2), Entry::TABLE));
            set(0x2000, Level::Pdpt, CODE, Entry::new(Gfn(3), Entry::TABLE));
            set(0x3000, Level::Pd, CODE, Entry::new(Gfn(4), Entry::TABLE));
            set(0x4000, Level::Pt, CODE, Entry::new(Gfn(0x10), Entry::TEXT));
            set(0x4000, Level::Pt, DATA, Entry::new(CLOSED.frame(), Entry::DATA));
            // A table in the closed frame, for the 2 MiB from 0x60_0000 on.
            set(0x3000, Level::Pd, 0x60_0000, Entry::new(CLOSED.frame(), Entry::TABLE));
            let registers = Registers { cr3: ROOT.0, rip: CODE, ..Registers::default() };
            Self { tables, code: code.to_vec(), registers }
        }

        fn with<R>(&self, f: impl FnOnce(&View<'_, &dyn Fn(Gpa) -> Option<Entry>>) -> R) -> R {
            let read = |at: Gpa| {
                (0x1000..0x5000)
                    .contains(&at.0)
                    .then(|| Entry(self.tables.get(&at.0).copied().unwrap_or(0)))
            };
            let inspect = |at: Gpa, into: &mut [u8]| {
                for (offset, byte) in into.iter_mut().enumerate() {
                    let index = (at.0 as usize + offset).wrapping_sub(0x1_0000);
                    *byte = self.code.get(index).copied().unwrap_or(0x90);
                }
                true
            };
            f(&View {
                registers: &self.registers,
                tables: &(&read as &dyn Fn(Gpa) -> Option<Entry>),
                inspect: &inspect,
                denied: &|frame| frame == CLOSED.frame(),
                function: &|_| Some(CODE),
            })
        }
    }

    #[test]
    fn a_locked_store_is_found_by_its_operand() {
        // lock add [rax+8], rcx
        let mut world = World::new(&[0xf0, 0x48, 0x01, 0x48, 0x08]);
        world.registers.general[0] = DATA;
        let found = world.with(|view| view.find()).unwrap();
        assert_eq!((found.gpa, found.kind), (Gpa(CLOSED.0 + 8), AccessKind::Write));
        assert_eq!(found.va, Some(Gva(DATA + 8)));
        assert!(found.instruction.unwrap().contains("lock add"));
    }

    #[test]
    fn a_fetch_is_found_by_its_address() {
        let mut world = World::new(&[]);
        world.registers.rip = DATA + 0x10;
        let found = world.with(|view| view.find()).unwrap();
        assert_eq!((found.gpa, found.kind), (Gpa(CLOSED.0 + 0x10), AccessKind::Fetch));
    }

    #[test]
    fn a_push_is_a_store_to_the_stack() {
        let mut world = World::new(&[0x50]); // push rax
        world.registers.general[Registers::RSP] = DATA + 0x100;
        let found = world.with(|view| view.find()).unwrap();
        assert_eq!((found.kind, found.va), (AccessKind::Write, Some(Gva(DATA + 0xf8))));
    }

    #[test]
    fn a_string_instruction_is_found_by_its_source() {
        let mut world = World::new(&[0xf3, 0x48, 0xa5]); // rep movsq
        world.registers.general[1] = 4;
        world.registers.general[6] = DATA;
        world.registers.general[7] = CODE;
        let found = world.with(|view| view.find()).unwrap();
        assert_eq!((found.kind, found.gpa), (AccessKind::Read, CLOSED));
    }

    #[test]
    fn a_walk_through_a_closed_table_is_found() {
        let mut world = World::new(&[0x48, 0x8b, 0x00]); // mov rax, [rax]
        world.registers.general[0] = 0x60_3000;
        let found = world.with(|view| view.find()).unwrap();
        assert_eq!((found.kind, found.gpa), (AccessKind::PageWalk, Gpa(CLOSED.0 + 3 * 8)));
        assert_eq!(world.with(|view| view.walk_of(Gva(0x60_3000))).unwrap().gpa, found.gpa);
        assert_eq!(world.with(|view| view.walk_of(Gva(DATA))), None);
    }

    #[test]
    fn an_open_operand_is_not_blamed() {
        let mut world = World::new(&[0x48, 0x8b, 0x00]);
        world.registers.general[0] = CODE;
        assert_eq!(world.with(|view| view.find()), None);
        world.registers.general[0] = 0xdead_0000_0000;
        assert_eq!(world.with(|view| view.find()), None);
    }

    #[test]
    fn a_walk_that_kvm_takes_for_an_operand_is_told_as_a_walk() {
        // mov rcx, [rax]
        let mut world = World::new(&[0x48, 0x8b, 0x08]);
        world.registers.general[0] = 0x60_0000;
        let explained = world.with(|view| view.explain(CLOSED, AccessKind::Read));
        assert_eq!((explained.kind, explained.va), (AccessKind::PageWalk, Some(Gva(0x60_0000))));
        // The same exit, where the operand does lie in the frame.
        world.registers.general[0] = DATA;
        let explained = world.with(|view| view.explain(CLOSED, AccessKind::Read));
        assert_eq!((explained.kind, explained.va), (AccessKind::Read, Some(Gva(DATA))));
    }

    #[test]
    fn a_store_that_kvm_already_stepped_over_is_explained() {
        // mov [rax], rcx; nop
        let mut world = World::new(&[0x48, 0x89, 0x08, 0x90]);
        world.registers.general[0] = DATA;
        world.registers.rip = CODE + 3;
        let explained = world.with(|view| view.explain(CLOSED, AccessKind::Write));
        assert_eq!((explained.rip, explained.va), (CODE, Some(Gva(DATA))));
    }

    #[test]
    fn a_frame_that_kvm_names_without_more_is_identified() {
        let mut world = World::new(&[0x48, 0x8b, 0x00]); // mov rax, [rax]
        world.registers.general[0] = DATA + 0x20;
        let found = world.with(|view| view.identify(CLOSED));
        assert_eq!((found.kind, found.gpa), (AccessKind::Read, Gpa(CLOSED.0 + 0x20)));
        world.registers.rip = DATA;
        assert_eq!(world.with(|view| view.identify(CLOSED)).kind, AccessKind::Fetch);
        world.registers.rip = CODE;
        world.registers.general[0] = CODE;
        let unknown = world.with(|view| view.identify(CLOSED));
        assert_eq!((unknown.kind, unknown.gpa), (AccessKind::Unknown, CLOSED));
    }

    #[test]
    fn a_locked_access_that_arrives_as_a_read_is_a_write() {
        // lock add [rax], rcx
        let mut world = World::new(&[0xf0, 0x48, 0x01, 0x08]);
        world.registers.general[0] = DATA;
        let explained = world.with(|view| view.explain(CLOSED, AccessKind::Read));
        assert_eq!((explained.kind, explained.va), (AccessKind::Write, Some(Gva(DATA))));
    }

    #[test]
    fn a_push_that_already_moved_the_stack_pointer_has_the_right_address() {
        // push rax; nop
        let mut world = World::new(&[0x50, 0x90]);
        world.registers.general[Registers::RSP] = DATA + 0xff8;
        world.registers.rip = CODE + 1;
        let gpa = Gpa(CLOSED.0 + 0xff8);
        let explained = world.with(|view| view.explain(gpa, AccessKind::Write));
        assert_eq!((explained.rip, explained.va), (CODE, Some(Gva(DATA + 0xff8))));
    }

    #[test]
    fn what_cannot_be_told_is_not_claimed() {
        let world = World::new(&[0x90]);
        let explained = world.with(|view| view.explain(CLOSED, AccessKind::Read));
        assert_eq!((explained.va, explained.instruction), (None, None));
    }

    #[test]
    fn a_closed_exception_stack_is_found_after_a_triple_fault() {
        // The TSS lies in the code page, IST 1 points to the end of the closed frame.
        let mut code = vec![0; 104];
        code[36..44].copy_from_slice(&(DATA + 0x1000).to_le_bytes());
        let mut world = World::new(&code);
        world.registers.tss_base = CODE;
        let found = world.with(|view| view.find_delivery()).unwrap();
        assert_eq!((found.kind, found.gpa), (AccessKind::EventDelivery, Gpa(CLOSED.0 + 0xff8)));
        world.registers.tss_base = 0;
        assert_eq!(world.with(|view| view.find_delivery()), None);
    }
}
