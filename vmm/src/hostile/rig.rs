//! A machine without CPUs: memory, a gate, a second stage in software, and what the host did, noted
//! apart from gate and audit.

use super::elf::elf;
use super::notes::{Notes, Told};
use super::oracle::{Left, forbidden};
use crate::audit::{AuditResult, Mediation, Profile};
use crate::config::Steps;
use crate::gate::{Gate, GateSetup, Served, Vcpus};
use crate::image::Image;
use crate::machine::boot;
use crate::machine::kvm::{CR0, CR4, EFER, KvmError};
use crate::machine::memory::Memory;
use crate::machine::state::Registers;
use crate::second_stage::{Off, SecondStage, Software};
use crate::sim::Frames;
use crate::stop::Stop;
use lacuna_abi::addr::Gpa;
use lacuna_abi::boot::{BootInfo, FEATURE_DIRECT_PAGING};
use lacuna_abi::gate::{Call, PAGE_WORDS, STATUS_WORD, Status};
use lacuna_abi::layout::{Layout, Needs, call_page_offset};
use std::collections::BTreeSet;
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

/// Memory of the allocator.
const MEMORY_MIB: u64 = 16;
/// Most findings that are kept in words.
pub(super) const MAX_FINDINGS: usize = 20;

/// vCPUs that stand still all the time, with registers that a script may set.
pub(super) struct Cpus {
    pub(super) registers: Vec<Registers>,
}

impl Vcpus for Cpus {
    fn stop(&mut self) {}

    fn let_on(&mut self, _: u8, _: &mut dyn FnMut() -> bool, _: Instant) {}

    fn resume(&mut self) {}

    fn runnable(&self) -> u8 {
        0
    }

    fn registers(&self, cpu: u8) -> Result<Registers, KvmError> {
        Ok(self.registers.get(usize::from(cpu)).copied().unwrap_or_default())
    }

    fn start(&mut self) {}

    fn interrupt(&mut self, _: u8) -> Result<(), KvmError> {
        Ok(())
    }
}

/// The machine.
pub(super) struct Rig {
    pub(super) memory: Arc<Memory>,
    pub(super) root: Gpa,
    /// Roots that the gate took, beside the first.
    pub(super) roots: BTreeSet<Gpa>,
    pub(super) cpus: Cpus,
    /// Heads of the rings, as an honest guest counts them.
    pub(super) heads: Vec<u64>,
    gate: Gate,
    notes: Notes,
    closes: bool,
    direct: bool,
}

impl Rig {
    pub(super) fn new(cpus: u64, closes: bool, mediation: Mediation) -> Result<Self, String> {
        let failed = |error: &dyn std::fmt::Display| format!("no machine: {error}");
        let image = Image::parse(&elf(&[0xf4])).map_err(|error| failed(&error))?;
        let cpus = usize::try_from(cpus).unwrap_or(1);
        let needs =
            Needs { image: image.len(), memory_mib: MEMORY_MIB, cpus, input: 0, scratch: 0 };
        let layout = Layout::new(&needs).map_err(|error| format!("no layout: {error:?}"))?;
        let memory = Arc::new(Memory::new(layout).map_err(|error| failed(&error))?);
        let mut info = BootInfo::for_layout(&layout);
        let direct = mediation == Mediation::Tables;
        if direct {
            info.features |= FEATURE_DIRECT_PAGING;
        }
        let info = boot::prepare(&memory, &image, info);
        let root = Gpa(info.map_err(|error| failed(&error))?.root);
        let zone = layout.zone_frames();
        let stage: Box<dyn SecondStage> = match closes {
            true => Box::new(Software::guard(Arc::new(Frames::new(zone)), zone)),
            false => Box::new(Off),
        };
        let notes = Notes::default();
        let gate = Gate::new(GateSetup {
            memory: Arc::clone(&memory),
            stage,
            mediation,
            steps: Steps::ALL,
            boot_root: root,
            profile: Profile::Intel,
            quiesce_every: 1000,
            max_findings: MAX_FINDINGS,
            probes: 0,
            seed: 1,
            shootdown_limit: Duration::ZERO,
            scanner: None,
            stop: Arc::new(Stop::default()),
            observers: vec![Box::new(notes.clone())],
            recorder: None,
        });
        let registers =
            Registers { cr0: CR0, cr3: root.0, cr4: CR4, efer: EFER, ..Registers::default() };
        let cpus = Cpus { registers: vec![registers; layout.cpus] };
        let (roots, heads) = (BTreeSet::new(), vec![0; layout.cpus]);
        Ok(Self { memory, root, roots, cpus, heads, gate, notes, closes, direct })
    }

    pub(super) fn layout(&self) -> Layout {
        *self.memory.layout()
    }

    /// Place of a word in a CPU's call page.
    pub(super) fn call_word(&self, cpu: u8, word: usize) -> Gpa {
        let offset = call_page_offset(cpu.into()) + 8 * (word % PAGE_WORDS) as u64;
        self.layout().shared.gpa.wrapping_add(offset)
    }

    /// Whether the guest has no table mapped and asks the host to write them.
    pub(super) const fn is_direct(&self) -> bool {
        self.direct
    }

    /// Stores a word where the guest has memory; a store elsewhere would end it.
    pub(super) fn store(&self, at: Gpa, value: u64) {
        if self.direct && self.layout().pool.contains(at) {
            return;
        }
        _ = self.memory.store(Gpa(at.0 & !7), value);
    }

    pub(super) fn load(&self, at: Gpa) -> u64 {
        self.memory.load(Gpa(at.0 & !7)).unwrap_or(0)
    }

    /// Makes a gate call. False if it ended the guest.
    pub(super) fn call(&mut self, cpu: u8, call: Call) -> Result<bool, String> {
        self.notes.lock().caller = cpu;
        let root = Gpa(self.load(self.call_word(cpu, lacuna_abi::gate::ARGS_WORD)));
        let served = self.gate.serve(call, cpu, &mut self.cpus);
        let served = served.map_err(|error| format!("the gate failed: {error}"))?;
        let done = self.load(self.call_word(cpu, STATUS_WORD)) == Status::Ok.to_word(0);
        match call {
            Call::RegisterRoot if done => _ = self.roots.insert(root),
            Call::UnregisterRoot if done => _ = self.roots.remove(&root),
            _ => {}
        }
        Ok(matches!(served, Served::Resume))
    }

    /// A call with a number that no call has.
    pub(super) fn no_call(&mut self, cpu: u8) -> Result<(), String> {
        self.gate.refuse(cpu).map_err(|error| format!("the gate failed: {error}"))
    }

    /// Everything is checked once more.
    pub(super) fn finish(&mut self) -> Result<(), String> {
        let finished = self.gate.finish(0, &mut self.cpus, true);
        finished.map_err(|error| format!("the last check failed: {error}"))
    }

    pub(super) fn result(&self) -> AuditResult {
        self.gate.result()
    }

    pub(super) fn calls(&self) -> u64 {
        self.gate.counters().calls
    }

    /// Whether a report would say pass.
    pub(super) fn is_clean(&self) -> bool {
        let result = self.result();
        let violations: u64 = result.tallies.iter().map(|(_, tally)| tally.violations).sum();
        violations == 0
            && result.findings.is_empty()
            && result.inconclusive.is_empty()
            && self.gate.events_lost() == 0
    }

    pub(super) fn told(&self) -> MutexGuard<'_, Told> {
        self.notes.lock()
    }

    /// What is left that a rule forbids, if anything.
    pub(super) fn forbidden(&self) -> Option<String> {
        let told = self.told();
        let registers = |cpu: u8| (cpu, self.cpus.registers[usize::from(cpu)]);
        forbidden(&Left {
            memory: &self.memory,
            root: self.root,
            roots: Some(&self.roots),
            registers: self.running().into_iter().map(registers).collect(),
            told: &told,
        })
    }

    /// The CPUs that take part.
    pub(super) fn running(&self) -> Vec<u8> {
        self.gate.audit().running().collect()
    }

    /// Whether exactly the secret frames that nobody has open are closed.
    pub(super) fn second_stage_is_right(&self) -> Result<(), String> {
        let told = self.told();
        for frame in self.layout().zone_frames().iter() {
            let open = told.open.iter().any(|((f, _), opens)| *f == frame && *opens > 0);
            let closed = self.closes && told.secret.contains(&frame) && !open;
            if self.gate.stage().denies(frame) != closed {
                return Err(format!("the second stage has {frame} closed: {}", !closed));
            }
        }
        Ok(())
    }
}
