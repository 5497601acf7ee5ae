//! Which address spaces may be live on which CPU, as its root loads say.

use super::epochs::{CpuSet, members, only};
use lacuna_abi::addr::Gpa;
use lacuna_abi::gate::CpuRegistration;

/// Most address spaces that are followed on one CPU.
const MAX_SPACES: usize = 256;

/// An address space whose non-global translations a CPU may cache.
#[derive(Clone, Copy, Debug)]
struct Space {
    root: Gpa,
    pcid: u16,
    /// A root load that drops it has been announced; it is gone once the CPU is seen to have gone
    /// on after it.
    leaving: Option<u64>,
}

/// One CPU. Before it is started it caches nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Cpu {
    running: bool,
    /// PCID under which it runs.
    pub pcid: u16,
    /// Its descriptor tables, once it has registered them.
    pub registration: Option<CpuRegistration>,
    spaces: Vec<Space>,
    /// Roots that were ever loaded: their global translations outlive a root load.
    loaded: Vec<Gpa>,
}

/// All CPUs.
#[derive(Clone, Debug)]
pub(super) struct Cpus {
    all: Vec<Cpu>,
    root: Gpa,
}

impl Cpus {
    /// `count` CPUs that start with `root`; CPU 0 runs.
    pub(super) fn new(count: usize, root: Gpa) -> Self {
        let mut cpus = Self { all: vec![Cpu::default(); count], root };
        cpus.start(0);
        cpus
    }

    /// The CPU runs from here on.
    pub(super) fn start(&mut self, cpu: u8) {
        if let Some(cpu) = self.all.get_mut(usize::from(cpu))
            && !cpu.running
        {
            cpu.running = true;
            cpu.spaces.push(Space { root: self.root, pcid: 0, leaving: None });
            cpu.loaded.push(self.root);
        }
    }

    /// A CPU that runs.
    pub(super) fn get(&self, cpu: u8) -> Option<&Cpu> {
        self.all.get(usize::from(cpu)).filter(|cpu| cpu.running)
    }

    /// A CPU that runs.
    pub(super) fn get_mut(&mut self, cpu: u8) -> Option<&mut Cpu> {
        self.all.get_mut(usize::from(cpu)).filter(|cpu| cpu.running)
    }

    /// Numbers of the CPUs that run.
    pub(super) fn numbers(&self) -> impl Iterator<Item = u8> + use<> {
        let running = self.all.iter().zip(0..).filter(|(cpu, _)| cpu.running);
        members(running.fold(0, |set, (_, cpu)| set | only(cpu)))
    }

    /// CPUs that may cache a translation of this address space.
    pub(super) fn may_cache(&self, root: Gpa, global: bool) -> CpuSet {
        let caches = |cpu: &Cpu| {
            if global {
                cpu.loaded.contains(&root)
            } else {
                cpu.spaces.iter().any(|space| space.root == root)
            }
        };
        self.numbers()
            .filter(|cpu| self.get(*cpu).is_some_and(caches))
            .fold(0, |set, cpu| set | only(cpu))
    }
}

impl Cpu {
    /// The CPU's next record has the number `seq`: root loads before it have been carried out.
    pub(super) fn went_on(&mut self, seq: u64) {
        self.spaces.retain(|space| space.leaving.is_none_or(|load| load >= seq));
    }

    /// The CPU loads a root. False if there are too many to follow.
    pub(super) fn load(&mut self, root: Gpa, pcid: u16, no_flush: bool, seq: u64) -> bool {
        self.pcid = pcid;
        for space in &mut self.spaces {
            let same = space.root == root && space.pcid == pcid;
            if same {
                space.leaving = None;
            } else if space.pcid == pcid && !no_flush {
                space.leaving = Some(seq);
            }
        }
        if !self.loaded.contains(&root) {
            self.loaded.push(root);
        }
        if self.spaces.iter().any(|space| space.root == root && space.pcid == pcid) {
            return true;
        }
        let room = self.spaces.len() < MAX_SPACES;
        if room {
            self.spaces.push(Space { root, pcid, leaving: None });
        }
        room
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Gpa = Gpa(0x1000);
    const B: Gpa = Gpa(0x2000);

    #[test]
    fn a_root_stays_live_until_the_cpu_is_seen_to_have_gone_on() {
        let mut cpus = Cpus::new(2, A);
        cpus.start(1);
        assert!(cpus.get_mut(1).unwrap().load(B, 0, false, 5));
        assert_eq!(cpus.may_cache(A, false), 0b11);
        cpus.get_mut(1).unwrap().went_on(5);
        assert_eq!(cpus.may_cache(A, false), 0b11);
        cpus.get_mut(1).unwrap().went_on(6);
        assert_eq!(cpus.may_cache(A, false), 0b01);
        assert_eq!(cpus.may_cache(B, false), 0b10);
        assert_eq!(cpus.may_cache(A, true), 0b11, "globals outlive the load");
    }

    #[test]
    fn a_cpu_that_does_not_run_caches_nothing() {
        let mut cpus = Cpus::new(3, A);
        assert_eq!((cpus.may_cache(A, true), cpus.may_cache(A, false)), (0b1, 0b1));
        assert!(cpus.get(2).is_none() && cpus.numbers().eq([0]));
        cpus.start(2);
        assert_eq!((cpus.may_cache(A, true), cpus.may_cache(A, false)), (0b101, 0b101));
        assert!(cpus.get_mut(2).unwrap().load(B, 0, false, 5));
        cpus.get_mut(2).unwrap().went_on(6);
        cpus.start(2);
        assert_eq!(cpus.may_cache(A, false), 0b1, "it was started once");
        assert!(cpus.numbers().eq([0, 2]));
    }

    #[test]
    fn a_load_that_flushes_nothing_leaves_every_root_live() {
        let mut cpus = Cpus::new(1, A);
        let cpu = cpus.get_mut(0).unwrap();
        assert!(cpu.load(B, 1, false, 5));
        assert!(cpu.load(B, 0, true, 6));
        cpu.went_on(7);
        assert_eq!(cpus.may_cache(A, false), 1, "under PCID 0");
    }
}
