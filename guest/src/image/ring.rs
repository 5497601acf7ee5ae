//! The event ring of this CPU, and the flushes that it records.

use crate::{cpu, gate, memory, shared};
use core::sync::atomic::AtomicU64;
use lacuna_abi::addr::Gpa;
use lacuna_abi::direct::TableOp;
use lacuna_abi::event::{EntryWrite, Event, Flush, TableFill};
use lacuna_abi::gate::Call;
use lacuna_abi::layout::Region;
use lacuna_abi::observe::Observation;
use lacuna_abi::paging::Level;
use lacuna_guest::platform::GateError;
use lacuna_guest::ring::{self, Ring};

/// The ring of the CPU that made this.
struct Own {
    cpu: usize,
    site: u32,
    words: &'static shared::Ring,
}

impl Ring for Own {
    fn cpu(&self) -> u8 {
        // Below MAX_CPUS, 8.
        self.cpu as u8
    }

    fn site(&self) -> u32 {
        self.site
    }

    fn sequence(&self) -> &AtomicU64 {
        &shared::sequence()[0]
    }

    fn control(&self, word: usize) -> &AtomicU64 {
        &self.words.control[word]
    }

    fn record(&self, record: usize, word: usize) -> &AtomicU64 {
        &self.words.records[record][word]
    }

    fn drain(&self) {
        let _ = gate::call(Call::Drain);
    }
}

/// Has `body` use this CPU's ring, with interrupts off.
fn with_own<R>(site: u32, body: impl FnOnce(&Own) -> R) -> R {
    let were_on = cpu::interrupts_off();
    let cpu = cpu::number();
    let result = body(&Own { cpu, site, words: shared::ring(cpu) });
    if were_on {
        cpu::interrupts_on();
    }
    result
}

/// Records an event that takes its number now.
pub(crate) fn record(site: u32, event: Event) {
    with_own(site, |own| ring::record(own, event));
}

/// Waits until so many records can be made without the host.
pub(crate) fn make_room(records: u64) {
    with_own(0, |own| ring::make_room(own, records));
}

/// Records what `look` sees, with a number from before it looks.
pub(crate) fn observe(site: u32, look: impl FnOnce() -> Observation) {
    with_own(site, |own| ring::observe(own, look));
}

/// Writes a run of entries and records it.
pub(crate) fn write_entries(site: u32, pool: &Region, at: Gpa, write: &EntryWrite) {
    let store = |index: u64, entry| {
        memory::write_entry(pool, at.wrapping_add(8 * index), entry);
    };
    with_own(site, |own| ring::write_entries(own, write, store));
}

/// Fills a table that no root reaches and records it. Interrupts are off meanwhile: what a CPU does is
/// recorded in that order.
pub(crate) fn fill_table(site: u32, pool: &Region, fill: &TableFill) {
    with_own(site, |own| {
        memory::fill_table(pool, fill);
        ring::record(own, Event::TableFill(*fill));
    });
}

/// Has the host carry out operations on tables, and records what was done.
///
/// # Errors
/// The first that the host refused.
#[inline(never)]
pub(crate) fn write_directly(site: u32, ops: &[TableOp]) -> Result<(), GateError> {
    with_own(site, |own| ring::write_directly(own, ops, |ops| gate::tables(site, ops)))
}

/// Records a flush, then executes it, likewise.
pub(crate) fn flush(site: u32, flush: Flush) {
    // The image has no INVPCID, which an interpreting KVM does not know, and CR4.PCIDE is clear: a
    // flush of everything does what each of them must.
    let flush = match flush {
        Flush::Pages { .. } | Flush::NonGlobal => flush,
        _ => Flush::Everything,
    };
    with_own(site, |own| {
        ring::record(own, Event::Flush(flush));
        execute(flush);
    });
}

fn execute(flush: Flush) {
    match flush {
        Flush::Pages { va, count, level } => {
            let stride = if level == Level::Pt { Level::Pt.span() } else { Level::Pd.span() };
            for index in 0..u64::from(count) {
                cpu::invalidate_page(va.wrapping_add(index * stride));
            }
        }
        Flush::NonGlobal => cpu::flush_non_global(),
        Flush::Everything | Flush::PageOfPcid { .. } | Flush::Pcid(_) | Flush::AllPcids => {
            cpu::flush_everything();
        }
    }
}
