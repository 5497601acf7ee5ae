//! Instructions stepped by a vCPU that does what a test says.

mod odd;
mod windows;

use super::*;
use crate::image::{Image, ORDINARY};
use crate::machine::boot;
use crate::machine::kvm::{CR0, CR4, EFER};
use lacuna_abi::addr::Gpa;
use lacuna_abi::boot::BootInfo;
use lacuna_abi::event::{ControlRegister, EntryStores, Flush, Sighting};
use lacuna_abi::event::{Event, Record};
use lacuna_abi::gate::SHOOTDOWN_VECTOR;
use lacuna_abi::layout::{CPU_DATA, INTERRUPT_STACK, Layout, MAIN_STACK, Needs, POOL};
use lacuna_abi::paging::{Entry, Level};
use lacuna_abi::walk::translate;

/// Where the code lies: behind what a guest keeps in its per-CPU data.
const CODE: u64 = CPU_DATA.start(0).0 + 0x800;
const IDT: u64 = CPU_DATA.start(0).0 + 0xc00;
const TSS: u64 = CPU_DATA.start(0).0 + 0xe00;
const HANDLER: u64 = CPU_DATA.start(0).0 + 0xf00;
const CODE_SELECTOR: u16 = 8;
const STACK_SELECTOR: u16 = 16;
const RAX: usize = 0;
const RBX: usize = 3;

/// What the vCPU does at a step.
type Act<'a> = &'a dyn Fn(&mut Registers, &Memory) -> Exit;

/// A vCPU with a script; behind its end it does nothing.
struct Scripted<'a> {
    memory: Arc<Memory>,
    registers: Registers,
    acts: Vec<Act<'a>>,
}

impl Steppable for Scripted<'_> {
    fn step(&mut self) -> Exit {
        if self.acts.is_empty() {
            return Exit::Shutdown;
        }
        let act = self.acts.remove(0);
        act(&mut self.registers, &self.memory)
    }

    fn complete(&mut self) {
        self.registers.rip += 1;
    }

    fn stepped(&self) -> Registers {
        self.registers
    }

    fn put(&mut self, registers: &Registers) -> Result<(), KvmError> {
        self.registers = *registers;
        Ok(())
    }
}

struct Bench {
    memory: Arc<Memory>,
    registers: Registers,
    inbox: Inbox,
    sightings: Arc<Sightings>,
    stop: Arc<Stop>,
}

impl Bench {
    fn new(code: &[u8]) -> Self {
        let image = Image::parse(ORDINARY).unwrap();
        let needs = Needs { image: image.len(), memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
        let layout = Layout::new(&needs).unwrap();
        let memory = Arc::new(Memory::new(layout).unwrap());
        let info = boot::prepare(&memory, &image, BootInfo::for_layout(&layout)).unwrap();
        let mut registers = Registers {
            rip: CODE,
            rflags: 2,
            cr0: CR0,
            cr3: info.root,
            cr4: CR4,
            efer: EFER,
            cs: CODE_SELECTOR,
            ss: STACK_SELECTOR,
            idt_base: IDT,
            idt_limit: 0xfff,
            tss_base: TSS,
            ..Registers::default()
        };
        registers.general[Registers::RSP] = MAIN_STACK.top(0).0 - 0x100;
        let sightings = Arc::new(Sightings::new(Arc::clone(&memory)));
        let stop = Arc::new(Stop::default());
        let bench = Self { memory, registers, inbox: Inbox::new(2), sightings, stop };
        bench.write(CODE, code);
        bench
    }

    fn place(&self, va: u64) -> Gpa {
        let leaf = translate(&*self.memory, self.registers.root(), Gva(va)).unwrap();
        leaf.gpa_of(Gva(va))
    }

    fn write(&self, va: u64, bytes: &[u8]) {
        self.memory.write(self.place(va), bytes).unwrap();
    }

    /// An address in a page of the table pool that no table lies in.
    fn free(&self) -> u64 {
        POOL.0 + self.memory.layout().pool.len - 0x1000
    }

    /// The gate at [`IDT`] leads to the handler, on a stack of its own.
    fn gate(&self, ist: u64) {
        let low = HANDLER & 0xffff
            | u64::from(CODE_SELECTOR) << 16
            | ist << 32
            | 0x8e00 << 32
            | (HANDLER & 0xffff_0000) << 32;
        self.write(IDT, &low.to_le_bytes());
        self.write(IDT + 8, &(HANDLER >> 32).to_le_bytes());
        self.write(TSS + 28 + 8 * ist, &INTERRUPT_STACK.top(0).0.to_le_bytes());
    }

    fn run(&self, acts: &[Act<'_>]) -> Run {
        let (memory, sightings) = (Arc::clone(&self.memory), Arc::clone(&self.sightings));
        let mut stepper =
            Stepper::new(0, self.registers, memory, sightings, Arc::clone(&self.stop));
        let memory = Arc::clone(&self.memory);
        let mut vcpu = Scripted { memory, registers: self.registers, acts: acts.to_vec() };
        let exit = stepper.run(&mut vcpu, &self.inbox);
        let seen = self.sightings.take().into_iter().map(|record| match record {
            Record { cpu: 0, event: Event::Seen(sighting), .. } => sighting,
            other => panic!("{other:?}"),
        });
        Run { exit, seen: seen.collect(), registers: stepper.registers, stepper }
    }
}

struct Run {
    exit: Exit,
    seen: Vec<Sighting>,
    registers: Registers,
    stepper: Stepper,
}

impl Run {
    #[track_caller]
    fn assert_lost(&self, why: &str) {
        let lost = self.stepper.lost().unwrap_or_else(|| panic!("not lost, but {:?}", self.exit));
        assert_eq!((self.exit, lost.rip), (Exit::Lost, CODE));
        assert!(lost.why.contains(why), "{lost:?}");
    }

    #[track_caller]
    fn assert_followed(&self) {
        assert_eq!((self.exit, self.stepper.lost()), (Exit::Shutdown, None));
    }
}

/// Goes on at an address.
fn to(rip: u64) -> impl Fn(&mut Registers, &Memory) -> Exit {
    move |registers, _| {
        registers.rip = rip;
        Exit::Stepped
    }
}

fn stores(at: Gpa, old: u64, new: u64) -> Sighting {
    let (level, old, new) = (Level::Pt, Entry(old), Entry(new));
    Sighting::Stores(EntryStores { at, level, count: 1, old, new, grant: 0 })
}

/// mov [rax], rbx
const STORE: [u8; 3] = [0x48, 0x89, 0x18];

#[test]
fn a_store_to_the_table_pool_is_seen_and_one_elsewhere_is_not() {
    for seen in [true, false] {
        let mut bench = Bench::new(&STORE);
        let va = if seen { bench.free() + 8 * 9 } else { MAIN_STACK.top(0).0 - 64 };
        bench.registers.general[RAX] = va;
        bench.registers.general[RBX] = 0x7000;
        let at = bench.place(va);
        let run = bench.run(&[&|registers, memory| {
            memory.store(at, 0x7000).unwrap();
            to(CODE + 3)(registers, memory)
        }]);
        run.assert_followed();
        let expected = if seen { vec![stores(at, 0, 0x7000)] } else { vec![] };
        assert_eq!(run.seen, expected);
        assert_eq!(run.stepper.steps(), 1);
    }
}

#[test]
fn a_store_to_a_stack_that_lies_in_the_pool_is_seen() {
    // push rax
    let mut bench = Bench::new(&[0x50]);
    let va = bench.free() + 0x10;
    bench.registers.general[Registers::RSP] = va;
    let at = bench.place(va - 8);
    let run = bench.run(&[&|registers, memory| {
        memory.store(at, 5).unwrap();
        registers.general[Registers::RSP] -= 8;
        to(CODE + 1)(registers, memory)
    }]);
    run.assert_followed();
    assert!(matches!(run.seen[..], [Sighting::Stores(stores)] if stores.at == at));
}

#[test]
fn of_a_string_that_was_broken_off_only_what_was_stored_counts() {
    // rep stosq
    let mut bench = Bench::new(&[0xf3, 0x48, 0xab]);
    let va = bench.free();
    bench.registers.general[Registers::RDI] = va;
    bench.registers.general[Registers::RCX] = 100;
    let at = bench.place(va);
    let part = |from: u64, count: u64, rip: u64| {
        move |registers: &mut Registers, memory: &Memory| {
            for index in from..from + count {
                memory.store(at.wrapping_add(8 * index), index + 1).unwrap();
            }
            registers.general[Registers::RCX] -= count;
            registers.general[Registers::RDI] += 8 * count;
            to(rip)(registers, memory)
        }
    };
    let run = bench.run(&[&part(0, 60, CODE), &part(60, 40, CODE + 3)]);
    run.assert_followed();
    let expected: Vec<_> =
        (0..100).map(|index| stores(at.wrapping_add(8 * index), 0, index + 1)).collect();
    assert_eq!(run.seen, expected);
}

#[test]
fn invalidations_and_root_loads_are_seen() {
    let mut bench = Bench::new(&[0x0f, 0x01, 0x38]); // invlpg [rax]
    bench.registers.general[RAX] = 0x1234_5000;
    let run = bench.run(&[&to(CODE + 3)]);
    run.assert_followed();
    let page = Flush::Pages { va: Gva(0x1234_5000), count: 1, level: Level::Pt };
    assert_eq!(run.seen, [Sighting::Flush(page)]);

    let mut bench = Bench::new(&[0x0f, 0x22, 0xd8]); // mov cr3, rax
    bench.registers.general[RAX] = bench.registers.cr3;
    let run = bench.run(&[&to(CODE + 3)]);
    assert_eq!(run.seen, [Sighting::Flush(Flush::NonGlobal)]);
    bench.registers.general[RAX] = 0x9000;
    let run = bench.run(&[&|registers, memory| {
        registers.cr3 = 0x9000;
        to(CODE + 3)(registers, memory)
    }]);
    run.assert_followed();
    let (root, pcid, no_flush) = (Gpa(0x9000), 0, false);
    assert_eq!(run.seen, [Sighting::RootLoad { root, pcid, no_flush }]);

    // invpcid rbx, [rax]
    let mut bench = Bench::new(&[0x66, 0x0f, 0x38, 0x82, 0x18]);
    bench.registers.general[RAX] = MAIN_STACK.top(0).0 - 64;
    bench.write(MAIN_STACK.top(0).0 - 64, &7_u64.to_le_bytes());
    bench.write(MAIN_STACK.top(0).0 - 56, &0x5000_u64.to_le_bytes());
    let kinds = [
        Flush::PageOfPcid { va: Gva(0x5000), pcid: 7 },
        Flush::Pcid(7),
        Flush::Everything,
        Flush::AllPcids,
    ];
    for (kind, flush) in (0..).zip(kinds) {
        bench.registers.general[RBX] = kind;
        let run = bench.run(&[&to(CODE + 5)]);
        run.assert_followed();
        assert_eq!(run.seen, [Sighting::Flush(flush)]);
    }
}

#[test]
fn control_registers_change_by_instructions_for_that_alone() {
    let clear = |registers: &mut Registers, memory: &Memory| {
        registers.cr4 &= !(1 << 7);
        to(CODE + 3)(registers, memory)
    };
    // mov cr4, rax
    let run = Bench::new(&[0x0f, 0x22, 0xe0]).run(&[&clear]);
    run.assert_followed();
    let register = ControlRegister::Cr4;
    assert_eq!(run.seen, [Sighting::Control { register, old: CR4, new: CR4 & !(1 << 7) }]);
    // mov rax, rbx
    Bench::new(&[0x48, 0x89, 0xd8]).run(&[&clear]).assert_lost("cr4 changed");
    let root = |registers: &mut Registers, memory: &Memory| {
        registers.cr3 = 0x9000;
        to(CODE + 3)(registers, memory)
    };
    Bench::new(&[0x48, 0x89, 0xd8]).run(&[&root]).assert_lost("CR3 changed");
}

#[test]
fn a_stop_is_where_the_instruction_leads() {
    let stack = MAIN_STACK.top(0).0 - 0x100;
    for (code, legal) in [
        (&[0x90][..], vec![1]),               // nop
        (&[0xeb, 0x10], vec![0x12]),          // jmp
        (&[0x74, 0x10], vec![2, 0x12]),       // je
        (&[0xe8, 0x10, 0, 0, 0], vec![0x15]), // call
        (&[0xff, 0xe0], vec![0x40]),          // jmp rax
        (&[0xff, 0x13], vec![0x60]),          // call [rbx]
        (&[0xc3], vec![0x60]),                // ret
        (&[0xe2, 0xfe], vec![0, 2]),          // loop
    ] {
        let mut bench = Bench::new(code);
        bench.registers.general[RAX] = CODE + 0x40;
        bench.registers.general[RBX] = stack;
        bench.write(stack, &(CODE + 0x60).to_le_bytes());
        for offset in [0, 1, 2, 5, 0x12, 0x15, 0x40, 0x60, 0x70] {
            let run = bench.run(&[&|registers, memory| {
                registers.general[15] += 1;
                to(CODE + offset)(registers, memory)
            }]);
            if legal.contains(&offset) {
                assert_eq!(run.stepper.lost(), None, "{code:x?} to {offset:#x}");
            } else {
                run.assert_lost("where it cannot lead");
            }
        }
    }
}

#[test]
fn a_stop_without_progress_is_none_and_not_for_ever() {
    let again = |_: &mut Registers, _: &Memory| Exit::Stepped;
    let run = Bench::new(&[0x90]).run(&[&again, &again, &to(CODE + 1)]);
    run.assert_followed();
    let acts: Vec<Act<'_>> = (0..1100).map(|_| &again as Act<'_>).collect();
    Bench::new(&[0x90]).run(&acts).assert_lost("never goes on");
}

#[test]
fn what_runs_together_with_a_mov_ss_is_followed_too() {
    // mov ss, eax; mov [rax], rbx; nop
    let mut bench = Bench::new(&[0x8e, 0xd0, 0x48, 0x89, 0x18, 0x90]);
    let va = bench.free();
    bench.registers.general[RAX] = va;
    let at = bench.place(va);
    let run = bench.run(&[&|registers, memory| {
        memory.store(at, 3).unwrap();
        to(CODE + 5)(registers, memory)
    }]);
    run.assert_followed();
    assert!(matches!(run.seen[..], [Sighting::Stores(stores)] if stores.new == Entry(3)));
    // Three at once are one too many.
    bench.run(&[&to(CODE + 6)]).assert_lost("where it cannot lead");
}

#[test]
fn an_interrupt_waits_for_interrupts_to_be_on_and_comes_back() {
    // nop; sti; nop; nop, and the handler: iretq
    let mut bench = Bench::new(&[0x90, 0xfb, 0x90, 0x90]);
    bench.registers.idt_base = IDT - 16 * u64::from(SHOOTDOWN_VECTOR);
    bench.gate(5);
    bench.write(HANDLER, &[0x48, 0xcf]);
    bench.inbox.send(0);
    bench.inbox.send(1);
    let on = |registers: &mut Registers, memory: &Memory| {
        registers.rflags |= RFLAGS_IF;
        to(CODE + 2)(registers, memory)
    };
    let seen = |at: u64, next: u64| {
        move |registers: &mut Registers, memory: &Memory| {
            assert_eq!(registers.rip, at);
            to(next)(registers, memory)
        }
    };
    // Behind STI one more instruction runs first.
    let run = bench.run(&[
        &seen(CODE, CODE + 1),
        &on,
        &seen(CODE + 2, CODE + 3),
        &seen(CODE + 3, CODE + 4),
    ]);
    run.assert_followed();
    assert_eq!(run.stepper.steps(), 5, "the return counts");
    assert_eq!(run.registers.rflags & RFLAGS_IF, RFLAGS_IF);
    assert_eq!(run.registers.general, bench.registers.general);
    let frame = INTERRUPT_STACK.top(0).0 - 40;
    assert_eq!(bench.memory.load(bench.place(frame)).unwrap(), CODE + 3);
    assert!(!bench.inbox.is_pending(0) && bench.inbox.is_pending(1));
}

#[test]
fn the_start_of_a_handler_is_where_an_exception_leads_and_its_end_is_not() {
    // mov rax, [rax]; nop
    let bench = Bench::new(&[0x48, 0x8b, 0x00, 0x90]);
    bench.gate(1);
    bench.write(HANDLER, &[0x6a, 0x0e]); // push 14
    let delivered = |rip: u64, pushed: u64, saved: u64| {
        let bench = &bench;
        move |registers: &mut Registers, memory: &Memory| {
            let rsp = INTERRUPT_STACK.top(0).0 - 48;
            let (flags, old) = (registers.rflags | RFLAGS_TF, registers.general[Registers::RSP]);
            let words = [0, saved, CODE_SELECTOR.into(), flags, old, STACK_SELECTOR.into()];
            for (index, word) in (0..).zip(words) {
                memory.store(bench.place(rsp + 8 * index), word).unwrap();
            }
            registers.general[Registers::RSP] = rsp - pushed;
            to(rip)(registers, memory)
        }
    };
    for (rip, pushed) in [(HANDLER, 0), (HANDLER + 2, 8)] {
        let run = bench.run(&[&delivered(rip, pushed, CODE)]);
        run.assert_followed();
        let flags = bench.place(INTERRUPT_STACK.top(0).0 - 24);
        assert_eq!(bench.memory.load(flags).unwrap() & RFLAGS_TF, 0, "the step's own flag");
    }
    bench.run(&[&delivered(HANDLER, 0, CODE + 0x40)]).assert_lost("where it cannot lead");
    bench.run(&[&delivered(HANDLER + 9, 0, CODE)]).assert_lost("where it cannot lead");
    // A whole handler ran unseen, and went on behind the instruction that comes next.
    bench.run(&[&to(CODE + 4)]).assert_lost("where it cannot lead");
}

#[test]
fn the_steps_own_trap_flag_is_not_pushed() {
    let bench = Bench::new(&[0x9c]); // pushf
    let at = bench.place(MAIN_STACK.top(0).0 - 0x108);
    let run = bench.run(&[&|registers, memory| {
        memory.store(at, 0x302).unwrap();
        registers.general[Registers::RSP] -= 8;
        to(CODE + 1)(registers, memory)
    }]);
    run.assert_followed();
    assert_eq!(bench.memory.load(at).unwrap(), 0x202);
}

#[test]
fn a_halt_gives_others_their_turn_if_an_interrupt_can_end_it() {
    let mut bench = Bench::new(&[0xf4]);
    let run = bench.run(&[]);
    assert_eq!((run.exit, run.registers.rip), (Exit::Halt, CODE));
    bench.registers.rflags |= RFLAGS_IF;
    let run = bench.run(&[]);
    assert_eq!((run.exit, run.registers.rip), (Exit::Interrupted, CODE + 1));
}

#[test]
fn a_cpu_that_owes_a_record_goes_on_beyond_its_turn() {
    let bench = Bench::new(&[0xeb, 0xfe]); // jmp to itself
    let again = to(CODE);
    let acts: Vec<Act<'_>> = (0..QUANTUM + GRACE + 10).map(|_| &again as Act<'_>).collect();
    let run = bench.run(&acts);
    assert_eq!((run.exit, run.stepper.steps()), (Exit::Interrupted, QUANTUM));
    let ring = bench.memory.layout().shared.gpa.wrapping_add(ring_offset(0));
    bench.memory.store(ring.wrapping_add(8 * RING_BUSY_WORD as u64), 1).unwrap();
    let run = bench.run(&acts);
    assert_eq!((run.exit, run.stepper.steps()), (Exit::Interrupted, QUANTUM + GRACE));
}

#[test]
fn an_interrupt_by_the_cpus_own_controller_is_not_followed() {
    let mut bench = Bench::new(&[0x0f, 0x30]); // wrmsr
    bench.registers.general[Registers::RCX] = X2APIC_COMMAND;
    bench.run(&[&to(CODE + 2)]).assert_lost("[guest] shootdown");
    bench.registers.general[Registers::RCX] = 0x80b;
    bench.run(&[&to(CODE + 2)]).assert_followed();
}

#[test]
fn an_out_comes_out_completed() {
    let bench = Bench::new(&[0xee]); // out dx, al
    let out = Exit::PortOut { port: 1, value: 2, len: 1 };
    let run = bench.run(&[&|_, _| out]);
    assert_eq!((run.exit, run.registers.rip, run.stepper.lost()), (out, CODE + 1, None));
}

#[test]
fn any_bytes_are_stepped_or_lost() {
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bench = Bench::new(&[]);
    for _ in 0..20_000 {
        let mut code = [0; 16];
        for byte in &mut code {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            *byte = noise.to_le_bytes()[3];
        }
        bench.write(CODE, &code);
        for (index, register) in bench.registers.general.iter_mut().enumerate() {
            *register = if noise >> index & 1 == 0 { noise } else { POOL.0 + (noise & 0xffff) };
        }
        let run = bench.run(&[&to(CODE + 1)]);
        assert!(matches!(run.exit, Exit::Shutdown | Exit::Lost | Exit::Halt), "{:?}", run.exit);
    }
}
