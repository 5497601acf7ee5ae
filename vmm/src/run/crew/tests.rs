//! Threads that pretend to be vCPUs: in the guest they count, until they are kicked.

use super::*;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// More than the cores of any machine that this is likely to run on, and as many as there can be.
const MEMBERS: u8 = 8;
const ROUNDS: u64 = 40;

struct Machine {
    crew: Crew<u64>,
    /// Guest instructions, so to speak, of each vCPU.
    counts: Vec<AtomicU64>,
    /// Signals on their way.
    kicks: Vec<AtomicBool>,
    over: AtomicBool,
}

impl Machine {
    fn new(members: u8) -> Self {
        let per_member = |_| AtomicU64::new(0);
        Self {
            crew: Crew::new(members.into()),
            counts: (0..members).map(per_member).collect(),
            kicks: (0..members).map(|_| AtomicBool::new(false)).collect(),
            over: AtomicBool::new(false),
        }
    }

    fn kick(&self, member: u8) {
        self.kicks[usize::from(member)].store(true, SeqCst);
    }

    fn count(&self, member: u8) -> u64 {
        self.counts[usize::from(member)].load(SeqCst)
    }

    fn take(&self, member: u8) -> Option<Turn<'_, u64>> {
        self.crew.take(member, || self.count(member))
    }

    fn stop(&self, turn: &Turn<'_, u64>) {
        turn.stop(&|member| self.kick(member));
    }

    /// The guest: runs until it is kicked, or for `length` steps.
    fn guest(&self, member: u8, length: u64) {
        // As with a signal that arrives just before KVM_RUN: what came before is lost.
        let kicked = &self.kicks[usize::from(member)];
        kicked.store(false, SeqCst);
        for _ in 0..length {
            self.counts[usize::from(member)].fetch_add(1, SeqCst);
            std::thread::yield_now();
            // Once the run has ended, whoever waits for it kicks all, again and again.
            if kicked.load(SeqCst) || self.crew.has_ended() {
                break;
            }
        }
    }

    /// One vCPU: in and out of the guest until the run ends; now and then it does something with
    /// the gate.
    fn run(&self, member: u8, length: u64, mut at_gate: impl FnMut(&Turn<'_, u64>) -> bool) {
        let _presence = self.crew.join(member);
        while self.crew.enter(member, || self.count(member)) {
            self.guest(member, length);
            self.crew.leave(member, true);
            let Some(turn) = self.take(member) else { break };
            if at_gate(&turn) {
                turn.end();
                break;
            }
        }
    }

    /// That nothing moves, and that what the others reported is where they stand.
    fn assert_still(&self, turn: &Turn<'_, u64>, except: u8) {
        let others = || (0..MEMBERS).filter(move |member| *member != except);
        let before: Vec<_> = others().map(|member| self.count(member)).collect();
        std::thread::sleep(Duration::from_micros(300));
        for (member, count) in others().zip(before) {
            assert_eq!(self.count(member), count, "member {member} moved");
            if let Some(reported) = turn.report(member) {
                assert_eq!(reported, count, "member {member} reported another place");
            }
        }
    }
}

/// Lets all members run, each in the guest for `length` steps at a time; `at_gate` gets the member
/// and how often it was there.
fn machine_of_all(
    length: impl Fn(u8) -> u64,
    at_gate: impl Fn(&Machine, u8, u64, &Turn<'_, u64>) -> bool + Sync,
) -> Machine {
    let machine = Machine::new(MEMBERS);
    machine.take(0).unwrap().start();
    std::thread::scope(|scope| {
        for member in 0..MEMBERS {
            let (machine, at_gate, length) = (&machine, &at_gate, length(member));
            scope.spawn(move || {
                let mut visits = 0;
                machine.run(member, length, |turn| {
                    visits += 1;
                    at_gate(machine, member, visits, turn)
                });
            });
        }
    });
    machine
}

#[test]
fn while_one_has_all_stopped_nothing_moves_and_then_all_go_on() {
    let machine = machine_of_all(
        |_| 50,
        |machine, member, visits, turn| {
            if member != 0 {
                return false;
            }
            machine.stop(turn);
            machine.assert_still(turn, 0);
            turn.resume();
            visits == ROUNDS
        },
    );
    assert!((1..MEMBERS).all(|member| machine.count(member) > 0));
}

#[test]
fn several_that_want_all_others_stopped_take_turns() {
    let stops = AtomicU64::new(0);
    machine_of_all(
        |_| 3,
        |machine, member, visits, turn| {
            machine.stop(turn);
            machine.assert_still(turn, member);
            stops.fetch_add(1, SeqCst);
            visits == ROUNDS / 2
        },
    );
    assert!(stops.load(SeqCst) >= ROUNDS / 2);
}

#[test]
fn a_kick_that_is_lost_is_sent_again() {
    // All but one never leave the guest by themselves, and lose a kick that arrives too early.
    let machine = machine_of_all(
        |member| if member == 0 { 3 } else { u64::MAX },
        |machine, member, visits, turn| {
            machine.stop(turn);
            machine.assert_still(turn, member);
            // Who ends the run does so while all stand still: nobody would kick them afterwards.
            member == 0 && visits == 5
        },
    );
    assert!(machine.crew.has_ended());
}

#[test]
fn only_those_that_are_let_on_move() {
    let machine = machine_of_all(
        |_| 10,
        |machine, member, visits, turn| {
            if member != 0 {
                return false;
            }
            machine.stop(turn);
            let free = turn.runnable();
            let chosen = (1..MEMBERS).find(|other| free & only(*other) != 0);
            let before: Vec<_> = (0..MEMBERS).map(|other| machine.count(other)).collect();
            if let Some(chosen) = chosen {
                let moved = || machine.count(chosen) > before[usize::from(chosen)];
                let deadline = Instant::now() + Duration::from_secs(20);
                turn.let_on(only(chosen), &mut { moved }, deadline, &|other| machine.kick(other));
                assert!(moved(), "member {chosen} did not move");
            }
            machine.assert_still(turn, 0);
            for other in (1..MEMBERS).filter(|other| Some(*other) != chosen) {
                assert_eq!(
                    machine.count(other),
                    before[usize::from(other)],
                    "member {other} moved"
                );
            }
            visits == ROUNDS
        },
    );
    assert!(machine.crew.has_ended());
}

#[test]
fn what_waits_for_the_gate_is_not_let_on_for_ever() {
    let machine = Machine::new(2);
    machine.take(0).unwrap().start();
    std::thread::scope(|scope| {
        let turn = machine.take(0).unwrap();
        scope.spawn(|| machine.run(1, 1, |_| true));
        machine.stop(&turn);
        while turn.runnable() != 0 {
            // Until it stands before the gate.
            turn.resume();
            std::thread::yield_now();
            machine.stop(&turn);
        }
        let deadline = Instant::now() + Duration::from_millis(5);
        turn.let_on(0b10, &mut || false, deadline, &|other| machine.kick(other));
        assert!(Instant::now() >= deadline);
        assert_eq!(turn.report(1), Some(machine.count(1)));
    });
}

#[test]
fn one_that_ends_while_another_has_all_stopped_waits_for_it() {
    for _ in 0..ROUNDS {
        let ended = AtomicU64::new(0);
        machine_of_all(
            |_| 2,
            |machine, member, _, turn| {
                machine.stop(turn);
                machine.assert_still(turn, member);
                // Everybody wants to end; one does.
                ended.fetch_add(1, SeqCst);
                true
            },
        );
        assert_eq!(ended.load(SeqCst), 1);
    }
}

#[test]
fn those_that_sleep_are_not_waited_for_and_start_when_they_are_told() {
    let machine = Machine::new(3);
    std::thread::scope(|scope| {
        for member in 1..3 {
            let machine = &machine;
            scope.spawn(move || machine.run(member, 10, |_| machine.over.load(SeqCst)));
        }
        {
            let turn = machine.take(0).unwrap();
            machine.stop(&turn);
            assert_eq!((turn.report(1), turn.runnable()), (None, 0));
            turn.resume();
            assert_eq!((machine.count(1), machine.count(2)), (0, 0));
            turn.start();
        }
        while machine.count(1) == 0 || machine.count(2) == 0 {
            std::thread::yield_now();
        }
        machine.over.store(true, SeqCst);
    });
    assert!(machine.crew.has_ended());
}

#[test]
fn a_thread_that_panics_ends_the_run_and_locks_nobody_out() {
    let machine = Machine::new(2);
    machine.take(0).unwrap().start();
    std::thread::scope(|scope| {
        let broken = scope.spawn(|| machine.run(1, 1, |_| panic!("on purpose")));
        machine.run(0, 1, |turn| {
            machine.stop(turn);
            false
        });
        assert!(broken.join().is_err());
    });
    assert!(machine.crew.has_ended());
}

#[test]
fn where_one_at_a_time_is_in_the_guest_the_others_wait_until_it_hands_on() {
    let crew = Crew::<()>::with_turns(2, true);
    let turn = crew.take(0, || ()).unwrap();
    turn.start();
    drop(turn);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            assert!(crew.enter(1, || ()));
            crew.leave(1, false);
            crew.hand_on(1);
        });
        assert!(crew.enter(0, || ()));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!other.is_finished(), "it entered without its turn");
        crew.leave(0, false);
        crew.hand_on(0);
        other.join().unwrap();
        assert!(crew.enter(0, || ()), "it is the first one's turn again");
        crew.leave(0, false);
    });
    let turn = crew.take(0, || ()).unwrap();
    turn.one_at_a_time(false);
    drop(turn);
    assert!(crew.enter(1, || ()) && crew.enter(0, || ()));
}
