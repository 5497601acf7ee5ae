//! The few instructions that hostile guests are made of (Intel SDM volume 2).

use lacuna_abi::addr::Gva;
use lacuna_abi::event::{Event, RECORD_BYTES, RING_HEAD_WORD, Record};
use lacuna_abi::gate::{ARGS_WORD, Call, GATE_PORT, OpKind, OpWriter};
use lacuna_abi::layout::{SEQUENCE_OFFSET, SHARED, call_page_offset, ring_offset};

/// Code of CPU 0, as it grows.
#[derive(Clone, Debug, Default)]
pub(super) struct Asm {
    pub(super) code: Vec<u8>,
    /// Events that were recorded, and numbered.
    events: u64,
}

/// General registers, by their encoding.
pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;
pub(super) const RSP: u8 = 4;
pub(super) const RDI: u8 = 7;

impl Asm {
    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.code.extend_from_slice(bytes);
        self
    }

    /// MOV register, 64-bit value.
    pub(super) fn set(&mut self, register: u8, value: u64) -> &mut Self {
        self.raw(&[0x48, 0xb8 + register]).raw(&value.to_le_bytes())
    }

    /// Stores a word.
    pub(super) fn store(&mut self, at: Gva, value: u64) -> &mut Self {
        self.set(RDI, at.0).set(RAX, value).raw(&[0x48, 0x89, 0x07])
    }

    /// Loads a word.
    pub(super) fn load(&mut self, at: Gva) -> &mut Self {
        self.set(RDI, at.0).raw(&[0x48, 0x8b, 0x07])
    }

    /// OUT of the gate's port with this number.
    pub(super) fn out(&mut self, number: u64) -> &mut Self {
        self.set(RDX, GATE_PORT.into()).set(RAX, number).raw(&[0xef])
    }

    pub(super) fn call(&mut self, call: Call) -> &mut Self {
        self.out(call as u64)
    }

    /// Stores a word of the call page.
    pub(super) fn argument(&mut self, word: usize, value: u64) -> &mut Self {
        self.store(SHARED.wrapping_add(call_page_offset(0) + 8 * word as u64), value)
    }

    /// A call with one operation on frames from a physical address on.
    pub(super) fn operation(
        &mut self,
        kind: OpKind,
        frames: lacuna_abi::addr::FrameRange,
    ) -> &mut Self {
        let mut words = Vec::new();
        // One range always fits.
        _ = OpWriter::new(|word, value| words.push((word, value))).push(kind, frames);
        for (word, value) in words {
            self.argument(word, value);
        }
        self.call(Call::Ops)
    }

    /// Records an event with the next number, while nobody else takes any.
    pub(super) fn record(&mut self, seq: u64, event: Event) -> &mut Self {
        let ring = SHARED.wrapping_add(ring_offset(0));
        let record = Record { seq, cpu: 0, site: 0, event };
        let place = ring.wrapping_add(4096 + self.events * RECORD_BYTES);
        self.events += 1;
        self.store(SHARED.wrapping_add(SEQUENCE_OFFSET), seq);
        for (index, word) in record.to_words().into_iter().enumerate() {
            self.store(place.wrapping_add(8 * index as u64), word);
        }
        self.store(ring.wrapping_add(8 * RING_HEAD_WORD as u64), self.events)
    }

    /// Ends the program with this status.
    pub(super) fn exit(&mut self, status: u64) -> &mut Self {
        self.argument(ARGS_WORD, status).call(Call::Exit)
    }

    /// WRMSR.
    pub(super) fn wrmsr(&mut self, msr: u32, value: u64) -> &mut Self {
        self.set(RCX, msr.into())
            .set(RAX, value & 0xffff_ffff)
            .set(RDX, value >> 32)
            .raw(&[0x0f, 0x30])
    }

    /// Jumps back to a place in the code.
    pub(super) fn jump_to(&mut self, place: usize) -> &mut Self {
        let next = self.code.len() + 5;
        let back = i32::try_from(next - place).map_or(i32::MIN, |distance| -distance);
        self.raw(&[0xe9]).raw(&back.to_le_bytes())
    }
}
