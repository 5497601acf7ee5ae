//! What one record says, as a sentence without its subject.

use lacuna_abi::addr::{FrameRange, Gva};
use lacuna_abi::event::{EntryWrite, Event, Flush, HostAct, Life, Record, Sighting};
use lacuna_abi::observe::{Observation, Seen};
use lacuna_abi::paging::{Entry, Level};

/// "the frame 0x1000", "512 frames from 0x200000".
pub(super) fn frames(frames: FrameRange) -> String {
    match frames.count() {
        1 => format!("the frame {}", frames.start()),
        count => format!("{count} frames from {}", frames.start()),
    }
}

/// What an entry maps, and how.
pub(super) fn entry(entry: Entry, level: Level) -> String {
    if !entry.is_present() {
        return "nothing".to_owned();
    }
    if !entry.is_leaf(level) {
        return format!("the table at {}", entry.frame(level).gpa());
    }
    let mut rights = vec![size(level)];
    rights.extend(entry.has(Entry::WRITABLE).then_some("writable"));
    rights.extend((!entry.has(Entry::NO_EXECUTE)).then_some("executable"));
    rights.extend(entry.has(Entry::USER).then_some("for ring 3"));
    rights.extend(entry.has(Entry::GLOBAL).then_some("global"));
    format!("the frame {} ({})", entry.frame(level), rights.join(", "))
}

/// A page that was mapped or a table that was linked, for the address `va` in it.
pub(super) fn made(new: Entry, level: Level, va: Gva) -> String {
    let at = va.align_down(level.span());
    if new.is_leaf(level) {
        format!("mapped {} at {at}", entry(new, level))
    } else {
        format!("linked {} for {at}", entry(new, level))
    }
}

/// The name of a page's size.
pub(super) const fn size(level: Level) -> &'static str {
    match level {
        Level::Pt => "4 KiB",
        Level::Pd => "2 MiB",
        Level::Pdpt => "1 GiB",
        Level::Pml4 => "512 GiB",
    }
}

/// An entry that was written: what it says of `va`, which lies in the run.
pub(super) fn write(write: &EntryWrite, va: Gva) -> String {
    let level = write.level;
    let (old, new) = (super::old_at(write, va), super::new_at(write, va));
    let (old, new) = (old.unwrap_or(Entry::EMPTY), new.unwrap_or(Entry::EMPTY));
    let at = va.align_down(level.span());
    let run = match write.count {
        1 => String::new(),
        count => format!(", one of {count} entries"),
    };
    match (old.is_present(), new.is_present()) {
        (false, true) => format!("{}{run}", made(new, level, va)),
        (true, false) => format!("cleared the entry for {at}{run}, of {}", entry(old, level)),
        (true, true) => {
            format!(
                "changed the entry for {at}{run} from {} to {}",
                entry(old, level),
                entry(new, level)
            )
        }
        (false, false) => format!("wrote the entry for {at}{run}, which was and is empty"),
    }
}

pub(super) fn flush(flush: &Flush) -> String {
    match flush {
        Flush::Pages { va, count: 1, .. } => format!("executed INVLPG of {va}"),
        Flush::Pages { va, count, level } => {
            format!("executed INVLPG of {count} pages of {} from {va}", size(*level))
        }
        Flush::NonGlobal => "reloaded CR3".to_owned(),
        Flush::Everything => {
            "flushed everything (a change of CR4.PGE or INVPCID of type 2)".to_owned()
        }
        Flush::PageOfPcid { va, pcid } => format!("executed INVPCID of {va} under PCID {pcid}"),
        Flush::Pcid(pcid) => format!("executed INVPCID of PCID {pcid}"),
        Flush::AllPcids => "executed INVPCID of all PCIDs but globals".to_owned(),
    }
}

pub(super) fn root_load((root, pcid): (impl std::fmt::Display, u16), no_flush: bool) -> String {
    let how = if no_flush { ", with bit 63 set" } else { "" };
    format!("loaded CR3 with the root {root}, PCID {pcid}{how}")
}

pub(super) fn life(life: Life, named: FrameRange) -> String {
    let named = frames(named);
    match life {
        Life::Pooled => format!("put {named} into the pool"),
        Life::PooledZero => format!("put {named} into the pool as zero"),
        Life::HandedOut => format!("handed out {named}"),
        Life::HandedOutZero => format!("handed out {named} as zero"),
        Life::Freed => format!("freed {named}"),
        Life::Unpooled => format!("took {named} out of the pool"),
        Life::TableAllocated => format!("took {named} for a page table"),
        Life::TableFreed => format!("freed {named}, a page table"),
    }
}

pub(super) fn act(act: HostAct, named: FrameRange) -> String {
    let named = frames(named);
    match act {
        HostAct::Sealed => format!("had {named} sealed"),
        HostAct::HeldOpen => format!("had {named} sealed, but they were not closed"),
        HostAct::Opened => format!("had {named} opened"),
        HostAct::Released => format!("had {named} released: secret no more"),
        HostAct::Quiesced => "everything was checked".to_owned(),
        HostAct::Refused => format!("was refused to open {named}"),
        HostAct::WriteRefused => format!("was refused a write to tables about {named}"),
    }
}

fn observed(observation: &Observation) -> String {
    let Observation { case, va, seen } = *observation;
    let access = case.change().access().name();
    match seen {
        Seen::Fault => format!("tried a {access} of {va}: a page fault"),
        Seen::Reached(gpa) => {
            format!("tried a {access} of {va}: it reached the frame {}", gpa.frame())
        }
        Seen::NotOffered => format!("does not offer a {access} of this kind"),
    }
}

/// What any record says; an entry write, of its first entry.
pub(super) fn record(record: &Record) -> String {
    match &record.event {
        Event::Seen(Sighting::Access { va, write: true }) => format!("wrote to {va}"),
        Event::Seen(Sighting::Access { va, write: false }) => format!("read {va}"),
        Event::Seen(_) => "was seen by the host".to_owned(),
        Event::EntryWrite(written) => write(written, written.va),
        Event::TableFill(fill) => format!(
            "filled the table at {}, which was linked nowhere: the first entry maps {}",
            fill.table,
            entry(fill.first, fill.level)
        ),
        Event::Flush(flushed) => flush(flushed),
        Event::Control { register, old, new } => {
            format!("changed {} from {old:#x} to {new:#x}", register.name().to_uppercase())
        }
        Event::RootLoad { root, pcid, no_flush } => root_load((root, *pcid), *no_flush),
        Event::Life(step, named) => life(*step, *named),
        Event::ShootdownAck(number) => format!("acknowledged shootdown {number}"),
        Event::Observed(observation) => observed(observation),
        Event::Host(done, named) => act(*done, *named),
    }
}
