//! Which simulated CPU runs: one at a time, the one that holds the baton.
//!
//! Each CPU is a thread of the host, but all of them but one wait. Who is next is drawn from the
//! seed, so that a run repeats itself exactly, whatever the host's own scheduler does.

use super::random::Random;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A CPU that waits for another one gets the baton this rarely while there is one that does not.
const PATIENCE: u64 = 16;

/// The run has ended: nobody holds the baton any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Over;

/// The baton.
#[derive(Debug)]
pub struct Baton {
    state: Mutex<State>,
    turns: Vec<Condvar>,
}

#[derive(Debug)]
struct State {
    holder: usize,
    /// CPUs that run, one bit each; CPU 0 alone until it starts the others.
    awake: u32,
    /// CPUs that wait for another one to do something, one bit each.
    idle: u32,
    over: bool,
    passed: u64,
    random: Random,
}

impl Baton {
    /// The baton of so many CPUs; CPU 0 has it first.
    #[must_use]
    pub fn new(cpus: usize, seed: u64) -> Self {
        let random = Random::new(seed, 0);
        let state = State { holder: 0, awake: 1, idle: 0, over: false, passed: 0, random };
        Self { state: Mutex::new(state), turns: (0..cpus).map(|_| Condvar::new()).collect() }
    }

    /// Waits until `cpu` has the baton.
    ///
    /// # Errors
    /// [`Over`].
    pub fn wait(&self, cpu: usize) -> Result<(), Over> {
        self.wait_in(self.lock(), cpu)
    }

    /// Passes the baton on from `cpu`, or keeps it, as it is drawn, and waits until it is back. A
    /// CPU is `idle` when it can only go on once another has done something.
    ///
    /// # Errors
    /// [`Over`].
    pub fn pass(&self, cpu: usize, idle: bool) -> Result<(), Over> {
        let mut state = self.lock();
        if state.over {
            return Err(Over);
        }
        let own = 1 << cpu;
        state.idle = if idle { state.idle | own } else { state.idle & !own };
        let next = state.draw(cpu, idle);
        if next == cpu {
            return Ok(());
        }
        state.holder = next;
        state.passed += 1;
        self.turns[next].notify_one();
        self.wait_in(state, cpu)
    }

    /// Has all CPUs run.
    pub fn start(&self) {
        self.lock().awake = (1 << self.turns.len()) - 1;
    }

    /// Something happened that idle CPUs may be waiting for.
    pub fn stir(&self) {
        self.lock().idle = 0;
    }

    /// Ends the run: whoever waits stops waiting.
    pub fn end(&self) {
        self.lock().over = true;
        self.turns.iter().for_each(Condvar::notify_all);
    }

    /// How often the baton went from one CPU to another.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.lock().passed
    }

    fn wait_in(&self, mut state: MutexGuard<'_, State>, cpu: usize) -> Result<(), Over> {
        while state.holder != cpu && !state.over {
            state = self.turns[cpu].wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.over { Err(Over) } else { Ok(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Who is next: one that is not idle, if there is any; idle ones now and then, because what
    /// they wait for is not known here. An idle CPU does not follow itself.
    fn draw(&mut self, cpu: usize, idle: bool) -> usize {
        let own = 1_u32 << cpu;
        let others = if idle && self.awake != own { self.awake & !own } else { self.awake };
        let busy = others & !self.idle;
        let from = if busy == 0 || self.random.one_in(PATIENCE) { others } else { busy };
        let mut skip = self.random.below(from.count_ones().into());
        let mut wanted = (0..32).filter(|cpu| from & (1 << cpu) != 0);
        while skip > 0 {
            wanted.next();
            skip -= 1;
        }
        wanted.next().unwrap_or(cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    /// The CPUs, in the order in which they had the baton: each passes it on `turns` times.
    fn order(
        cpus: usize,
        turns: usize,
        seed: u64,
        idle: impl Fn(usize) -> bool + Sync,
    ) -> Vec<usize> {
        let baton = Baton::new(cpus, seed);
        baton.start();
        let order = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for cpu in 0..cpus {
                let (baton, order, idle) = (&baton, &order, &idle);
                scope.spawn(move || -> Result<(), Over> {
                    baton.wait(cpu)?;
                    loop {
                        let taken = {
                            let mut order = order.lock().unwrap();
                            order.push(cpu);
                            order.len()
                        };
                        if taken == turns {
                            baton.end();
                        }
                        baton.pass(cpu, idle(cpu))?;
                    }
                });
            }
        });
        order.into_inner().unwrap()
    }

    #[test]
    fn a_seed_gives_one_order_whatever_the_threads_do() {
        let first = order(4, 500, 7, |_| false);
        assert_eq!(first, order(4, 500, 7, |_| false));
        assert_ne!(first, order(4, 500, 8, |_| false));
        let had = |cpu| first.iter().filter(|holder| **holder == cpu).count();
        assert!((0..4).all(|cpu| had(cpu) > 60), "every CPU gets its share");
    }

    #[test]
    fn idle_cpus_get_little_but_not_nothing() {
        let order = order(3, 1000, 1, |cpu| cpu != 2);
        let had = |cpu| order.iter().filter(|holder| **holder == cpu).count();
        assert!(had(2) > 800 && had(0) > 2 && had(1) > 2, "{} {} {}", had(0), had(1), had(2));
    }

    #[test]
    fn cpus_that_were_not_started_get_no_turn() {
        let baton = Baton::new(4, 3);
        for _ in 0..100 {
            assert_eq!((baton.pass(0, false), baton.pass(0, true)), (Ok(()), Ok(())));
        }
        assert_eq!(baton.passed(), 0);
    }

    #[test]
    fn one_cpu_keeps_the_baton() {
        let baton = Baton::new(1, 3);
        assert_eq!(baton.wait(0), Ok(()));
        assert_eq!((baton.pass(0, false), baton.pass(0, true)), (Ok(()), Ok(())));
        assert_eq!(baton.passed(), 0);
        baton.end();
        assert_eq!(baton.pass(0, false), Err(Over));
    }

    #[test]
    fn the_end_wakes_all_who_wait() {
        let baton = Baton::new(8, 3);
        thread::scope(|scope| {
            let waiting: Vec<_> = (1..8)
                .map(|cpu| {
                    let baton = &baton;
                    scope.spawn(move || baton.wait(cpu))
                })
                .collect();
            baton.end();
            assert!(waiting.into_iter().all(|thread| thread.join().unwrap() == Err(Over)));
        });
    }
}
