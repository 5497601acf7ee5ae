//! The gate with guests made by hand: no KVM, the words of a call page and of a ring.

mod direct;
mod probes;
mod several;

use super::*;
use crate::audit::{Mediation, Profile, Rule};
use crate::image::Image;
use crate::machine::boot;
use crate::machine::kvm::KvmError;
use crate::second_stage::{Guard, Mechanism, Off};
use lacuna_abi::addr::{FrameRange, Gfn};
use lacuna_abi::boot::{BootInfo, FEATURE_DIRECT_PAGING};
use lacuna_abi::event::{
    Event, Flush, HostAct, Intent, RECORD_BYTES, RING_BUSY_WORD, RING_HEAD_WORD, RING_RECORDS,
    Record,
};
use lacuna_abi::gate::{COUNT_WORD, OpKind, OpWriter};
use lacuna_abi::layout::{Layout, Needs, SEQUENCE_OFFSET, ring_offset};
use lacuna_abi::paging::Level;
use lacuna_abi::walk::locate;
use proptest::prelude::*;
use std::sync::Mutex;

/// vCPUs that stand still with the registers that every vCPU starts with, and what is asked of them.
struct Still {
    registers: Registers,
    /// Of each call that stops, lets on, resumes, starts or interrupts.
    asked: Vec<&'static str>,
    interrupted: u8,
    /// vCPUs that would go on, and what happens when one is let on.
    runnable: u8,
    let_on: Option<Box<dyn FnMut()>>,
    /// They shut down, and KVM reset them.
    was_reset: bool,
}

impl Vcpus for Still {
    fn stop(&mut self) {
        self.asked.push("stop");
    }

    fn let_on(&mut self, _: u8, done: &mut dyn FnMut() -> bool, deadline: Instant) {
        self.asked.push("let on");
        match &mut self.let_on {
            Some(go_on) => go_on(),
            None => std::thread::sleep(deadline.saturating_duration_since(Instant::now())),
        }
        assert!(done() || Instant::now() >= deadline, "let on for nothing");
    }

    fn resume(&mut self) {
        self.asked.push("resume");
    }

    fn runnable(&self) -> u8 {
        self.runnable
    }

    fn registers(&self, _: u8) -> Result<Registers, KvmError> {
        Ok(self.registers)
    }

    fn was_reset(&self, _: u8) -> bool {
        self.was_reset
    }

    fn start(&mut self) {
        self.asked.push("start");
    }

    fn interrupt(&mut self, cpus: u8) -> Result<(), KvmError> {
        self.interrupted |= cpus;
        Ok(())
    }
}

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Observer for Lines {
    fn operation(&mut self, act: HostAct, frames: FrameRange) {
        self.0.lock().unwrap().push(format!("{act:?} {}", frames.count()));
    }

    fn log(&mut self, line: &str) {
        self.0.lock().unwrap().push(line.to_owned());
    }
}

struct Guest {
    gate: Gate,
    memory: Arc<Memory>,
    root: Gpa,
    still: Still,
    lines: Lines,
    stop: Arc<Stop>,
    ring_heads: [u64; 2],
}

/// Puts a record into a CPU's ring, as the last of `head` records.
fn publish(memory: &Memory, cpu: u8, head: u64, record: &Record) {
    let ring = memory.layout().shared.gpa.wrapping_add(ring_offset(cpu.into()));
    let at = ring.wrapping_add(PAGE_SIZE + (head - 1) % RING_RECORDS * RECORD_BYTES);
    memory.store_words(at, &record.to_words()).unwrap();
    memory.store(ring.wrapping_add(8 * RING_HEAD_WORD as u64), head).unwrap();
}

/// Says for a CPU whether it may hold a number.
fn set_busy(memory: &Memory, cpu: u8, busy: bool) {
    let ring = memory.layout().shared.gpa.wrapping_add(ring_offset(cpu.into()));
    memory.store(ring.wrapping_add(8 * RING_BUSY_WORD as u64), busy.into()).unwrap();
}

const SECRET: &[u8] = b"correct horse battery staple";

impl Guest {
    fn new(closes: bool) -> Self {
        Self::with_cpus(closes, 1)
    }

    /// With two CPUs, CPU 1 runs too.
    fn with_cpus(closes: bool, cpus: usize) -> Self {
        let mut guest = Self::not_started(closes, cpus);
        if cpus > 1 {
            assert_eq!(guest.call(Call::StartCpus).1, Status::Ok);
            guest.still.asked.clear();
        }
        guest
    }

    /// CPU 0 alone runs.
    fn not_started(closes: bool, cpus: usize) -> Self {
        Self::seen_by(Mediation::Trace, closes, cpus)
    }

    /// The same, where the host sees what this mediation says.
    fn seen_by(mediation: Mediation, closes: bool, cpus: usize) -> Self {
        let image = Image::parse(crate::image::ORDINARY).unwrap();
        let needs = Needs { image: image.len(), memory_mib: 16, cpus, input: 100, scratch: 0 };
        let layout = Layout::new(&needs).unwrap();
        let memory = Arc::new(Memory::new(layout).unwrap());
        let direct = if mediation == Mediation::Tables { FEATURE_DIRECT_PAGING } else { 0 };
        let info = BootInfo { features: direct, ..BootInfo::for_layout(&layout) };
        let info = boot::prepare(&memory, &image, info).unwrap();
        let root = Gpa(info.root);
        let stage: Box<dyn SecondStage> = if closes {
            Box::new(Guard::new(Arc::clone(&memory), Mechanism::best()))
        } else {
            Box::new(Off)
        };
        let (lines, stop) = (Lines::default(), Arc::new(Stop::default()));
        let gate = Gate::new(GateSetup {
            memory: Arc::clone(&memory),
            stage,
            mediation,
            steps: crate::config::Steps::ALL,
            boot_root: root,
            profile: Profile::Intel,
            quiesce_every: 1000,
            max_findings: 10,
            probes: 8,
            seed: 1,
            shootdown_limit: Duration::ZERO,
            scanner: Some(LeakScanner::new(SECRET)),
            stop: Arc::clone(&stop),
            observers: vec![Box::new(lines.clone())],
            recorder: None,
        });
        let (cr0, cr4, efer) =
            (crate::machine::kvm::CR0, crate::machine::kvm::CR4, crate::machine::kvm::EFER);
        let registers = Registers { cr0, cr3: root.0, cr4, efer, ..Registers::default() };
        let asked = Vec::new();
        let still =
            Still { registers, asked, interrupted: 0, runnable: 0, let_on: None, was_reset: false };
        Self { gate, memory, root, still, lines, stop, ring_heads: [0; 2] }
    }

    fn call(&mut self, call: Call) -> (Served, Status) {
        let served = self.gate.serve(call, 0, &mut self.still).unwrap();
        let status = self.memory.load(self.page(STATUS_WORD)).unwrap();
        (served, Status::from_number(status as u32).unwrap())
    }

    fn page(&self, word: usize) -> Gpa {
        let offset = call_page_offset(0) + 8 * word as u64;
        self.memory.layout().shared.gpa.wrapping_add(offset)
    }

    fn put(&self, word: usize, value: u64) {
        self.memory.store(self.page(word), value).unwrap();
    }

    fn ops(&mut self, ops: &[(OpKind, FrameRange)]) -> Status {
        let mut words = Vec::new();
        let mut writer = OpWriter::new(|word, value| words.push((word, value)));
        for (kind, frames) in ops {
            writer.push(*kind, *frames).unwrap();
        }
        for (word, value) in words {
            self.put(word, value);
        }
        self.call(Call::Ops).1
    }

    fn frames(&self, first: u64, count: u64) -> FrameRange {
        let start = self.memory.layout().zone_frames().start();
        FrameRange::new(start.wrapping_add(first), count).unwrap()
    }

    fn record(&mut self, event: Event) -> u64 {
        let seq = self.memory.next_event_number().unwrap();
        self.publish(0, seq, event);
        seq
    }

    /// Puts a record with this number into a CPU's ring.
    fn publish(&mut self, cpu: u8, seq: u64, event: Event) {
        let head = &mut self.ring_heads[usize::from(cpu)];
        *head += 1;
        publish(&self.memory, cpu, *head, &Record { seq, cpu, site: 0, event });
    }

    /// Takes the first block out of the direct map, as a well-behaved guest does, or without the
    /// flush.
    fn unmap_first_block(&mut self, flush: bool) {
        let zone = self.memory.layout().zone;
        let at = locate(&*self.memory, self.root, zone.va, Level::Pd).unwrap();
        let old = lacuna_abi::paging::Entry(self.memory.load(at).unwrap());
        let new = lacuna_abi::paging::Entry::EMPTY;
        self.memory.store(at, 0).unwrap();
        self.record(Event::EntryWrite(EntryWrite {
            root: self.root,
            pcid: 0,
            va: zone.va,
            level: Level::Pd,
            count: 1,
            old,
            new,
            grant: 0,
        }));
        if flush {
            self.record(Event::Flush(Flush::Everything));
        }
    }

    fn violations(&self, rule: Rule) -> u64 {
        self.gate.result().tally(rule).violations
    }
}

#[test]
fn observers_know_of_an_operation_when_its_call_returns_and_of_none_that_was_refused() {
    let mut guest = Guest::new(true);
    let page = guest.frames(5, 1);
    assert_eq!(guest.ops(&[(OpKind::Release, page)]), Status::NotSecret);
    assert_eq!(guest.ops(&[(OpKind::Seal, page), (OpKind::Open, page)]), Status::Ok);
    assert_eq!(*guest.lines.0.lock().unwrap(), ["Sealed 1", "Opened 1"]);
}

#[test]
fn a_flip_seals_opens_and_releases() {
    let mut guest = Guest::new(true);
    let block = guest.frames(0, 512);
    guest.unmap_first_block(true);
    assert_eq!(guest.ops(&[(OpKind::Seal, block), (OpKind::Open, block)]), Status::Ok);
    assert!(!guest.gate.stage().denies(block.start()));
    assert_eq!(guest.ops(&[(OpKind::Seal, block)]), Status::Ok);
    assert!(guest.gate.stage().denies(block.start()));
    let page = guest.frames(7, 1);
    assert_eq!(guest.ops(&[(OpKind::Open, page)]), Status::Ok);
    assert!(!guest.gate.stage().denies(page.start()) && guest.gate.stage().denies(block.start()));
    assert_eq!(guest.ops(&[(OpKind::Release, page)]), Status::StillOpen);
    assert_eq!(guest.ops(&[(OpKind::Seal, page), (OpKind::Release, block)]), Status::Ok);
    assert!(!guest.gate.stage().denies(block.start()));
    let (_, status) = guest.call(Call::Checkpoint);
    assert_eq!(status, Status::Ok);
    let result = guest.gate.result();
    assert_eq!(result.findings, [], "{:?}", result.inconclusive);
    assert_eq!(result.inconclusive, Vec::<String>::new());
    assert_eq!(guest.gate.events_lost(), 0);
}

#[test]
fn a_flip_without_its_flush_is_found_when_the_seal_arrives() {
    let mut guest = Guest::new(true);
    guest.unmap_first_block(false);
    assert_eq!(guest.ops(&[(OpKind::Seal, guest.frames(0, 512))]), Status::Ok);
    assert_eq!(guest.violations(Rule::StaleDirectMap), 1);
    assert_eq!(guest.violations(Rule::DirectMapAlias), 0);
}

#[test]
fn a_run_that_was_stopped_blames_nobody_for_what_it_did_last() {
    let mut guest = Guest::new(true);
    guest.unmap_first_block(true);
    guest.stop.tell(crate::stop::Stopped::Cancelled);
    guest.gate.finish(0, &mut guest.still, false).unwrap();
    assert_eq!(guest.gate.result().findings, []);
}

#[test]
fn a_revoke_cannot_be_hidden_behind_a_false_old_value() {
    for (mask, flush) in [(0, None), (!lacuna_abi::paging::Entry::GLOBAL, Some(Flush::NonGlobal))] {
        let mut guest = Guest::new(true);
        let mut write = guest.intend(0);
        guest.memory.store(guest.intent_place(), 0).unwrap();
        write.old.0 &= mask;
        guest.record(Event::EntryWrite(write));
        if let Some(flush) = flush {
            guest.record(Event::Flush(flush));
        }
        guest.ops(&[(OpKind::Seal, guest.frames(0, 512))]);
        assert_eq!(guest.violations(Rule::TraceHonesty), 1);
        assert_eq!(guest.violations(Rule::StaleDirectMap), 1);
    }
}

#[test]
fn a_revoke_cannot_be_hidden_behind_a_standing_intent() {
    let mut guest = Guest::new(true);
    guest.intend(0);
    guest.gate.finish(0, &mut guest.still, false).unwrap();
    assert_eq!(guest.violations(Rule::TraceHonesty), 0, "the write is under way");
    guest.memory.store(guest.intent_place(), 0).unwrap();
    guest.call(Call::Checkpoint);
    assert_eq!(guest.violations(Rule::TraceHonesty), 1);
}

#[test]
fn a_seal_of_a_mapped_block_is_an_alias() {
    let mut guest = Guest::new(true);
    let page = guest.frames(3, 1);
    assert_eq!(guest.ops(&[(OpKind::Seal, page)]), Status::Ok);
    let result = guest.gate.result();
    let finding = result.findings.iter().find(|f| f.rule == Rule::DirectMapAlias).unwrap();
    assert_eq!(finding.frame, Some(page.start()));
}

#[test]
fn refused_operations_leave_no_gap_in_the_numbers() {
    let mut guest = Guest::new(true);
    let page = guest.frames(3, 1);
    assert_eq!(guest.ops(&[(OpKind::Open, page)]), Status::NotSecret);
    assert_eq!(guest.ops(&[(OpKind::Release, page)]), Status::NotSecret);
    let outside = FrameRange::new(Gfn(5), 1).unwrap();
    assert_eq!(guest.ops(&[(OpKind::Seal, outside)]), Status::NotInZone);
    guest.call(Call::Checkpoint);
    assert_eq!(guest.gate.events_lost(), 0);
    assert_eq!(guest.gate.counters().refused, 3);
}

#[test]
fn a_missing_event_is_lost_and_said() {
    let mut guest = Guest::new(true);
    guest.memory.next_event_number().unwrap();
    guest.record(Event::Flush(Flush::Everything));
    guest.call(Call::Drain);
    assert_eq!(guest.gate.events_lost(), 1);
    assert!(guest.gate.result().inconclusive[0].contains("missing"));
}

#[test]
fn a_counter_that_the_guest_moved_is_said() {
    let mut guest = Guest::new(true);
    let at = guest.memory.layout().shared.gpa.wrapping_add(SEQUENCE_OFFSET);
    guest.memory.store(at, u64::MAX - 3).unwrap();
    guest.call(Call::Drain);
    guest.call(Call::Checkpoint);
    guest.memory.store(at, 0).unwrap();
    guest.call(Call::Checkpoint);
    assert!(!guest.gate.result().inconclusive.is_empty());
    assert!(guest.gate.events_lost() > 0);
}

impl Guest {
    /// Publishes an intent to clear the first block's entry, with the number that its record gets,
    /// and clears it.
    fn intend(&mut self, seq: u64) -> EntryWrite {
        self.intend_on(0, seq)
    }

    fn intend_on(&mut self, cpu: usize, seq: u64) -> EntryWrite {
        let zone = self.memory.layout().zone;
        let at = locate(&*self.memory, self.root, zone.va, Level::Pd).unwrap();
        let write = EntryWrite {
            root: self.root,
            pcid: 0,
            va: zone.va,
            level: Level::Pd,
            count: 1,
            old: lacuna_abi::paging::Entry(self.memory.load(at).unwrap()),
            new: lacuna_abi::paging::Entry::EMPTY,
            grant: 0,
        };
        self.memory
            .store_words(self.intent_place_of(cpu), &Intent { write, seq }.to_words())
            .unwrap();
        self.memory.store(at, 0).unwrap();
        write
    }

    fn intent_place(&self) -> Gpa {
        self.intent_place_of(0)
    }

    fn intent_place_of(&self, cpu: usize) -> Gpa {
        let ring = self.memory.layout().shared.gpa.wrapping_add(ring_offset(cpu));
        ring.wrapping_add(8 * lacuna_abi::event::RING_INTENT_WORD as u64)
    }
}

#[test]
fn a_ring_that_is_full_in_the_middle_of_a_write_loses_nothing() {
    let mut guest = Guest::new(true);
    let write = guest.intend(1);
    // The number is taken, the ring is full: the record follows after the call.
    let at = guest.memory.layout().shared.gpa.wrapping_add(SEQUENCE_OFFSET);
    guest.memory.store(at, 1).unwrap();
    guest.call(Call::Drain);
    guest.memory.store(at, 0).unwrap();
    assert_eq!(guest.record(Event::EntryWrite(write)), 1);
    guest.memory.store(guest.intent_place(), 0).unwrap();
    guest.record(Event::Flush(Flush::Everything));
    guest.call(Call::Checkpoint);
    let result = guest.gate.result();
    assert_eq!((result.findings, result.inconclusive), (Vec::new(), Vec::new()));
    assert_eq!(guest.gate.events_lost(), 0);
}

#[test]
fn a_call_in_the_middle_of_a_write_is_no_honest_one() {
    let mut guest = Guest::new(true);
    guest.intend(0);
    guest.call(Call::Checkpoint);
    let result = guest.gate.result();
    assert!(result.inconclusive.iter().any(|why| why.contains("in the middle")), "{result:?}");
}

#[test]
fn a_program_that_ends_with_its_secret_in_memory_leaks() {
    for (done, leaks) in [(false, 0), (true, 1)] {
        let mut guest = Guest::new(true);
        guest.unmap_first_block(true);
        let block = guest.frames(0, 512);
        assert_eq!(guest.ops(&[(OpKind::Seal, block)]), Status::Ok);
        guest.call(Call::InputDone);
        guest.memory.write_zone_for_test(block.start().gpa(), SECRET);
        guest.call(Call::Checkpoint);
        assert_eq!(guest.violations(Rule::InputLeak), 0, "it lies in a secret frame");
        guest.gate.finish(0, &mut guest.still, done).unwrap();
        assert_eq!(guest.violations(Rule::InputLeak), leaks);
    }
}

#[test]
fn leaks_in_different_places_are_different_findings() {
    let mut guest = Guest::new(false);
    assert!(guest.gate.leaks_into("a log", SECRET) && guest.gate.leaks_into("a file", SECRET));
    assert!(guest.gate.leaks_into("a file", SECRET));
    assert_eq!(guest.violations(Rule::InputLeak), 2);
}

#[test]
fn nonsense_is_answered() {
    let mut guest = Guest::new(false);
    guest.put(COUNT_WORD, u64::MAX);
    assert_eq!(guest.call(Call::Ops).1, Status::BadArguments);
    assert_eq!(guest.call(Call::Log).1, Status::BadArguments);
    guest.put(ARGS_WORD, 0x1234_5678);
    assert_eq!(guest.call(Call::RegisterRoot).1, Status::BadRoot);
    assert_eq!(guest.call(Call::UnregisterRoot).1, Status::BadRoot);
    guest.gate.refuse(0).unwrap();
    assert_eq!(guest.memory.load(guest.page(STATUS_WORD)).unwrap() as u32, Status::BadCall as u32);
}

#[test]
fn a_call_that_names_all_memory_again_and_again_is_refused() {
    let mut guest = Guest::new(false);
    let zone = guest.memory.layout().zone_frames();
    assert_eq!(guest.ops(&[(OpKind::Open, zone); 5]), Status::BadArguments);
    assert_eq!(guest.ops(&[(OpKind::Open, zone); 4]), Status::NotSecret);
}

#[test]
fn descriptor_tables_are_registered_once() {
    let mut guest = Guest::new(false);
    assert_eq!(guest.call(Call::Ready).1, Status::Ok);
    assert_eq!(guest.call(Call::Ready).1, Status::BadState);
    guest.call(Call::Checkpoint);
    assert_eq!(guest.violations(Rule::ControlState), 0);
    guest.still.registers.idt_base = 0x5000;
    guest.put(ARGS_WORD, 0x5000);
    guest.call(Call::Ready);
    guest.call(Call::Checkpoint);
    assert_eq!(guest.violations(Rule::ControlState), 1);
}

#[test]
fn a_log_line_cannot_steer_a_terminal() {
    let mut guest = Guest::new(false);
    let text = b"\x1b[2Jhi\n";
    let mut words = [0_u8; 8];
    words[..text.len()].copy_from_slice(text);
    guest.put(ARGS_WORD, u64::from_le_bytes(words));
    guest.put(COUNT_WORD, text.len() as u64);
    assert_eq!(guest.call(Call::Log).1, Status::Ok);
    assert_eq!(*guest.lines.0.lock().unwrap(), ["\u{fffd}[2Jhi\n"]);
}

#[test]
fn a_log_line_that_holds_the_secret_is_withheld() {
    let mut guest = Guest::new(false);
    for (index, chunk) in SECRET.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        guest.put(ARGS_WORD + index, u64::from_le_bytes(word));
    }
    guest.put(COUNT_WORD, SECRET.len() as u64);
    assert_eq!(guest.call(Call::Log).1, Status::Ok);
    assert!(guest.lines.0.lock().unwrap()[0].contains("withheld"));
    assert_eq!(guest.violations(Rule::InputLeak), 1);
}

#[test]
fn the_input_is_wiped_once_and_its_bytes_are_found_outside_secret_frames() {
    let mut guest = Guest::new(true);
    let (input, scratch) = (guest.memory.layout().input, guest.memory.layout().metadata);
    guest.memory.write(input.gpa, SECRET).unwrap();
    guest.call(Call::Checkpoint);
    assert_eq!(guest.violations(Rule::InputLeak), 0, "not yet taken over");
    assert_eq!(guest.call(Call::InputDone).1, Status::Ok);
    assert_eq!(guest.call(Call::InputDone).1, Status::BadState);
    guest.call(Call::Checkpoint);
    assert_eq!(guest.violations(Rule::InputLeak), 0);
    assert!(guest.gate.result().tally(Rule::InputLeak).checked > 0);
    guest.memory.write(scratch.gpa.wrapping_add(0x1ff8), &SECRET[2..20]).unwrap();
    guest.call(Call::Checkpoint);
    let result = guest.gate.result();
    let finding = result.findings.iter().find(|f| f.rule == Rule::InputLeak).unwrap();
    assert_eq!(finding.frame, Some(scratch.gpa.wrapping_add(0x2000).frame()));
    assert!(finding.detail.contains("metadata"), "{}", finding.detail);
    assert!(guest.gate.leaks_into("a log", &[b"x: ", SECRET].concat()));
    assert!(!guest.gate.leaks_into("a log", b"nothing to see"));
}

#[test]
fn a_program_without_a_secret_has_no_input_to_hand_over() {
    let mut guest = Guest::new(false);
    guest.gate.scanner = None;
    assert_eq!(guest.call(Call::InputDone).1, Status::BadState);
}

#[test]
fn the_final_calls_carry_what_the_guest_wrote() {
    let mut guest = Guest::new(false);
    guest.put(ARGS_WORD, 3);
    guest.put(ARGS_WORD + 1, 17);
    let (served, _) = guest.call(Call::Exit);
    assert!(matches!(served, Served::Exit(3, counters) if counters.alloc == 17));
    let (served, _) = guest.call(Call::Panic);
    assert_eq!(served, Served::Panic(String::new()));
    assert!(matches!(guest.call(Call::Exception).0, Served::Exception(_)));
}

/// Something that a hostile guest does to shared memory, or asks for.
#[derive(Clone, Debug)]
enum Mischief {
    /// Words of the call page, from the count on.
    CallPage(Vec<u64>),
    /// A well-formed operation on frames of its own choice.
    Operation(u8, u64, u64),
    /// The ring's head.
    Head(u64),
    /// A word anywhere in the ring.
    Ring(u16, u64),
    /// A record with a good check word.
    Record(Record),
    /// A word in the table pool.
    Table(u16, u64),
    /// The event counter.
    Counter(u64),
    /// A call.
    Call(u8),
}

fn mischief() -> impl Strategy<Value = Mischief> {
    let small = prop_oneof![0..8u64, any::<u64>()];
    prop_oneof![
        prop::collection::vec(small.clone(), 1..12).prop_map(Mischief::CallPage),
        (0..4u8, 0..5000u64, 1..1200u64).prop_map(|(k, s, c)| Mischief::Operation(k, s, c)),
        small.clone().prop_map(Mischief::Head),
        (any::<u16>(), small.clone()).prop_map(|(at, value)| Mischief::Ring(at, value)),
        (1..50u64, 0..3u8, 0..5000u64, 1..600u64).prop_map(|(seq, cpu, start, count)| {
            let frames = FrameRange::new(Gfn((4 << 18) + start), count).unwrap();
            let event = Event::Life(lacuna_abi::event::Life::PooledZero, frames);
            Mischief::Record(Record { seq, cpu, site: 0, event })
        }),
        (any::<u16>(), prop_oneof![small.clone(), (0..2048u64).prop_map(|f| f << 12 | 0x63)])
            .prop_map(|(at, value)| Mischief::Table(at, value)),
        small.prop_map(Mischief::Counter),
        (0..18u8).prop_map(Mischief::Call),
    ]
}

impl Guest {
    fn mischief(&mut self, what: &Mischief) {
        let ring = self.memory.layout().shared.gpa.wrapping_add(ring_offset(0));
        match what {
            Mischief::CallPage(words) => {
                for (index, word) in words.iter().enumerate() {
                    self.put(COUNT_WORD + index, *word);
                }
            }
            Mischief::Operation(kind, start, count) => {
                let kind = [OpKind::Seal, OpKind::Open, OpKind::Release][usize::from(kind % 3)];
                let _ = self.ops(&[(kind, self.frames(*start, *count))]);
            }
            Mischief::Head(head) => {
                self.memory.store(ring.wrapping_add(8 * RING_HEAD_WORD as u64), *head).unwrap();
            }
            Mischief::Ring(at, value) => {
                let words = lacuna_abi::event::RING_BYTES / 8;
                let at = ring.wrapping_add(8 * (u64::from(*at) % words));
                self.memory.store(at, *value).unwrap();
            }
            Mischief::Record(record) => {
                self.record(record.event);
                let at = PAGE_SIZE + (self.ring_heads[0] - 1) * RECORD_BYTES;
                self.memory.store_words(ring.wrapping_add(at), &record.to_words()).unwrap();
            }
            Mischief::Table(at, value) => {
                let pool = self.memory.layout().pool;
                let at = pool.gpa.wrapping_add(8 * u64::from(*at) % pool.len);
                self.memory.store(at, *value).unwrap();
            }
            Mischief::Counter(value) => {
                let at = self.memory.layout().shared.gpa.wrapping_add(SEQUENCE_OFFSET);
                self.memory.store(at, *value).unwrap();
            }
            Mischief::Call(number) => match Call::from_number((*number).into()) {
                Some(call) => {
                    let _ = self.gate.serve(call, 0, &mut self.still).unwrap();
                }
                None => self.gate.refuse(0).unwrap(),
            },
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn nothing_that_a_guest_writes_or_asks_breaks_the_gate(
        closes: bool, acts in prop::collection::vec(mischief(), 1..40),
    ) {
        let mut guest = Guest::new(closes);
        for act in &acts {
            guest.mischief(act);
        }
        guest.call(Call::Checkpoint);
        let result = guest.gate.result();
        prop_assert!(result.findings.len() <= 10);
        // A jump of the ring's head never goes unnoticed, if it was still there at the next call.
        let jumped = |act: &Mischief| matches!(act, Mischief::Head(head) if *head > 5000);
        if acts.last().is_some_and(jumped) {
            prop_assert!(!result.inconclusive.is_empty());
        }
    }
}
