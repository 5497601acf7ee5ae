//! Steps that ask for pages and give them back, and those that change what an allocation is.

use super::{Held, History, Owner, Page};
use crate::alloc::{AllocError, Request};
use crate::convert::ConvertError;
use crate::handle::BadHandle;
use crate::mapped::MappedPages;
use crate::meta::MAX_ORDER;
use crate::secret::{SecretPages, UseError};
use crate::zone::BLOCK_PAGES;
use std::vec::Vec;

impl<'r, 'a> History<'r, 'a> {
    pub(super) fn alloc(&mut self, request: Request, secret: bool) {
        let allocator = self.allocator;
        let (result, refused) = self.watch(|| {
            if secret {
                allocator.alloc_secret(request).map(Owner::Secret)
            } else {
                allocator.alloc_mapped(request).map(Owner::Mapped)
            }
        });
        let owner = match result {
            Ok(owner) => owner,
            Err(error) => return self.denied(request, secret, error, refused),
        };
        let frames = owner.frames();
        assert_eq!(frames.count(), 1 << request.order, "the size of {frames}");
        assert!(frames.start().0.is_multiple_of(frames.count()), "{frames} is not aligned");
        assert!(self.mock.layout.zone_frames().contains_range(frames), "{frames}");
        if request.zero {
            let state = self.mock.state();
            let zero = |frame| state.frame(frame).contents.is_zero();
            assert!(frames.iter().all(zero), "{frames} is handed out as zero and is not");
        }
        self.made[0] += 1;
        self.made[1] += u64::from(secret);
        let fill = request.zero.then_some(0);
        let pages = std::vec![Page { fill, words: Vec::new() }; 1 << request.order];
        let Request { order, migratetype, .. } = request;
        let held = Held { owner, order, migratetype, pages, unsealed: false, converted: false };
        self.held.push(held);
    }

    /// Judges a request that failed.
    pub(super) fn denied(&self, request: Request, secret: bool, error: AllocError, refused: bool) {
        let Request { order, .. } = request;
        let noblock = request.noblock || self.must_not_block();
        let allowed = match error {
            AllocError::BadOrder => order > MAX_ORDER,
            AllocError::Gate(_) => refused,
            AllocError::Window(_) => self.windows() > 0,
            AllocError::WouldBlock => secret && noblock,
            AllocError::NoMemory => !(secret && noblock),
            AllocError::NoBlock => secret && !noblock,
            AllocError::Corrupted { .. } => false,
        };
        assert!(allowed, "{request:?}, secret: {secret}, failed with {error:?}");
        let short = matches!(error, AllocError::NoMemory | AllocError::NoBlock);
        if !short || noblock || refused || self.allocator.config.min_free != Some(0) {
            return;
        }
        // Who may wait is only refused when nothing is left that could serve.
        let counters = self.allocator.counters();
        let free = if secret { counters.nr_free_unmapped } else { counters.nr_free_mapped };
        assert!(order > 0 || free == 0, "{error:?} with {free} free pages");
        if order <= 9 && (!secret || self.allocator.config.flip) {
            assert_eq!(counters.nr_fresh, 0, "{error:?} with fresh memory");
            let map = &self.allocator.map;
            let zone = self.allocator.zone();
            let whole = |block: &u32| zone.is_free(map, *block);
            let found = (0..map.len()).step_by(BLOCK_PAGES as usize).find(whole);
            assert_eq!(found, None, "{error:?} with a wholly free pageblock");
        }
    }

    pub(super) fn free(&mut self, held: Held<'r, 'a>) {
        let secret = matches!(held.owner, Owner::Secret(_));
        self.freed[0] += 1;
        self.freed[1] += u64::from(secret && !held.converted);
        if held.converted {
            self.parked += 1 << held.order;
        }
        let open = held.unsealed;
        drop(held.owner);
        if open {
            // It is freed while it is open, and withheld.
            let reported = self.mock.violations();
            assert!(reported.iter().all(|v| v.starts_with("second-stage-open")), "{reported:?}");
        }
    }

    /// Has an allocation change sides where it is: secret pages keep what the mapped ones held, and
    /// come back zero.
    pub(super) fn convert(&mut self, held: Held<'r, 'a>) {
        let (order, was_converted, unsealed) = (held.order, held.converted, held.unsealed);
        let Held { owner, mut pages, .. } = held;
        let (result, refused) = self.watch(|| match owner {
            Owner::Mapped(owner) => match owner.into_secret() {
                Ok(owner) => (Owner::Secret(owner), Ok(true)),
                Err((owner, error)) => (Owner::Mapped(owner), Err(error)),
            },
            Owner::Secret(owner) => match owner.into_mapped() {
                Ok(owner) => (Owner::Mapped(owner), Ok(false)),
                Err((owner, error)) => (Owner::Secret(owner), Err(error)),
            },
        });
        let (owner, result) = result;
        let blocked = self.must_not_block();
        let mut held = Held { owner, order, pages: Vec::new(), ..held };
        match result {
            Ok(secret) => {
                assert!(order < 9 && !blocked, "order {order}, interrupts off: {blocked}");
                held.converted = secret;
            }
            Err(error) => {
                let allowed = match error {
                    ConvertError::TooLarge => order >= 9,
                    ConvertError::NoTable => false,
                    ConvertError::WouldBlock => blocked,
                    ConvertError::NotConverted => !was_converted,
                    ConvertError::LeftOpen => unsealed,
                    ConvertError::Gate(_) => refused,
                    ConvertError::Use(UseError::Window(_)) => self.windows() > 0,
                    ConvertError::Use(error) => {
                        held.unsealed |= matches!(error, UseError::Unsealed(_));
                        refused
                    }
                };
                assert!(allowed, "order {order}, converted: {was_converted}: {error:?}");
            }
        }
        // On the way back they are scrubbed; when that fails, some of them.
        match result {
            Ok(false) => pages.fill(Page { fill: Some(0), words: Vec::new() }),
            Err(ConvertError::Use(_)) => pages.fill(Page::default()),
            Ok(true) | Err(_) => {}
        }
        held.pages = pages;
        self.held.push(held);
    }

    pub(super) fn renew(&mut self, held: Held<'r, 'a>) {
        let on = self.allocator;
        let old = held.owner.handle();
        let owner = match held.owner {
            Owner::Mapped(owner) => {
                assert_eq!(owner.into_raw(), old);
                assert_eq!(SecretPages::from_raw(on, old).err(), Some(BadHandle(old)));
                MappedPages::from_raw(on, old).map(Owner::Mapped)
            }
            Owner::Secret(owner) => {
                assert_eq!(owner.into_raw(), old);
                assert_eq!(MappedPages::from_raw(on, old).err(), Some(BadHandle(old)));
                SecretPages::from_raw(on, old).map(Owner::Secret)
            }
        };
        let owner = owner.unwrap_or_else(|bad| panic!("a handle leads nowhere: {bad:?}"));
        self.held.push(Held { owner, ..held });
        self.forge(old);
    }

    /// All allocations have owners, so that no word is a handle: neither this one, nor what an owner
    /// would give.
    pub(super) fn forge(&self, word: u64) {
        let owned = self
            .held
            .iter()
            .map(|held| held.owner.handle())
            .chain(self.busy.iter().map(|busy| busy.handle));
        for word in owned.chain([word]) {
            let mapped = MappedPages::from_raw(self.allocator, word).map(MappedPages::into_raw);
            let secret = SecretPages::from_raw(self.allocator, word).map(SecretPages::into_raw);
            assert_eq!([mapped, secret], [Err(BadHandle(word)); 2], "two owners");
        }
    }
}
