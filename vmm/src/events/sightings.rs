//! What the host sees CPUs do, on its way into the order of events.

use crate::machine::memory::{Memory, MemoryError};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{Gva, PAGE_SIZE};
use lacuna_abi::event::{EntryStores, Event, Record, Sighting};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Sightings that wait for the audit, after which it is told of them.
pub const MANY_SIGHTINGS: usize = 1 << 14;
/// Most pages of windows whose accesses by a CPU are told once.
const MAX_USED: usize = 16;

/// Sightings that the audit has not been told of. Whoever sees something puts it here, with a number
/// from the counter of all events.
pub struct Sightings {
    memory: Arc<Memory>,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct Queue {
    records: Vec<Record>,
    /// Pages of windows that each CPU read or wrote since anything else was seen of it, or an entry was
    /// stored by any CPU, or the audit was told: what an access means may be another since then.
    used: [Vec<(Gva, bool)>; MAX_CPUS],
}

impl Queue {
    fn push(&mut self, record: Record) {
        match record.event {
            Event::Seen(Sighting::Access { .. }) => {}
            Event::Seen(Sighting::Stores(_) | Sighting::Fill(_)) => self.forget(),
            _ => {
                if let Some(used) = self.used.get_mut(usize::from(record.cpu)) {
                    used.clear();
                }
            }
        }
        self.records.push(record);
    }

    fn forget(&mut self) {
        self.used.iter_mut().for_each(Vec::clear);
    }
}

impl Sightings {
    /// None so far, of a machine with this memory.
    #[must_use]
    pub fn new(memory: Arc<Memory>) -> Self {
        Self { memory, queue: Mutex::default() }
    }

    /// CPU `cpu` is about to do this, by code at `site`: the number is taken before.
    ///
    /// # Errors
    /// [`MemoryError`] if the counter cannot be reached: a fault of the VMM.
    pub fn note(&self, cpu: u8, site: u32, sighting: Sighting) -> Result<(), MemoryError> {
        let mut queue = self.lock();
        let seq = self.memory.next_event_number()?;
        queue.push(Record { seq, cpu, site, event: Event::Seen(sighting) });
        Ok(())
    }

    /// CPU `cpu` has read or written a page of a window: told unless it is told already, with nothing else
    /// of this CPU since.
    ///
    /// # Errors
    /// As [`Self::note`].
    pub fn access(&self, (cpu, site): (u8, u32), va: Gva, write: bool) -> Result<(), MemoryError> {
        let va = Gva(va.0 - va.0 % PAGE_SIZE);
        let mut queue = self.lock();
        if let Some(used) = queue.used.get_mut(usize::from(cpu)) {
            if used.contains(&(va, write)) {
                return Ok(());
            }
            if used.len() >= MAX_USED {
                used.clear();
            }
            used.push((va, write));
        }
        let seq = self.memory.next_event_number()?;
        queue.push(Record { seq, cpu, site, event: Event::Seen(Sighting::Access { va, write }) });
        Ok(())
    }

    /// Has `store` carry out these stores of `cpu`: the number of a grant is taken before, that of a
    /// revoke after.
    ///
    /// # Errors
    /// As [`Self::note`]; then nothing is stored.
    pub fn stores(
        &self,
        (cpu, site): (u8, u32),
        stores: EntryStores,
        store: impl FnOnce(),
    ) -> Result<(), MemoryError> {
        // Held across the store: no number is given out that is not here soon.
        let mut queue = self.lock();
        let (grants, revokes) = (stores.new.is_present(), stores.old.is_present());
        let before = if grants { self.memory.next_event_number()? } else { 0 };
        store();
        let (seq, grant) = match (grants, revokes) {
            (true, false) => (before, 0),
            (true, true) => (self.memory.next_event_number()?, before),
            (false, _) => (self.memory.next_event_number()?, 0),
        };
        let stores = EntryStores { grant, ..stores };
        queue.push(Record { seq, cpu, site, event: Event::Seen(Sighting::Stores(stores)) });
        Ok(())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().records.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes all.
    pub(crate) fn take(&self) -> Vec<Record> {
        let mut queue = self.lock();
        // Frames are sealed and opened in between.
        queue.forget();
        std::mem::take(&mut queue.records)
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lacuna_abi::addr::{Gfn, Gpa};
    use lacuna_abi::event::Flush;
    use lacuna_abi::layout::{Layout, Needs};
    use lacuna_abi::paging::{Entry, Level};

    #[test]
    fn a_grant_takes_its_number_before_the_store_and_a_revoke_after() {
        let needs = Needs { image: 4096, memory_mib: 16, cpus: 1, input: 0, scratch: 0 };
        let memory = Arc::new(Memory::new(Layout::new(&needs).unwrap()).unwrap());
        let sightings = Sightings::new(Arc::clone(&memory));
        let page = Entry::new(Gfn(5), Entry::DATA);
        let mut given = Vec::new();
        for (old, new) in [(Entry::EMPTY, page), (page, page), (page, Entry::EMPTY)] {
            let (at, level) = (Gpa(0), Level::Pt);
            let stores = EntryStores { at, level, count: 1, old, new, grant: 0 };
            let store = || given.push(memory.last_event_number().unwrap());
            sightings.stores((0, 0), stores, store).unwrap();
        }
        sightings.note(0, 0, Sighting::Flush(Flush::NonGlobal)).unwrap();
        assert_eq!(given, [1, 2, 3]);
        let numbers = sightings.take().into_iter().map(|record| match record.event {
            Event::Seen(Sighting::Stores(stores)) => (record.seq, stores.grant),
            _ => (record.seq, 0),
        });
        assert_eq!(numbers.collect::<Vec<_>>(), [(1, 0), (3, 2), (4, 0), (5, 0)]);
        assert!(sightings.is_empty());
    }

    #[test]
    fn accesses_of_a_page_are_told_once_until_something_else_is() {
        let needs = Needs { image: 4096, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
        let memory = Arc::new(Memory::new(Layout::new(&needs).unwrap()).unwrap());
        let sightings = Sightings::new(memory);
        let told = |cpu: u8, page: u64, write: bool| {
            let before = sightings.len();
            sightings.access((cpu, 0), Gva(page * PAGE_SIZE + 8), write).unwrap();
            sightings.len() - before == 1
        };
        assert!(told(0, 1, false) && told(0, 1, true) && told(1, 1, false));
        assert!(!told(0, 1, false) && !told(0, 1, true) && !told(1, 1, false));
        sightings.note(0, 0, Sighting::Flush(Flush::NonGlobal)).unwrap();
        assert!(told(0, 1, false) && !told(1, 1, false), "another CPU's flush is another's");
        for page in 2..100 {
            assert!(told(0, page, true));
        }
        let records = sightings.take();
        assert!(matches!(records[0].event, Event::Seen(Sighting::Access { va: Gva(0x1000), .. })));
        assert!(told(0, 99, true), "what is secret may be another frame now");
        assert!(!told(0, 99, true));
    }

    #[test]
    fn an_entry_that_one_cpu_stores_may_change_what_another_reaches() {
        let needs = Needs { image: 4096, memory_mib: 16, cpus: 2, input: 0, scratch: 0 };
        let memory = Arc::new(Memory::new(Layout::new(&needs).unwrap()).unwrap());
        let sightings = Sightings::new(memory);
        for present in [true, false] {
            sightings.access((1, 0), Gva(PAGE_SIZE), false).unwrap();
            let page = Entry::new(Gfn(5), Entry::DATA);
            let [old, new] = if present { [Entry::EMPTY, page] } else { [page, Entry::EMPTY] };
            let stores = EntryStores { at: Gpa(0), level: Level::Pt, count: 1, old, new, grant: 0 };
            sightings.stores((0, 0), stores, || ()).unwrap();
            let before = sightings.len();
            sightings.access((1, 0), Gva(PAGE_SIZE), false).unwrap();
            assert_eq!(sightings.len(), before + 1, "the access after the store is not told");
        }
    }
}
