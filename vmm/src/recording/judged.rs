//! An audit whose calls may be recorded.

use super::Recorder;
use super::item::{Answer, Call, Item};
use super::recorder::Tap;
use crate::audit::{Audit, AuditConfig, Mediation, Probe, ProbeKind, Touched, World};
use lacuna_abi::addr::{Gfn, Gpa};
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::Record;
use lacuna_abi::gate::{CpuRegistration, Op, Status};
use std::cell::RefCell;
use std::ops::Deref;

/// An [`Audit`]. What changes it is a method of its own here, of the same name and meaning, so that
/// nothing gets past the recorder; everything else is the audit's.
pub struct Judged {
    audit: Audit,
    recorder: Option<Box<Recorder>>,
}

impl Deref for Judged {
    type Target = Audit;

    fn deref(&self) -> &Audit {
        &self.audit
    }
}

/// A call of the audit, in the world as it is or through the recorder.
macro_rules! call {
    ($self:ident, $world:ident, $what:expr, $method:ident($($argument:expr),*), $result:expr) => {{
        let Self { audit, recorder } = $self;
        match recorder {
            None => audit.$method($($argument,)* $world),
            Some(recorder) => {
                recorder.put(&Item::Call($what));
                let tap = Tap { world: $world, recorder: RefCell::new(&mut **recorder) };
                let made = audit.$method($($argument,)* &tap);
                tap.end($result(&made));
                made
            }
        }
    }};
}

/// A call that comes to nothing but its effect.
const fn nothing(_made: &()) -> Result<(), Status> {
    Ok(())
}

impl Judged {
    /// The audit of a guest that is about to start ([`Audit::new`]).
    pub fn new(config: AuditConfig, recorder: Option<Box<Recorder>>, world: &impl World) -> Self {
        let Some(mut recorder) = recorder else {
            return Self { audit: Audit::new(config, world), recorder: None };
        };
        recorder.put(&Item::Call(Call::Start));
        let tap = Tap { world, recorder: RefCell::new(&mut *recorder) };
        let audit = Audit::new(config, &tap);
        tap.end(Ok(()));
        Self { audit, recorder: Some(recorder) }
    }

    /// The recorder, if there is one.
    pub fn recorder(&mut self) -> Option<&mut Recorder> {
        self.recorder.as_deref_mut()
    }

    /// Ends the recording: what is judged from here on is not in it.
    pub fn take_recorder(&mut self) -> Option<Box<Recorder>> {
        self.recorder.take()
    }

    /// [`Audit::register_root`]
    ///
    /// # Errors
    /// As there.
    pub fn register_root(
        &mut self,
        root: Gpa,
        pcid: u16,
        world: &impl World,
    ) -> Result<(), Status> {
        let what = Call::RegisterRoot(root, pcid);
        call!(self, world, what, register_root(root, pcid), |made: &Result<_, _>| *made)
    }

    /// [`Audit::unregister_root`]
    ///
    /// # Errors
    /// As there.
    pub fn unregister_root(&mut self, root: Gpa) -> Result<(), Status> {
        let made = self.audit.unregister_root(root);
        self.note(|| Call::UnregisterRoot(root), made);
        made
    }

    /// [`Audit::start_cpu`]
    pub fn start_cpu(&mut self, cpu: u8) {
        self.audit.start_cpu(cpu);
        self.note(|| Call::StartCpu(cpu), Ok(()));
    }

    /// [`Audit::register_cpu`]
    pub fn register_cpu(&mut self, cpu: u8, registration: CpuRegistration) {
        self.audit.register_cpu(cpu, registration);
        self.note(|| Call::RegisterCpu(cpu, registration), Ok(()));
    }

    /// [`Audit::event`]
    #[inline]
    pub fn event(&mut self, record: &Record, world: &impl World) {
        call!(self, world, Call::Event(*record), event(record), nothing);
    }

    /// [`Audit::arrival`]
    ///
    /// # Errors
    /// As there.
    pub fn arrival(&mut self, cpu: u8, op: Op, seq: u64, world: &impl World) -> Result<(), Status> {
        let what = Call::Arrival(cpu, op, seq);
        call!(self, world, what, arrival(cpu, op, seq), |made: &Result<_, _>| *made)
    }

    /// [`Audit::admit`]
    ///
    /// # Errors
    /// As there.
    pub fn admit(
        &mut self,
        cpu: u8,
        asked: (u32, &TableOp),
        seq: u64,
        world: &impl World,
    ) -> Result<(), Status> {
        let what = Call::Admit(cpu, asked.0, *asked.1, seq);
        call!(self, world, what, admit(cpu, asked, seq), |made: &Result<_, _>| *made)
    }

    /// [`Audit::sample`]
    pub fn sample(&mut self, cpu: u8, seq: u64, world: &impl World) {
        call!(self, world, Call::Sample(cpu, seq), sample(cpu, seq), nothing);
    }

    /// [`Audit::done`]
    pub fn done(&mut self, cpu: u8, op: Op, seq: u64, world: &impl World) {
        call!(self, world, Call::Done(cpu, op, seq), done(cpu, op, seq), nothing);
    }

    /// [`Audit::quiesce`]
    pub fn quiesce(&mut self, seq: u64, world: &impl World) {
        call!(self, world, Call::Quiesce(seq), quiesce(seq), nothing);
    }

    /// [`Audit::mediate`]
    pub fn mediate(&mut self, mediation: Mediation, world: &impl World) {
        call!(self, world, Call::Mediate(mediation), mediate(mediation), nothing);
    }

    /// [`Audit::came`]
    pub fn came(&mut self, cpu: u8, seq: u64) {
        self.audit.came(cpu, seq);
        self.note(|| Call::Came(cpu, seq), Ok(()));
    }

    /// [`Audit::choose_probes`]
    pub fn choose_probes(
        &mut self,
        count: u64,
        kinds: &[ProbeKind],
        draw: &mut dyn FnMut(u64) -> u64,
        world: &impl World,
    ) -> Vec<Probe> {
        let Self { audit, recorder } = self;
        let Some(recorder) = recorder else {
            return audit.choose_probes(count, kinds, draw, world);
        };
        recorder.put(&Item::Call(Call::ChooseProbes(count, kinds.to_vec())));
        let tap = Tap { world, recorder: RefCell::new(&mut **recorder) };
        let mut noted = |below| {
            let drawn = draw(below);
            tap.note(Answer::Draw(below, drawn));
            drawn
        };
        let probes = audit.choose_probes(count, kinds, &mut noted, &tap);
        tap.end(Ok(()));
        probes
    }

    /// [`Audit::judge_probes`]
    pub fn judge_probes(&mut self, touched: &[(Probe, Touched)], seq: u64, world: &impl World) {
        let what = Call::JudgeProbes(touched.to_vec(), seq);
        call!(self, world, what, judge_probes(touched, seq), nothing);
    }

    /// [`Audit::report_leak`]
    pub fn report_leak(&mut self, place: u64, frame: Option<Gfn>, detail: String, seq: u64) {
        self.note(|| Call::Leak(place, frame, detail.clone(), seq), Ok(()));
        self.audit.report_leak(place, frame, detail, seq);
    }

    /// [`Audit::count_leak_search`]
    pub fn count_leak_search(&mut self, checked: u64, not_checked: u64) {
        self.note(|| Call::LeakSearch(checked, not_checked), Ok(()));
        self.audit.count_leak_search(checked, not_checked);
    }

    /// [`Audit::inconclusive`]
    pub fn inconclusive(&mut self, reason: String) {
        self.note(|| Call::Inconclusive(reason.clone()), Ok(()));
        self.audit.inconclusive(reason);
    }

    /// A call that asks nothing of the world.
    fn note(&mut self, what: impl FnOnce() -> Call, result: Result<(), Status>) {
        if let Some(recorder) = &mut self.recorder {
            recorder.put(&Item::Call(what()));
            recorder.put(&Item::Result(result));
        }
    }
}
