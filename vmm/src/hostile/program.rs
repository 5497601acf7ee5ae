//! Guest programs that follow from a seed: each does some of what no guest should.

use super::asm::{Asm, RAX, RCX, RDI, RDX, RSP};
use super::elf::elf;
use crate::sim::Random;
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gva, PAGE_SIZE};
use lacuna_abi::event::{RING_BUSY_WORD, RING_HEAD_WORD, RING_INTENT_WORD};
use lacuna_abi::gate::{ARGS_WORD, COUNT_WORD, Call, OpKind};
use lacuna_abi::layout::{
    DIRECT_MAP, IMAGE, MAIN_STACK, METADATA, POOL, SEQUENCE_OFFSET, SHARED, ZONE_START,
    call_page_offset, direct_map, ring_offset, window,
};
use lacuna_abi::paging::Entry;

/// Which of the sources of a seed the draws come from: one that no CPU has.
const STREAM: u64 = 0x0068_6f73_7469_6c65;
/// Bytes of code that is nothing but chance.
const NOISE_BYTES: u64 = 3000;
/// Most things that one program does before it ends or starts over.
const MAX_DOINGS: u64 = 40;

/// A guest program.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Program {
    /// What it is made of, in a few words.
    pub kind: &'static str,
    /// Its image, an ELF file.
    pub image: Vec<u8>,
    /// How many vCPUs it is for. All of them run the same code.
    pub vcpus: u8,
}

impl Program {
    /// The program of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut maker = Maker { random: Random::new(seed, STREAM), asm: Asm::default() };
        let vcpus = if seed / 8 % 3 == 2 { 2 } else { 1 };
        if vcpus > 1 {
            maker.asm.call(Call::StartCpus);
        }
        let kind = match seed % 8 {
            0 => maker.noise(),
            1 => maker.only("gate calls", &[Maker::gate_call, Maker::operations]),
            2 => maker.only("rings", &[Maker::ring, Maker::gate_call]),
            3 => maker.only("tables", &[Maker::table, Maker::operations, Maker::touch]),
            4 => maker.only("roots and registers", &[Maker::root, Maker::register, Maker::table]),
            5 => maker.only("own ground", &[Maker::ground, Maker::operations]),
            6 => maker.storm(),
            _ => maker.only("all of it", &Maker::ALL),
        };
        Self { kind, image: elf(&maker.asm.code), vcpus }
    }
}

struct Maker {
    random: Random,
    asm: Asm,
}

/// One thing that a program does.
type Doing = fn(&mut Maker);

impl Maker {
    const ALL: [Doing; 8] = [
        Self::gate_call,
        Self::operations,
        Self::ring,
        Self::table,
        Self::root,
        Self::register,
        Self::ground,
        Self::touch,
    ];

    fn below(&mut self, bound: u64) -> u64 {
        self.random.below(bound)
    }

    fn word(&mut self) -> u64 {
        self.random.below(u64::MAX)
    }

    /// A number that something may depend on.
    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 | 1 => self.below(64),
            2 => self.below(1 << 16),
            3 => u64::MAX - self.below(64),
            4 => 1 << self.below(64),
            _ => self.word(),
        }
    }

    /// Random bytes as code.
    fn noise(&mut self) -> &'static str {
        let bytes: Vec<u8> = (0..NOISE_BYTES).map(|_| self.below(256).to_le_bytes()[0]).collect();
        self.asm.raw(&bytes);
        "noise"
    }

    /// Some of these things; then the end, or all of it again without one.
    fn only(&mut self, kind: &'static str, doings: &[Doing]) -> &'static str {
        for _ in 0..=self.below(MAX_DOINGS) {
            let index = usize::try_from(self.below(doings.len() as u64)).unwrap_or(0);
            doings[index](self);
        }
        match self.below(8) {
            0 => self.asm.jump_to(0),
            1 => self.asm.raw(&[0xfa, 0xf4]),
            2 => self.asm.raw(&[0xfb, 0xf4]),
            3 => self.asm.raw(&[0x0f, 0x0b]),
            4 => self.asm.call(Call::Exception),
            5 => self.asm.call(Call::Panic),
            _ => self.asm.exit(0),
        };
        // Where an exit was refused.
        let end = self.asm.code.len();
        self.asm.jump_to(end);
        kind
    }

    /// Interrupts of its own without end, by x2APIC and by gate call, and calls in between.
    fn storm(&mut self) -> &'static str {
        // IA32_APIC_BASE: on, in x2APIC mode; then the spurious-interrupt register: software on.
        self.asm.wrmsr(0x1b, 0xfee0_0d00).wrmsr(0x80f, 0x1ff);
        if self.below(2) == 0 {
            self.asm.raw(&[0xfb]);
        }
        let start = self.asm.code.len();
        for _ in 0..=self.below(16) {
            match self.below(4) {
                // Interrupt command register: to itself, NMI to itself, to all.
                0 => {
                    let vector = 0x20 + self.below(0xe0);
                    self.asm.wrmsr(0x83f, vector);
                }
                1 => _ = self.asm.wrmsr(0x830, 0x4_0400),
                2 => {
                    let command = self.word() & 0x000c_cfff;
                    self.asm.wrmsr(0x830, command);
                }
                _ => {
                    let number = self.below(20);
                    self.asm.argument(ARGS_WORD, number).call(Call::Interrupt);
                }
            }
        }
        self.asm.jump_to(start);
        "interrupt storm"
    }

    /// A place in memory that the guest has mapped, or does not.
    fn place(&mut self) -> Gva {
        let offset = self.below(64) * PAGE_SIZE + self.below(512) * 8;
        match self.below(9) {
            0 => POOL.wrapping_add(offset),
            1 => direct_map(ZONE_START).wrapping_add(offset),
            2 => SHARED.wrapping_add(offset),
            3 => METADATA.wrapping_add(offset),
            4 => MAIN_STACK.start(0).wrapping_add(offset),
            5 => window(0).wrapping_add(offset),
            6 => IMAGE.wrapping_add(offset),
            7 => DIRECT_MAP.wrapping_add(offset),
            _ => Gva(self.word()),
        }
    }

    fn frames(&mut self) -> FrameRange {
        let first = ZONE_START.frame();
        let start = match self.below(8) {
            0 => first.wrapping_add(self.below(BLOCK_FRAMES) * 16),
            1..=5 => first.wrapping_add(self.below(16)),
            6 => lacuna_abi::addr::Gfn(self.below(4096)),
            _ => lacuna_abi::addr::Gfn(self.number() >> 12),
        };
        let count = [1, 1, 1, BLOCK_FRAMES, 8 * BLOCK_FRAMES];
        let count = count[usize::try_from(self.below(5)).unwrap_or(0)];
        FrameRange::new(start, count).unwrap_or(FrameRange::single(first))
    }

    /// A call of any number with any arguments.
    fn gate_call(&mut self) {
        for _ in 0..self.below(4) {
            let word = usize::try_from(self.below(512)).unwrap_or(0);
            let word = if self.below(2) == 0 { ARGS_WORD + word % 6 } else { word };
            let value = self.number();
            self.asm.argument(word, value);
        }
        if self.below(2) == 0 {
            let count = self.number();
            self.asm.argument(COUNT_WORD, count);
        }
        // Those that end the guest come last.
        let ends = [Call::Exit, Call::Exception, Call::Panic].map(|call| call as u64);
        let number = match self.below(8) {
            0 => self.number() & 0xffff_ffff,
            _ => self.below(17),
        };
        if !ends.contains(&number) {
            self.asm.out(number);
        }
    }

    fn operations(&mut self) {
        let kind = [OpKind::Seal, OpKind::Open, OpKind::Release];
        let kind = kind[usize::try_from(self.below(3)).unwrap_or(0)];
        let frames = self.frames();
        self.asm.operation(kind, frames);
    }

    /// A ring whose head jumps, whose records are torn, whose numbers make no sense.
    fn ring(&mut self) {
        let ring = SHARED.wrapping_add(ring_offset(0));
        let words = [RING_HEAD_WORD, RING_BUSY_WORD, RING_INTENT_WORD, RING_INTENT_WORD + 3];
        let value = self.number();
        match self.below(4) {
            0 => {
                let word = words[usize::try_from(self.below(4)).unwrap_or(0)];
                self.asm.store(ring.wrapping_add(8 * word as u64), value);
            }
            1 => _ = self.asm.store(SHARED.wrapping_add(SEQUENCE_OFFSET), value),
            _ => {
                let at = PAGE_SIZE + self.below(64) * 8;
                self.asm.store(ring.wrapping_add(at), value);
                let head = self.below(9);
                self.asm.store(ring, head);
            }
        }
    }

    fn entry(&mut self) -> u64 {
        let flags = [
            Entry::DATA,
            Entry::TABLE,
            Entry::TEXT,
            Entry::DATA | Entry::GLOBAL,
            Entry::DATA | Entry::PAGE_SIZE,
            Entry::DATA | Entry::USER,
        ];
        let flags = flags[usize::try_from(self.below(6)).unwrap_or(0)];
        let address = match self.below(5) {
            0 => ZONE_START.0 + self.below(16) * PAGE_SIZE,
            // Image and tables follow each other from 2 MiB on.
            1 | 2 => 0x20_0000 + self.below(1024) * PAGE_SIZE,
            3 => self.number() & Entry::ADDRESS,
            _ => return self.word(),
        };
        address | flags
    }

    /// A table entry: to itself, to another table, to nothing, to anything.
    fn table(&mut self) {
        let at = POOL.wrapping_add(self.below(48) * PAGE_SIZE + self.below(512) * 8);
        let entry = self.entry();
        self.asm.store(at, entry);
        if self.below(4) == 0 {
            self.asm.call(Call::Checkpoint);
        }
    }

    fn root(&mut self) {
        let root = match self.below(4) {
            0 | 1 => 0x20_0000 + self.below(1024) * PAGE_SIZE,
            2 => ZONE_START.0 + self.below(16) * PAGE_SIZE,
            _ => self.number(),
        };
        if self.below(8) == 0 {
            // MOV CR3: most roots have nothing where the code lies.
            self.asm.set(RAX, root).raw(&[0x0f, 0x22, 0xd8]);
            return;
        }
        let call = if self.below(3) == 0 { Call::UnregisterRoot } else { Call::RegisterRoot };
        self.asm.argument(ARGS_WORD, root).argument(ARGS_WORD + 1, 0).call(call);
    }

    /// A bit of a control register, a model-specific register, a descriptor table.
    fn register(&mut self) {
        let bit = 1 << self.below(32);
        match self.below(7) {
            // MOV RAX, CR0; XOR RAX, RCX; MOV CR0, RAX. Then CR4 likewise.
            0 => {
                self.asm.raw(&[0x0f, 0x20, 0xc0]).set(RCX, bit);
                self.asm.raw(&[0x48, 0x31, 0xc8, 0x0f, 0x22, 0xc0]);
            }
            1 => {
                self.asm.raw(&[0x0f, 0x20, 0xe0]).set(RCX, bit);
                self.asm.raw(&[0x48, 0x31, 0xc8, 0x0f, 0x22, 0xe0]);
            }
            2 => {
                let (msr, value) = (self.below(0x2000), self.number());
                self.asm.wrmsr(u32::try_from(msr).unwrap_or(0), value);
            }
            3 => _ = self.asm.wrmsr(0xc000_0080, bit),
            // LIDT and LGDT of what lies there.
            4 => {
                let place = self.place();
                self.asm.set(RDI, place.0).raw(&[0x0f, 0x01, 0x1f]);
            }
            5 => {
                let place = self.place();
                self.asm.set(RDI, place.0).raw(&[0x0f, 0x01, 0x17]);
            }
            _ => {
                let register = usize::try_from(self.below(4)).unwrap_or(0);
                // CPUID, INVLPG, WBINVD, IN.
                let code: [&[u8]; 4] = [&[0x0f, 0xa2], &[0x0f, 0x01, 0x3f], &[0x0f, 0x09], &[0xed]];
                let place = self.place();
                self.asm.set(RDI, place.0).set(RDX, bit & 0xffff).raw(code[register]);
            }
        }
    }

    /// Takes away what it stands on: its stack, its tables, its code, its call page.
    fn ground(&mut self) {
        match self.below(5) {
            0 => {
                let place = self.place();
                self.asm.set(RSP, place.0).raw(&[0x50, 0x58]);
            }
            // The frames of image, tables, stacks: none of them can be closed.
            1 => {
                let start = lacuna_abi::addr::Gfn(0x200 + self.below(0x1000));
                let count = 1 + self.below(512);
                if let Some(frames) = FrameRange::new(start, count) {
                    self.asm.operation(OpKind::Seal, frames);
                }
            }
            // Everything that can be closed, at once.
            2 => {
                if let Some(all) = FrameRange::new(ZONE_START.frame(), 8 * BLOCK_FRAMES) {
                    self.asm.operation(OpKind::Seal, all);
                }
            }
            3 => {
                // An interrupt without a table for it.
                let vector = self.below(256).to_le_bytes()[0];
                self.asm.raw(&[0xcd, vector]);
            }
            _ => {
                let page = SHARED.wrapping_add(call_page_offset(0));
                let value = self.number();
                self.asm.store(page.wrapping_add(self.random.below(512) * 8), value);
            }
        }
    }

    /// An access anywhere.
    fn touch(&mut self) {
        let (place, value) = (self.place(), self.number());
        if self.below(2) == 0 {
            self.asm.load(place);
        } else {
            self.asm.store(place, value);
        }
    }
}
