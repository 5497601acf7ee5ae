//! Guests with two CPUs: numbers that CPU 1 has taken and not recorded while CPU 0 makes a call.

use super::*;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;

impl Guest {
    fn two() -> Self {
        Self::with_cpus(true, 2)
    }

    /// CPU 1 takes a number and is in the middle of recording what it is for.
    fn owe(&self) -> u64 {
        set_busy(&self.memory, 1, true);
        self.memory.next_event_number().unwrap()
    }

    fn reasons(&self) -> Vec<String> {
        self.gate.result().inconclusive
    }
}

const FLUSH: Event = Event::Flush(Flush::Everything);

#[test]
fn a_call_waits_for_the_record_of_a_number_that_was_taken_before_it() {
    let mut guest = Guest::two();
    guest.unmap_first_block(true);
    // Without CPU 1's flush the block must not be sealed yet; it is on its way.
    let seq = guest.owe();
    let memory = Arc::clone(&guest.memory);
    let served = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            assert!(!served.load(SeqCst), "the call did not wait");
            publish(&memory, 1, 1, &Record { seq, cpu: 1, site: 0, event: FLUSH });
            set_busy(&memory, 1, false);
        });
        let block = guest.frames(0, 512);
        assert_eq!(guest.ops(&[(OpKind::Seal, block)]), Status::Ok);
        served.store(true, SeqCst);
    });
    guest.call(Call::Checkpoint);
    let result = guest.gate.result();
    assert_eq!((result.findings, result.inconclusive), (Vec::new(), Vec::new()));
    assert_eq!(guest.gate.events_lost(), 0);
}

#[test]
fn a_flush_that_the_other_cpu_never_made_is_missed_when_the_seal_arrives() {
    let mut guest = Guest::two();
    guest.unmap_first_block(true);
    assert_eq!(guest.ops(&[(OpKind::Seal, guest.frames(0, 512))]), Status::Ok);
    let result = guest.gate.result();
    let finding = result.findings.iter().find(|f| f.rule == Rule::StaleDirectMap).unwrap();
    assert_eq!((finding.cpu, guest.violations(Rule::StaleDirectMap)), (Some(1), 1));
}

#[test]
fn a_cpu_that_was_not_started_caches_nothing() {
    let laid_out_for_two = Guest::not_started(true, 2);
    for (mut guest, stale) in [(Guest::two(), 1), (laid_out_for_two, 0)] {
        guest.unmap_first_block(true);
        guest.ops(&[(OpKind::Seal, guest.frames(0, 512))]);
        assert_eq!(guest.violations(Rule::StaleDirectMap), stale);
    }
}

#[test]
fn a_number_that_is_never_recorded_is_waited_for_and_then_lost() {
    let mut guest = Guest::two();
    guest.owe();
    let started = Instant::now();
    guest.record(FLUSH);
    guest.call(Call::Drain);
    assert!(started.elapsed() >= Duration::from_secs(2), "it gave up at once");
    assert_eq!(guest.gate.events_lost(), 1);
    assert!(guest.reasons()[0].contains("missing"));
}

#[test]
fn more_numbers_than_a_cpu_can_hold_are_not_waited_for() {
    let mut guest = Guest::two();
    for _ in 0..3 {
        guest.owe();
    }
    let started = Instant::now();
    guest.call(Call::Drain);
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(guest.gate.events_lost(), 3);
}

#[test]
fn a_number_that_nobody_says_it_holds_is_lost_at_once() {
    let mut guest = Guest::two();
    guest.memory.next_event_number().unwrap();
    let started = Instant::now();
    guest.call(Call::Drain);
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(guest.gate.events_lost(), 1);
}

#[test]
fn a_run_that_is_told_to_stop_waits_for_nobody() {
    let mut guest = Guest::two();
    guest.owe();
    guest.gate.stop.tell(crate::stop::Stopped::Cancelled);
    let started = Instant::now();
    guest.call(Call::Drain);
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(guest.gate.events_lost(), 1);
}

#[test]
fn what_others_record_after_the_call_came_waits_for_the_next_one() {
    let mut guest = Guest::two();
    // A guest that numbers an event before it takes the number stands for one whose number is
    // given out between the call and the look at the rings.
    guest.record(FLUSH);
    let next = guest.memory.last_event_number().unwrap() + 1;
    guest.publish(1, next, FLUSH);
    guest.call(Call::Drain);
    let refused = guest.reasons();
    assert!(refused.iter().any(|why| why.contains("never given out")), "{refused:?}");
    assert_eq!(guest.gate.counters().events, 1);
}

#[test]
fn a_complete_check_lets_a_cpu_that_owes_a_record_go_on_until_it_is_there() {
    let mut guest = Guest::two();
    let seq = guest.owe();
    let memory = Arc::clone(&guest.memory);
    // The checkpoint's own drain must not wait: the record is there, the ring's word is not.
    publish(&memory, 1, 1, &Record { seq, cpu: 1, site: 0, event: FLUSH });
    guest.still.runnable = 0b10;
    guest.still.let_on = Some(Box::new(move || set_busy(&memory, 1, false)));
    guest.call(Call::Checkpoint);
    assert_eq!(guest.still.asked, ["stop", "let on", "resume"]);
    assert_eq!(guest.reasons(), Vec::<String>::new());
}

#[test]
fn a_complete_check_does_not_let_on_who_waits_for_the_gate() {
    let mut guest = Guest::two();
    set_busy(&guest.memory, 1, true);
    guest.call(Call::Checkpoint);
    assert_eq!(guest.still.asked, ["stop", "resume"]);
}

#[test]
fn a_cpu_that_never_finishes_its_record_leaves_a_check_undecided() {
    let mut guest = Guest::two();
    let write = guest.intend_on(1, 1);
    let at = guest.memory.layout().shared.gpa.wrapping_add(SEQUENCE_OFFSET);
    guest.memory.store(at, 1).unwrap();
    set_busy(&guest.memory, 1, true);
    guest.still.runnable = 0b10;
    let started = Instant::now();
    guest.gate.quiesce(0, &mut guest.still, Scope::Running).unwrap();
    assert!(started.elapsed() >= Duration::from_secs(2));
    assert!(guest.reasons().iter().any(|why| why.contains("still owed")), "{:?}", guest.reasons());
    assert_eq!(guest.violations(Rule::TraceHonesty), 0, "{write:?} is under way");
}

#[test]
fn a_cpu_stopped_in_the_middle_of_a_write_has_made_it_or_not() {
    for stored in [false, true] {
        let mut guest = Guest::two();
        let zone = guest.memory.layout().zone;
        let at = locate(&*guest.memory, guest.root, zone.va, Level::Pd).unwrap();
        let old = guest.memory.load(at).unwrap();
        guest.intend_on(1, 0);
        if !stored {
            guest.memory.store(at, old).unwrap();
        }
        guest.gate.quiesce(0, &mut guest.still, Scope::Running).unwrap();
        assert_eq!(guest.violations(Rule::TraceHonesty), 0);
    }
}

#[test]
fn the_other_cpus_are_started_once_and_by_the_first() {
    let mut guest = Guest::two();
    assert_eq!(guest.call(Call::StartCpus).1, Status::BadState);
    guest.gate.serve(Call::StartCpus, 1, &mut guest.still).unwrap();
    assert_eq!(guest.still.asked, Vec::<&str>::new());
    assert_eq!(Guest::new(true).call(Call::StartCpus).1, Status::BadState, "there are none");
}

#[test]
fn only_others_that_run_are_interrupted() {
    let mut guest = Guest::two();
    for (set, status) in [
        (0, Status::BadArguments),
        (0b01, Status::BadArguments),
        (0b11, Status::BadArguments),
        (0b100, Status::BadArguments),
        (u64::MAX, Status::BadArguments),
        (0b10, Status::Ok),
    ] {
        guest.put(ARGS_WORD, set);
        assert_eq!(guest.call(Call::Interrupt).1, status, "{set:#b}");
    }
    assert_eq!(guest.still.interrupted, 0b10);
}

#[test]
fn a_shootdown_that_is_not_answered_ends_the_run_past_the_limit() {
    let mut guest = Guest::two();
    guest.put(ARGS_WORD, 0b10);
    guest.put(ARGS_WORD + 1, 7);
    assert_eq!(guest.call(Call::Unanswered).0, Served::Resume, "the clock starts");
    std::thread::sleep(Duration::from_millis(2));
    let (served, _) = guest.call(Call::Unanswered);
    assert!(matches!(served, Served::Unanswered { missing: 0b10, .. }), "{served:?}");
    guest.put(ARGS_WORD, 0b1);
    assert_eq!(guest.call(Call::Unanswered), (Served::Resume, Status::BadArguments));
}

#[test]
fn control_state_is_judged_for_every_cpu_that_runs() {
    for (cpus, bad) in [(1, 1), (2, 2)] {
        let mut guest = Guest::with_cpus(true, cpus);
        guest.still.registers.cr0 &= !(1 << 16);
        guest.call(Call::Checkpoint);
        assert_eq!(guest.violations(Rule::ControlState), bad);
    }
}

#[test]
fn registers_of_a_reset_are_not_taken_for_the_guests() {
    let mut guest = Guest::two();
    guest.still.registers = Registers { cr0: 0x10, ..Registers::default() };
    guest.still.was_reset = true;
    guest.call(Call::Checkpoint);
    assert_eq!(guest.violations(Rule::ControlState), 0, "nothing is known of them");
    guest.still.was_reset = false;
    guest.call(Call::Checkpoint);
    assert!(guest.violations(Rule::ControlState) > 0, "a guest that did it itself is found");
}
