//! Where the threads of a machine's vCPUs meet: one at a time has the gate, and who has it can have
//! all others stand still, out of guest mode.
//!
//! Nothing here knows of KVM. A thread says when it enters and leaves the guest; what it reports
//! when it has to stand still is its own business, and so is how another thread is kicked out of the
//! guest. A thread waits in two places only, before the guest and before the gate, and in both it
//! stands still when that is asked: so two that want the others to stop, or one that ends while
//! another has all stopped, cannot lock each other out.

#[cfg(test)]
mod tests;

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time after which a thread that is still in the guest is kicked again: a kick that arrives just
/// before the guest is entered is lost.
const KICK_AGAIN: Duration = Duration::from_micros(500);
/// Time between two looks at what threads that were let on have done.
const LOOK_AGAIN: Duration = Duration::from_micros(50);

/// A set of members, one bit each.
pub(crate) type Set = u8;

/// The set of one member; empty for a number that no member has.
pub(crate) fn only(member: u8) -> Set {
    1_u8.checked_shl(member.into()).unwrap_or(0)
}

/// Where a member is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Not started.
    Asleep,
    /// In the guest, or about to be: it has to be kicked to come out.
    Inside,
    /// Out of the guest, on its way to one of the two places where it waits.
    Outside,
    /// Standing still, and its report is there.
    Still,
    /// Its thread has ended.
    Gone,
}

struct Member<R> {
    phase: Phase,
    /// It is out of the guest to make a call, so that it does not go on before it has the gate.
    calling: bool,
    report: Option<R>,
}

struct State<R> {
    members: Vec<Member<R>>,
    /// Who has the gate.
    holder: Option<u8>,
    /// Who may enter the guest, where only one at a time may.
    baton: Option<u8>,
    /// Everybody but the holder is to stand still, except these.
    stopped: Option<Set>,
    ended: bool,
}

impl<R> State<R> {
    fn must_stop(&self, member: u8) -> bool {
        self.stopped.is_some_and(|let_on| let_on & only(member) == 0) && self.holder != Some(member)
    }

    /// Whether it is the member's turn to be in the guest: also of one that is let on while the others
    /// stand still.
    fn may_enter(&self, member: u8) -> bool {
        self.baton.is_none_or(|baton| baton == member)
            || self.stopped.is_some_and(|let_on| let_on & only(member) != 0)
    }

    /// Hands the baton from `member` to the next one that runs.
    fn hand_on(&mut self, member: u8) {
        if self.baton != Some(member) {
            return;
        }
        let runs = |other: &&u8| {
            let phase = self.members.get(usize::from(**other)).map(|member| member.phase);
            phase.is_some_and(|phase| !matches!(phase, Phase::Asleep | Phase::Gone))
        };
        let count = u8::try_from(self.members.len()).unwrap_or(u8::MAX);
        let order: Vec<u8> = (member + 1..count).chain(0..=member).collect();
        self.baton = order.iter().find(runs).copied().or(self.baton);
    }

    /// Members whose phase is one of these, the holder left out.
    fn others_in(&self, phases: &[Phase]) -> impl Iterator<Item = u8> {
        let named = (0_u8..).zip(&self.members);
        let wanted: Vec<u8> = named
            .filter(|(number, member)| {
                self.holder != Some(*number) && phases.contains(&member.phase)
            })
            .map(|(number, _)| number)
            .collect();
        wanted.into_iter()
    }
}

/// The threads of one machine's vCPUs; `R` is what one reports when it stands still.
pub(crate) struct Crew<R> {
    state: Mutex<State<R>>,
    changed: Condvar,
}

impl<R: Clone> Crew<R> {
    /// A crew whose member 0 runs and whose others are asleep.
    pub(crate) fn new(members: usize) -> Self {
        Self::with_turns(members, false)
    }

    /// The same, of which one at a time is in the guest, or all are.
    pub(crate) fn with_turns(members: usize, one_at_a_time: bool) -> Self {
        let phase = |index| if index == 0 { Phase::Outside } else { Phase::Asleep };
        let members = (0..members)
            .map(|index| Member { phase: phase(index), calling: false, report: None })
            .collect();
        let baton = one_at_a_time.then_some(0);
        let state = State { members, holder: None, baton, stopped: None, ended: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// It is the next member's turn to be in the guest, where only one at a time may.
    pub(crate) fn hand_on(&self, member: u8) {
        self.lock().hand_on(member);
        self.changed.notify_all();
    }

    /// This thread is `member` until the guard is dropped. If it panics, the run ends.
    pub(crate) fn join(&self, member: u8) -> Presence<'_, R> {
        Presence { crew: self, member }
    }

    /// `member` is about to enter the guest: waits while it is asleep or has to stand still. False
    /// once the run has ended.
    pub(crate) fn enter(&self, member: u8, report: impl FnMut() -> R) -> bool {
        self.wait(member, report, |state, member| {
            let awake = state.members[usize::from(member)].phase != Phase::Asleep;
            let enters = awake && state.may_enter(member);
            if enters {
                state.members[usize::from(member)].phase = Phase::Inside;
            }
            enters
        })
    }

    /// `member` has come out of the guest, to make a call or for another reason.
    pub(crate) fn leave(&self, member: u8, calling: bool) {
        let mut state = self.lock();
        let member = &mut state.members[usize::from(member)];
        member.phase = Phase::Outside;
        member.calling = calling;
    }

    /// Waits until `member` has the gate. `None` once the run has ended.
    pub(crate) fn take(&self, member: u8, report: impl FnMut() -> R) -> Option<Turn<'_, R>> {
        let taken = self.wait(member, report, |state, member| {
            let free = state.holder.is_none();
            if free {
                state.holder = Some(member);
                state.members[usize::from(member)].phase = Phase::Outside;
            }
            free
        });
        taken.then(|| Turn { crew: self, member })
    }

    /// Ends the run from outside, before anybody has entered the guest.
    pub(crate) fn abandon(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Whether the run has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Waits until `go` lets the member go on, standing still meanwhile whenever that is asked.
    fn wait(
        &self,
        member: u8,
        mut report: impl FnMut() -> R,
        go: impl Fn(&mut State<R>, u8) -> bool,
    ) -> bool {
        let index = usize::from(member);
        let mut state = self.lock();
        loop {
            if state.ended {
                return false;
            }
            let stop = state.must_stop(member);
            let phase = state.members[index].phase;
            match phase {
                Phase::Outside if stop => {
                    // The report may take a while: the others go on meanwhile.
                    drop(state);
                    let reported = report();
                    state = self.lock();
                    state.members[index].report = Some(reported);
                    state.members[index].phase = Phase::Still;
                    self.changed.notify_all();
                    continue;
                }
                Phase::Still if !stop => {
                    state.members[index].phase = Phase::Outside;
                    continue;
                }
                _ if !stop && go(&mut state, member) => return true,
                _ => {}
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        // The state is changed by single assignments: what a panic leaves behind is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_a_while<'s>(
        &self,
        state: MutexGuard<'s, State<R>>,
        time: Duration,
    ) -> MutexGuard<'s, State<R>> {
        self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// A thread of the crew.
#[must_use = "the thread counts as gone when this is dropped"]
pub(crate) struct Presence<'c, R: Clone> {
    crew: &'c Crew<R>,
    member: u8,
}

impl<R: Clone> Drop for Presence<'_, R> {
    fn drop(&mut self) {
        let mut state = self.crew.lock();
        state.members[usize::from(self.member)].phase = Phase::Gone;
        state.ended |= std::thread::panicking();
        state.hand_on(self.member);
        drop(state);
        self.crew.changed.notify_all();
    }
}

/// One member has the gate; whoever it had stopped goes on when this is dropped.
#[must_use = "the gate is free again when this is dropped"]
pub(crate) struct Turn<'c, R: Clone> {
    crew: &'c Crew<R>,
    member: u8,
}

impl<R: Clone> Turn<'_, R> {
    /// Has all others stand still, and returns when they do: those that are asleep or gone count as
    /// such. `kick` makes a member come out of the guest.
    pub(crate) fn stop(&self, kick: &dyn Fn(u8)) {
        self.settle(0, kick);
    }

    /// Lets these members, which stand still, go on until `done` says so or `deadline` comes; then
    /// all stand still again.
    pub(crate) fn let_on(
        &self,
        members: Set,
        done: &mut dyn FnMut() -> bool,
        deadline: Instant,
        kick: &dyn Fn(u8),
    ) {
        let mut state = self.crew.lock();
        state.stopped = Some(members);
        self.crew.changed.notify_all();
        while !done() && !state.ended && Instant::now() < deadline {
            state = self.crew.wait_a_while(state, LOOK_AGAIN);
        }
        drop(state);
        self.settle(0, kick);
    }

    /// All may go on.
    pub(crate) fn resume(&self) {
        self.crew.lock().stopped = None;
        self.crew.changed.notify_all();
    }

    /// From here on one member at a time is in the guest, this one first; or all are. All others stand
    /// still.
    pub(crate) fn one_at_a_time(&self, on: bool) {
        self.crew.lock().baton = on.then_some(self.member);
    }

    /// Wakes those that are asleep.
    pub(crate) fn start(&self) {
        for member in &mut self.crew.lock().members {
            if member.phase == Phase::Asleep {
                member.phase = Phase::Outside;
            }
        }
        self.crew.changed.notify_all();
    }

    /// Ends the run: nobody enters the guest or gets the gate any more.
    pub(crate) fn end(&self) {
        self.crew.lock().ended = true;
        self.crew.changed.notify_all();
    }

    /// Others that are not waiting for the gate, so that they go on when they may.
    pub(crate) fn runnable(&self) -> Set {
        let state = self.crew.lock();
        let awake = [Phase::Inside, Phase::Outside, Phase::Still];
        let free = state.others_in(&awake).filter(|m| !state.members[usize::from(*m)].calling);
        free.fold(0, |set, member| set | only(member))
    }

    /// What a member that stands still reported.
    pub(crate) fn report(&self, member: u8) -> Option<R> {
        let state = self.crew.lock();
        let member = state.members.get(usize::from(member))?;
        member.report.clone().filter(|_| member.phase == Phase::Still)
    }

    fn settle(&self, let_on: Set, kick: &dyn Fn(u8)) {
        let mut state = self.crew.lock();
        state.stopped = Some(let_on);
        self.crew.changed.notify_all();
        let mut kicked = None;
        while state.others_in(&[Phase::Inside, Phase::Outside]).next().is_some() {
            if kicked.is_none_or(|at: Instant| at.elapsed() >= KICK_AGAIN) {
                state.others_in(&[Phase::Inside]).for_each(kick);
                kicked = Some(Instant::now());
            }
            state = self.crew.wait_a_while(state, KICK_AGAIN);
        }
    }
}

impl<R: Clone> Drop for Turn<'_, R> {
    fn drop(&mut self) {
        let mut state = self.crew.lock();
        state.holder = None;
        state.stopped = None;
        state.members[usize::from(self.member)].calling = false;
        drop(state);
        self.crew.changed.notify_all();
    }
}
