//! What a vCPU's registers lead to: values, addresses, memory.

use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use iced_x86::{Decoder, DecoderOptions, Instruction, Register};
use lacuna_abi::addr::{Gpa, Gva, PAGE_SIZE};
use lacuna_abi::layout::Place;
use lacuna_abi::walk::translate;

/// Longest x86 instruction.
const MAX_INSTRUCTION: usize = 15;

/// A vCPU between two instructions.
pub(super) struct Space<'a> {
    pub registers: &'a Registers,
    pub memory: &'a Memory,
}

impl Space<'_> {
    /// Physical address behind a virtual one, by the tables as they are.
    pub(super) fn translate(&self, va: Gva) -> Option<Gpa> {
        translate(self.memory, self.registers.root(), va).ok().map(|leaf| leaf.gpa_of(va))
    }

    /// The same where a store may go.
    pub(super) fn translate_for_write(&self, va: Gva) -> Option<Gpa> {
        let leaf = translate(self.memory, self.registers.root(), va).ok()?;
        leaf.writable.then(|| leaf.gpa_of(va))
    }

    pub(super) fn in_pool(&self, gpa: Gpa) -> bool {
        self.memory.layout().pool.contains(gpa)
    }

    /// Whether the address lies in a CPU's window.
    pub(super) fn in_window(&self, va: Gva) -> bool {
        matches!(self.memory.layout().place_of(va), Place::Window(_))
    }

    /// A word of low memory.
    pub(super) fn word(&self, at: Gpa) -> Option<u64> {
        self.memory.load(at).ok()
    }

    /// Eight bytes at any address.
    pub(super) fn read_word(&self, va: Gva) -> Option<u64> {
        let mut bytes = [0; 8];
        (self.read(va, &mut bytes) == bytes.len()).then(|| u64::from_le_bytes(bytes))
    }

    /// The instruction at RIP.
    pub(super) fn decode(&self) -> Option<Instruction> {
        self.decode_at(self.registers.rip)
    }

    pub(super) fn decode_at(&self, rip: u64) -> Option<Instruction> {
        let mut bytes = [0; MAX_INSTRUCTION];
        let len = self.read(Gva(rip), &mut bytes);
        let mut decoder = Decoder::with_ip(64, &bytes[..len], rip, DecoderOptions::NONE);
        let instruction = decoder.decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Reads bytes, up to the first page that is not mapped.
    fn read(&self, va: Gva, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            let at = va.wrapping_add(done as u64);
            let Some(gpa) = self.translate(at) else { break };
            let in_page = usize::try_from(PAGE_SIZE - at.0 % PAGE_SIZE).unwrap_or(0);
            let len = in_page.min(into.len() - done);
            if !self.memory.inspect(gpa, &mut into[done..done + len]) {
                break;
            }
            done += len;
        }
        done
    }

    pub(super) fn value(&self, register: Register) -> Option<u64> {
        self.registers.value(register)
    }
}
