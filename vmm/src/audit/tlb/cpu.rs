//! One CPU: its registers as far as they decide what is cached, and the address spaces that its
//! caches may hold something of.

use super::duty::{PageFlush, Tag};
use super::epochs::Scope;
use super::fill::{Fill, Healed, PENDING};
use lacuna_abi::addr::{FrameRange, Gpa};

/// Most address spaces that are followed on one CPU.
const MAX_SPACES: usize = 256;

/// More address spaces than are followed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TooManySpaces;

/// What decides under which tag a CPU caches (SDM volume 3, "Paging" and "Process-Context
/// Identifiers (PCIDs)").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mode {
    /// CR3's root.
    pub root: Gpa,
    /// CR3's PCID; 0 while CR4.PCIDE is clear.
    pub pcid: u16,
    /// CR0.PG.
    pub paging: bool,
    /// CR4.PGE: without it the Global bit means nothing.
    pub globals: bool,
}

/// Translations of one address space that a CPU may cache under one tag.
#[derive(Clone, Debug)]
pub(super) struct Space {
    pub root: Gpa,
    pub tag: Tag,
    /// CR4.PGE was clear: entries with the Global bit have this tag too.
    pub takes_globals: bool,
    /// The paging-structure caches may hold paths of it. Only asked of a PCID's.
    pub paths: bool,
    pub fill: Fill,
    /// A flush of all of it has been announced: it is gone once the CPU is seen to have gone on.
    pub dying: bool,
}

impl Space {
    /// Whether translations whose entries have this Global bit are among it.
    pub(super) fn takes(&self, global: bool) -> bool {
        match self.tag {
            Tag::Global => global,
            Tag::Pcid(_) => !global || self.takes_globals,
        }
    }
}

/// One CPU. Before it is started it caches nothing.
#[derive(Clone, Debug)]
pub(super) struct Cpu {
    pub running: bool,
    pub mode: Mode,
    pub cr0: u64,
    pub cr4: u64,
    pub efer: u64,
    pub spaces: Vec<Space>,
    /// Number of the last instruction that took spaces away, until its effect is certain.
    changed: Option<u64>,
}

impl Cpu {
    /// A CPU that does not run yet; it will start like this.
    pub(super) fn new(root: Gpa, (cr0, cr4, efer): (u64, u64, u64), mode: (bool, bool)) -> Self {
        let (paging, globals) = mode;
        let mode = Mode { root, pcid: 0, paging, globals };
        Self { running: false, mode, cr0, cr4, efer, spaces: Vec::new(), changed: None }
    }

    /// It executes its first instruction.
    pub(super) fn start(&mut self) {
        self.running = true;
        // A list that holds nothing has room.
        let _ = self.enter();
    }

    /// It runs in a new mode, or is about to; the same instruction flushes.
    pub(super) fn switch(
        &mut self,
        mode: Mode,
        scope: Option<Scope>,
        seq: u64,
    ) -> Result<(), TooManySpaces> {
        self.mode = mode;
        match scope {
            Some(scope) => self.flush(scope, seq),
            None => {
                self.changed = Some(seq);
                self.refresh();
            }
        }
        self.enter()
    }

    /// A flush of all that the scope reaches. What the CPU fills now stays: it is filled again.
    pub(super) fn flush(&mut self, scope: Scope, seq: u64) {
        let mode = self.mode;
        for space in self.spaces.iter_mut().filter(|space| scope.reaches(space.tag)) {
            if is_current(space, &mode) {
                space.fill.healed.clear();
            } else {
                space.dying = true;
            }
        }
        self.changed = Some(seq);
        self.refresh();
    }

    /// Everything goes, and what it is filled with from now on has another tag.
    pub(super) fn flush_for(&mut self, mode: Mode, seq: u64) -> Result<(), TooManySpaces> {
        self.spaces.iter_mut().for_each(|space| space.dying = true);
        self.switch(mode, None, seq)
    }

    /// Pages were invalidated, and of the paths those that lead to them or, if `all_paths`, all of
    /// the PCID.
    pub(super) fn flush_pages(&mut self, flush: &PageFlush, all_paths: bool) {
        let mode = self.mode;
        for space in self.spaces.iter_mut().filter(|s| !s.dying && !is_current(s, &mode)) {
            let paths = space.tag == Tag::Pcid(flush.pcid);
            if paths && all_paths {
                space.paths = false;
            }
            // Global translations of the pages may have been cached through any PCID's paths.
            if flush.reaches(space.tag) || flush.globals {
                let (leaves, paths) = (true, paths && !all_paths);
                space.fill.heal(Healed::Pages { flush: *flush, leaves, paths, by: PENDING });
            }
        }
        self.changed = Some(flush.seq);
        self.refresh();
    }

    /// The second stage was closed for these frames: what is not filled again is gone.
    pub(super) fn heal(&mut self, frames: FrameRange, seq: u64) {
        for fill in self.spaces.iter_mut().map(|space| &mut space.fill) {
            if fill.until.is_some() || fill.healed.iter().any(Healed::cuts_paths) {
                fill.heal(Healed::Frames(frames, seq));
            }
        }
    }

    /// Whether it has announced an instruction that takes spaces away.
    #[inline]
    pub(super) fn has_announced(&self) -> bool {
        self.changed.is_some()
    }

    /// The CPU's next event has the number `seq`: what it announced before has been carried out.
    /// Whether it had announced anything.
    pub(super) fn went_on(&mut self, seq: u64) -> bool {
        if self.changed.is_none_or(|changed| changed >= seq) {
            return false;
        }
        self.changed = None;
        self.spaces.retain(|space| !space.dying);
        self.spaces.iter_mut().for_each(|space| space.fill.went_on(seq));
        true
    }

    /// Whether anything of the root's that no CR3 load spares may be cached.
    pub(super) fn may_cache(&self, root: Gpa) -> bool {
        self.spaces.iter().any(|space| space.root == root && space.tag != Tag::Global)
    }

    /// Notes of each space whether it can be filled from now on.
    fn refresh(&mut self) {
        for index in 0..self.spaces.len() {
            let space = &self.spaces[index];
            if space.dying {
                continue;
            }
            if is_current(space, &self.mode) {
                let space = &mut self.spaces[index];
                space.fill = Fill::default();
                space.paths = true;
            } else if self.is_walked(space) {
                let cut = (space.tag == Tag::Global).then(|| self.cut_paths(space.root));
                let space = &mut self.spaces[index];
                space.fill.resume();
                if let Some(cut) = cut {
                    space.fill.cut(&cut);
                }
            } else {
                self.spaces[index].fill.end();
            }
        }
    }

    /// Paths that went and through which global translations of the root would be filled.
    fn cut_paths(&self, root: Gpa) -> Vec<Healed> {
        let tag = Tag::Pcid(self.mode.pcid);
        let leads = |s: &&Space| !s.dying && s.paths && s.root == root && s.tag == tag;
        let way = self.spaces.iter().find(leads);
        let healed = way.into_iter().flat_map(|way| &way.fill.healed);
        healed.filter(|healed| healed.cuts_paths()).copied().collect()
    }

    /// Whether the CPU, which runs with another root, can still walk to the space's tables through
    /// paths that it cached under the PCID that it uses again (SDM volume 3, "Using the
    /// Paging-Structure Caches to Translate Linear Addresses": they are used whatever CR3 holds).
    fn is_walked(&self, space: &Space) -> bool {
        let leads = |other: &Space| {
            !other.dying
                && other.root == space.root
                && other.paths
                && other.tag == Tag::Pcid(self.mode.pcid)
        };
        self.mode.paging
            && match space.tag {
                Tag::Pcid(_) => leads(space),
                Tag::Global => self.mode.globals && self.spaces.iter().any(leads),
            }
    }

    /// Adds the spaces that the CPU fills from now on.
    fn enter(&mut self) -> Result<(), TooManySpaces> {
        let Mode { root, pcid, paging, globals } = self.mode;
        if !paging {
            return Ok(());
        }
        for tag in [Some(Tag::Pcid(pcid)), globals.then_some(Tag::Global)].into_iter().flatten() {
            let is_it = |space: &Space| space.root == root && space.tag == tag && !space.dying;
            if self.spaces.iter().any(is_it) {
                continue;
            }
            if self.spaces.len() >= MAX_SPACES {
                return Err(TooManySpaces);
            }
            let (fill, takes_globals) = (Fill::default(), !globals);
            let space = Space { root, tag, takes_globals, paths: true, fill, dying: false };
            self.spaces.push(space);
        }
        Ok(())
    }
}

/// Whether the CPU walks the space from its root.
fn is_current(space: &Space, mode: &Mode) -> bool {
    mode.paging
        && !space.dying
        && space.root == mode.root
        && match space.tag {
            Tag::Pcid(pcid) => pcid == mode.pcid,
            Tag::Global => mode.globals,
        }
}
