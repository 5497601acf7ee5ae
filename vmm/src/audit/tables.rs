//! The host's own copy of page tables: the entries of each table page, since when each of them
//! translates, and where the page is linked.
//!
//! One page may serve as a table of several levels at once, and at several places: a guest's root
//! may lead to itself. Entries are kept once for a page, the rest for each level.

use super::index::Rights;
use super::world::TableWords;
use lacuna_abi::addr::{FrameRange, Gfn, Gpa, Gva};
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::layout::Layout;
use lacuna_abi::paging::{ENTRIES, Entry, Level};

/// A page of the table pool as a table of one level: number of the page and level in one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct TableId(u32);

impl TableId {
    #[inline]
    pub(super) fn level(self) -> Level {
        [Level::Pt, Level::Pd, Level::Pdpt, Level::Pml4][self.role()]
    }

    const fn slot(self) -> usize {
        (self.0 / 4) as usize
    }

    const fn role(self) -> usize {
        (self.0 % 4) as usize
    }
}

/// Where a table is linked, and what the path to it grants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub root: Gpa,
    /// First address that the table spans.
    pub va: Gva,
    pub rights: Rights,
    /// Number of the latest grant on the path.
    pub since: u64,
}

impl Place {
    /// The place of a table behind `entry`, which spans from `va`.
    pub(super) fn below(&self, entry: Entry, va: Gva, since: u64) -> Self {
        let (rights, since) = (self.rights.and(entry), self.since.max(since));
        Self { root: self.root, va, rights, since }
    }
}

/// How many leaf entries a table has, and what they map: what a complete check counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct LeafTally {
    pub leaves: u64,
    /// Those that map a frame of the table pool.
    pub of_pool: u64,
    /// Those that map memory of the guest.
    pub of_guest: u64,
    /// Those that are not XD by themselves.
    pub executable: u64,
}

/// A page as a table of one level; without places it is none.
#[derive(Clone, Debug, Default)]
struct Role {
    places: Vec<Place>,
    /// Where it was linked first, of the places that it had since it had none.
    first: Gva,
    tally: LeafTally,
}

/// Numbers of the events that granted the entries of a page. Of one that is not present it says
/// nothing.
#[derive(Clone, Debug)]
enum Since {
    /// All by the same.
    All(u64),
    Each(Box<TableWords>),
}

/// A copy of a table page.
#[derive(Clone, Debug)]
pub(super) struct Page {
    words: TableWords,
    since: Since,
    /// Entries that are known to be a run of small pages, granted together: the first, and the one
    /// behind the last. A table that was filled is one run, and it is asked for often.
    known: (u64, u64),
    roles: [Role; 4],
    /// A bit for each role that has a place.
    used: u8,
}

impl Page {
    fn new(words: &TableWords) -> Self {
        let (since, roles) = (Since::All(0), Default::default());
        let mut page = Self { words: *words, since, known: (0, 0), roles, used: 0 };
        page.known.1 = page.run(Level::Pt, (0, ENTRIES));
        page
    }

    /// Entry `index`; one that maps nothing past the table's end.
    pub(super) fn entry(&self, index: u64) -> Entry {
        let word = usize::try_from(index).ok().and_then(|index| self.words.get(index));
        Entry(word.copied().unwrap_or(0))
    }

    /// Number of the event that granted entry `index`, which is present.
    pub(super) fn since(&self, index: u64) -> u64 {
        match &self.since {
            Since::All(since) => *since,
            Since::Each(all) => {
                let since = usize::try_from(index).ok().and_then(|index| all.get(index));
                since.copied().unwrap_or(0)
            }
        }
    }

    /// Whether the page is a table of one level only, this one's, at one place.
    pub(super) fn is_linked_once(&self, id: TableId) -> bool {
        self.used == 1 << id.role()
            && self.roles.get(id.role()).is_some_and(|role| role.places.len() == 1)
    }

    /// The tally of the page as this table.
    #[inline]
    pub(super) fn tally_mut(&mut self, id: TableId) -> &mut LeafTally {
        &mut self.roles[id.role()].tally
    }

    /// The entries `first..end`.
    pub(super) fn entries(&self, (first, end): (u64, u64)) -> &[u64] {
        let range = |end: u64| Some(usize::try_from(first).ok()?..usize::try_from(end).ok()?);
        range(end.min(ENTRIES)).and_then(|range| self.words.get(range)).unwrap_or_default()
    }

    /// How many entries from `first` on, before `end`, are not present.
    pub(super) fn gap(&self, range: (u64, u64)) -> u64 {
        if range.1 == range.0 + 1 {
            return u64::from(!self.entry(range.0).is_present());
        }
        let absent = |word: &&u64| !Entry(**word).is_present();
        (0..).zip(self.entries(range).iter().take_while(absent)).last().map_or(0, |(at, _)| at + 1)
    }

    /// How many entries from `first` on, before `end`, are leaves that map frames that follow each
    /// other with equal flags, granted together; 0 if the first one is none.
    pub(super) fn run(&self, level: Level, (first, end): (u64, u64)) -> u64 {
        let entry = self.entry(first);
        if !entry.is_present() || !entry.is_leaf(level) {
            return 0;
        }
        if end <= first + 1 {
            return 1;
        }
        // Past the last frame that can exist an address would run into the flags.
        let room = (Entry::ADDRESS - (entry.0 & Entry::ADDRESS)) >> level.span_shift();
        let end = end.min(first.saturating_add(room).saturating_add(1));
        let (known_first, known_end) = self.known;
        let inside = level == Level::Pt && known_first <= first && first < known_end;
        let known = if inside { known_end.min(end) - first } else { 1 };
        let from = first + known;
        if from >= end {
            return known;
        }
        let end = match &self.since {
            Since::All(_) => end,
            Since::Each(each) => {
                let range = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
                let since = each.get(range(from)..range(end)).unwrap_or_default();
                from + alike(since, self.since(first), 0)
            }
        };
        let expected = entry.0.wrapping_add(known * level.span());
        known + alike(self.entries((from, end)), expected, level.span())
    }

    pub(super) const fn words(&self) -> &TableWords {
        &self.words
    }

    /// Entry `index` is written: what is known of a run is known of the longer side of it.
    #[inline]
    fn doubt(&mut self, index: u64) {
        let (first, end) = &mut self.known;
        if *first <= index && index < *end {
            if index - *first > *end - index { *end = index } else { *first = index + 1 }
        }
    }

    pub(super) fn set(&mut self, index: u64, entry: Entry, since: u64) {
        self.doubt(index);
        let Ok(index) = usize::try_from(index) else { return };
        let Some(word) = self.words.get_mut(index) else { return };
        *word = entry.0;
        if !entry.is_present() {
            return;
        }
        match &mut self.since {
            Since::All(all) if *all == since => {}
            Since::All(all) => {
                let mut each = Box::new([*all; PAGE_WORDS]);
                each[index] = since;
                self.since = Since::Each(each);
            }
            Since::Each(each) => each[index] = since,
        }
    }
}

/// Words that are compared without a way out in between.
const CHUNK: usize = 32;

/// How many words from the first on are `first`, and then `step` more each.
fn alike(words: &[u64], first: u64, step: u64) -> u64 {
    let mut expected = first;
    let mut done = 0;
    // So the processor compares several at once.
    for chunk in words.chunks_exact(CHUNK) {
        let mut differ = 0;
        for (at, word) in (0_u64..).zip(chunk) {
            differ |= word ^ expected.wrapping_add(at * step);
        }
        if differ != 0 {
            break;
        }
        expected = expected.wrapping_add(CHUNK as u64 * step);
        done += CHUNK;
    }
    let mut left = words.iter().skip(done);
    let mut count = u64::try_from(done).unwrap_or(0);
    while left.next().is_some_and(|word| *word == expected) {
        expected = expected.wrapping_add(step);
        count += 1;
    }
    count
}

/// Copies of all pages that some root reaches.
#[derive(Clone, Debug)]
pub(super) struct Tables {
    pool: FrameRange,
    pages: Vec<Option<Box<Page>>>,
    places: usize,
    /// How often a place came or went.
    changes: u64,
}

impl Tables {
    pub(super) fn new(layout: &Layout) -> Self {
        let pool = layout.pool.frames().unwrap_or(FrameRange::single(Gfn(0)));
        let count = usize::try_from(pool.count()).unwrap_or(0);
        Self { pool, pages: vec![None; count], places: 0, changes: 0 }
    }

    pub(super) const fn budget(&self) -> usize {
        self.pages.len()
    }

    pub(super) const fn pool(&self) -> FrameRange {
        self.pool
    }

    /// Number of places at which tables are linked, all together.
    pub(super) const fn all_places(&self) -> usize {
        self.places
    }

    /// A number that changes with every place that comes or goes.
    pub(super) const fn changes(&self) -> u64 {
        self.changes
    }

    /// The page at a frame as a table of `level`, whether it is one or not; `None` outside the pool.
    pub(super) fn id(&self, frame: Gfn, level: Level) -> Option<TableId> {
        if !self.pool.contains(frame) {
            return None;
        }
        let slot = u32::try_from(frame.0 - self.pool.start().0).ok()?;
        Some(TableId(slot.checked_mul(4)? + u32::from(level.number()) - 1))
    }

    pub(super) fn frame(&self, id: TableId) -> Gfn {
        Gfn(self.pool.start().0 + id.slot() as u64)
    }

    /// The copy of a table's page.
    pub(super) fn page(&self, id: TableId) -> Option<&Page> {
        self.pages.get(id.slot())?.as_deref()
    }

    pub(super) fn page_mut(&mut self, id: TableId) -> Option<&mut Page> {
        self.pages.get_mut(id.slot())?.as_deref_mut()
    }

    /// Makes the copy of a table's page, which no root reached so far.
    pub(super) fn copy(&mut self, id: TableId, words: &TableWords) {
        if let Some(page) = self.pages.get_mut(id.slot()) {
            *page = Some(Box::new(Page::new(words)));
        }
    }

    /// Every page of which there is a copy, as tables of the levels that it serves as.
    pub(super) fn all(&self) -> impl Iterator<Item = (Gfn, &Page)> {
        let frames = self.pool.iter().zip(&self.pages);
        frames.filter_map(|(frame, page)| page.as_deref().map(|page| (frame, page)))
    }

    /// The tables of all levels that a page serves as.
    pub(super) fn roles(&self, frame: Gfn) -> impl Iterator<Item = TableId> + use<> {
        let id = self.id(frame, Level::Pt);
        let used = id.and_then(|id| self.page(id)).map_or(0, |page| page.used);
        (0..4_u32)
            .filter(move |role| used >> role & 1 != 0)
            .filter_map(move |role| id.map(|TableId(first)| TableId(first + role)))
    }

    fn role(&self, id: TableId) -> Option<&Role> {
        self.page(id)?.roles.get(id.role())
    }

    /// Where a table is linked.
    pub(super) fn places(&self, id: TableId) -> &[Place] {
        self.role(id).map_or(&[], |role| &role.places)
    }

    /// Where a table was linked first since it was linked nowhere.
    pub(super) fn first_place(&self, id: TableId) -> Gva {
        self.role(id).map_or(Gva(0), |role| role.first)
    }

    /// Where a page is linked, as a table of whatever level.
    pub(super) fn linked_at(&self, frame: Gfn) -> impl Iterator<Item = &Place> {
        self.roles(frame).flat_map(|id| self.places(id))
    }

    pub(super) fn tally(&self, id: TableId) -> LeafTally {
        self.role(id).map(|role| role.tally).unwrap_or_default()
    }

    /// Adds a place; false if the table is linked there already.
    pub(super) fn add_place(&mut self, id: TableId, place: Place) -> bool {
        let Some(page) = self.page_mut(id) else { return false };
        let Some(role) = page.roles.get_mut(id.role()) else { return false };
        if role.places.iter().any(|old| (old.root, old.va) == (place.root, place.va)) {
            return false;
        }
        if role.places.is_empty() {
            role.first = place.va;
            page.used |= 1 << id.role();
        }
        role.places.push(place);
        self.places += 1;
        self.changes += 1;
        true
    }

    /// Takes a place back; `None` if the table is not linked there.
    pub(super) fn remove_place(&mut self, id: TableId, root: Gpa, va: Gva) -> Option<Place> {
        let page = self.page_mut(id)?;
        let role = page.roles.get_mut(id.role())?;
        let at = role.places.iter().position(|old| (old.root, old.va) == (root, va))?;
        let place = role.places.remove(at);
        if role.places.is_empty() {
            page.used &= !(1 << id.role());
        }
        self.places -= 1;
        self.changes += 1;
        Some(place)
    }

    /// Forgets the copy of a page that no root reaches any more: what it held.
    pub(super) fn forget_unlinked(&mut self, id: TableId) -> Option<Box<Page>> {
        self.pages.get_mut(id.slot())?.take_if(|page| page.used == 0)
    }
}
