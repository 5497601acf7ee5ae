//! Frames that are touched on purpose (`second-stage-open`), end to end: on clean runs, and on second
//! stages that do something else than they say. On the simulated machine, and on `/dev/kvm`, where
//! tests are ignored or required as those in `kvm.rs`.

#[path = "probes/rig.rs"]
mod rig;
mod support;

use lacuna::audit::{AuditResult, Rule};
use lacuna::config::{Config, MachineKind, Overrides};
use lacuna::gate::ProbeSummary;
use lacuna::run::{End, Host, Machine, Plan};
use lacuna::second_stage::{SecondStage, SecondStageError, Software};
use lacuna::sim::Frames;
use lacuna_abi::addr::{BLOCK_FRAMES, FrameRange, Gfn};
use lacuna_abi::layout::ZONE_START;
use libtest_mimic::{Failed, Trial};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex};
use support::{Check, EVENTS, Run, dirty, ensure, lacuna, replay, trial};

fn main() {
    let mut kvm = trials(MachineKind::Kvm);
    kvm.extend(rig::trials());
    let mut all = trials(MachineKind::Sim);
    all.extend(support::needing_kvm(kvm));
    support::run(all, false);
}

/// How frames are closed: `--seal`, and `[second_stage] guard`.
const BACK_ENDS: [(&str, &str, &str); 3] =
    [("guard", "guard", "auto"), ("mprotect", "guard", "mprotect"), ("memslot", "memslot", "auto")];
/// MiB of the guest.
const MEMORY_MIB: u64 = 32;

fn trials(machine: MachineKind) -> Vec<Trial> {
    let on = machine.name();
    let mut trials = vec![
        trial(&format!("{on}::nothing_is_touched_with_the_seal_off"), move || seal_off(machine)),
        trial(&format!("{on}::touches_can_be_turned_off"), move || turned_off(machine)),
    ];
    for (name, seal, guard) in BACK_ENDS {
        if machine == MachineKind::Sim && name == "mprotect" {
            continue;
        }
        let setting = Setting { machine, seal, guard, vcpus: 1 };
        for vcpus in [1, 2, 4] {
            let clean = Setting { vcpus, ..setting };
            let name = format!("{on}::{name}_on_{vcpus}_vcpus_does_what_it_says");
            trials.push(trial(&name, move || honest(&clean)));
        }
        let test = format!("{on}::a_frame_that_{name}_says_is_closed_and_is_not_is_found");
        trials.push(trial(&test, move || leak(&setting)));
        let test = format!("{on}::frames_that_{name}_says_are_open_and_are_not_are_found");
        trials.push(trial(&test, move || stuck(&setting)));
    }
    trials
}

#[derive(Clone, Copy)]
struct Setting {
    machine: MachineKind,
    seal: &'static str,
    guard: &'static str,
    vcpus: u8,
}

impl Setting {
    /// A replay, all of it secret, with so many touches at each of its many complete checks.
    fn config(&self, probes: u64) -> String {
        let Self { seal, guard, vcpus, .. } = self;
        format!(
            "[guest]\nmemory_mib = {MEMORY_MIB}\nvcpus = {vcpus}\n[workload]\n{}\
             [second_stage]\nseal = \"{seal}\"\nguard = \"{guard}\"\n\
             [audit]\nquiesce_every = 100\nprobes = {probes}\n",
            replay(EVENTS, "all")
        )
    }

    /// Runs it, on a second stage that `wrap` makes from the machine's own.
    fn run(
        &self,
        wrap: impl FnOnce(Box<dyn SecondStage>) -> Box<dyn SecondStage>,
    ) -> Result<(AuditResult, ProbeSummary), Failed> {
        let overrides = Overrides { machine: Some(self.machine), ..Overrides::default() };
        let config = Config::from_text(Path::new("probes.toml"), &self.config(256), &overrides)?;
        let (plan, _) = Plan::new(&config)?;
        let machine = Machine::open(Host::of(config.machine)?, plan, Vec::new())?.with_stage(wrap);
        let outcome = machine.start()?.wait(|_| ControlFlow::Continue(()));
        ensure(matches!(outcome.end, End::Exit(0, _)), &format!("{:?}", outcome.end))?;
        Ok(outcome.with_gate(|gate| (gate.result(), gate.probe_summary())))
    }
}

fn probes(run: &Run, name: &str) -> u64 {
    run.report["second_stage"]["probes"][name].as_u64().unwrap_or(u64::MAX)
}

fn honest(setting: &Setting) -> Check {
    let machine = setting.machine.name();
    let run = lacuna(&setting.config(16), &["--machine", machine, "--seed", "5"])?;
    run.clean()?;
    let [trapped, through, failed] =
        ["trapped", "went_through", "failed"].map(|name| probes(&run, name));
    let counts = format!("{trapped} trapped, {through} went through, {failed} failed");
    ensure(trapped > 50 && through > 20 && failed == 0, &counts)?;
    ensure((probes(&run, "seed"), probes(&run, "each")) == (5, 16), "other draws")?;
    let checked = run.check("second-stage-open", "checked");
    ensure(checked > trapped + through, &format!("{checked} checked, {counts}"))?;
    let left_out = probes(&run, "held_open");
    ensure(setting.seal == "memslot" || left_out == 0, "touches were left out")
}

fn seal_off(machine: MachineKind) -> Check {
    let setting = Setting { machine, seal: "off", guard: "auto", vcpus: 1 };
    let run = lacuna(&setting.config(16), &["--machine", machine.name()])?;
    run.clean()?;
    ensure(run.check("second-stage-open", "checked") == 0, "something was checked")?;
    let left_out = probes(&run, "seal_off");
    ensure(left_out > 50 && probes(&run, "trapped") == 0, &format!("{left_out} left out"))?;
    ensure(run.check("second-stage-open", "not_checked") > left_out, "they are not counted")
}

fn turned_off(machine: MachineKind) -> Check {
    let config = dirty(&replay(EVENTS, "all")) + "probes = 0\n";
    let run = lacuna(&config, &["--machine", machine.name()])?;
    run.clean()?;
    let without = probes(&run, "without");
    ensure(without > 0, "no check was without")?;
    ensure(run.check("second-stage-open", "not_checked") == without, "they are not counted")?;
    let warnings = run.report["warnings"].to_string();
    ensure(warnings.contains("[audit] probes is 0"), &warnings)
}

/// What the second stage says and what it does, kept apart.
struct Liar {
    real: Box<dyn SecondStage>,
    /// What it says: an honest one, of the same granule, that closes nothing.
    says: Software,
    does: Does,
    /// The frame that is left open.
    left_open: Arc<Mutex<Option<Gfn>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Does {
    /// The first frame that is to be closed stays open for good.
    Leak,
    /// The upper half of memory, which the guest hardly uses, is closed.
    Stick,
}

fn zone() -> FrameRange {
    FrameRange::new(ZONE_START.frame(), MEMORY_MIB << 8).expect("a zone has frames")
}

fn upper_half() -> FrameRange {
    let half = zone().count() / 2;
    FrameRange::new(zone().start().wrapping_add(half), half).expect("half a zone has frames")
}

impl Liar {
    fn new(real: Box<dyn SecondStage>, does: Does, left_open: Arc<Mutex<Option<Gfn>>>) -> Self {
        let frames = Arc::new(Frames::new(zone()));
        let says = match real.name() {
            "memslot" => Software::memslot(frames, zone()),
            _ => Software::guard(frames, zone()),
        };
        let mut liar = Self { real, says, does, left_open };
        if does == Does::Stick {
            liar.real.update(upper_half(), &|_| true).expect("it can be closed");
        }
        liar
    }

    fn left_open(&self) -> Option<Gfn> {
        *self.left_open.lock().expect("nobody panics")
    }

    /// What may be closed in truth.
    fn may<'a>(&self, may_close: &'a dyn Fn(Gfn) -> bool) -> impl Fn(Gfn) -> bool + use<'a> {
        let (does, left_open) = (self.does, self.left_open());
        move |frame| match does {
            Does::Leak => Some(frame) != left_open && may_close(frame),
            Does::Stick => upper_half().contains(frame) || may_close(frame),
        }
    }
}

impl SecondStage for Liar {
    fn name(&self) -> &'static str {
        self.real.name()
    }

    fn detail(&self) -> String {
        self.real.detail()
    }

    fn granule(&self) -> u64 {
        self.real.granule()
    }

    fn update(
        &mut self,
        frames: FrameRange,
        may_close: &dyn Fn(Gfn) -> bool,
    ) -> Result<(), SecondStageError> {
        self.says.update(frames, may_close)?;
        if self.does == Does::Leak && self.left_open().is_none() {
            let first = frames.iter().find(|frame| may_close(*frame));
            *self.left_open.lock().expect("nobody panics") = first;
        }
        let may = self.may(may_close);
        self.real.update(frames, &may)
    }

    fn needs_all_stopped(&self, frames: FrameRange, may_close: &dyn Fn(Gfn) -> bool) -> bool {
        self.real.needs_all_stopped(frames, &self.may(may_close))
    }

    fn denies(&self, frame: Gfn) -> bool {
        self.says.denies(frame)
    }

    fn holds_open(&self, frame: Gfn) -> bool {
        self.says.holds_open(frame)
    }
}

/// The findings of `second-stage-open`; there are no others.
fn findings(result: &AuditResult) -> Result<Vec<(Gfn, &str)>, Failed> {
    ensure(result.inconclusive.is_empty(), &format!("{:?}", result.inconclusive))?;
    let found: Vec<_> = result.findings.iter().collect();
    ensure(
        !found.is_empty() && found.iter().all(|f| f.rule == Rule::SecondStageOpen),
        &format!("{found:#?}"),
    )?;
    Ok(found.iter().filter_map(|f| Some((f.frame?, &*f.detail))).collect())
}

fn leak(setting: &Setting) -> Check {
    let left_open = Arc::new(Mutex::new(None));
    let shared = Arc::clone(&left_open);
    let (result, _) = setting.run(|real| Box::new(Liar::new(real, Does::Leak, shared)))?;
    let frame = left_open.lock().expect("nobody panics").ok_or("nothing was closed")?;
    for (found, detail) in findings(&result)? {
        // A pageblock without a slot has none of its frames open, or all.
        let same = match setting.seal {
            "memslot" => found.block_start() == frame.block_start(),
            _ => found == frame,
        };
        ensure(same, &format!("{found}, but {frame} was left open"))?;
        ensure(detail.starts_with("sealed, and a probe's"), detail)?;
    }
    Ok(())
}

fn stuck(setting: &Setting) -> Check {
    let (result, summary) =
        setting.run(|real| Box::new(Liar::new(real, Does::Stick, Arc::default())))?;
    for (found, detail) in findings(&result)? {
        ensure(upper_half().contains(found), &format!("{found} was not closed"))?;
        ensure(detail.starts_with("denied although open: the frame is not secret"), detail)?;
    }
    ensure(summary.tally.went_through > 0, "nothing else is open")
}

const _: () = assert!((MEMORY_MIB << 8).is_multiple_of(2 * BLOCK_FRAMES));
