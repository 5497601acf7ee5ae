//! What waits at event numbers. Numbers come nearly in order, so that most of them have a place in
//! a queue; those that are far ahead, as a hostile guest's may be, wait in a map.

use std::collections::{BTreeMap, VecDeque};

/// Numbers that have a place in the queue.
const NEAR: u64 = 16 << 10;

/// Values by number. Numbers are taken in ascending order, and none is inserted below one that was
/// asked for by [`Self::take`].
#[derive(Debug)]
pub(super) struct Waiting<T> {
    /// Number of the queue's first place.
    start: u64,
    near: VecDeque<Option<T>>,
    far: BTreeMap<u64, T>,
    len: usize,
}

impl<T> Waiting<T> {
    /// Nothing waits, and nothing below `start` ever will.
    pub(super) const fn new(start: u64) -> Self {
        Self { start, near: VecDeque::new(), far: BTreeMap::new(), len: 0 }
    }

    /// Whether nothing waits.
    #[inline]
    pub(super) const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// How many values wait.
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Whether a value waits at `number`.
    #[inline]
    pub(super) fn contains(&self, number: u64) -> bool {
        self.place(number).is_some_and(|place| matches!(self.near.get(place), Some(Some(_))))
            || self.far.contains_key(&number)
    }

    /// Has `value` wait at `number`, where nothing waits yet.
    #[inline]
    pub(super) fn insert(&mut self, number: u64, value: T) {
        self.len += 1;
        let Some(place) = self.place(number) else {
            self.far.insert(number, value);
            return;
        };
        if place >= self.near.len() {
            self.near.resize_with(place + 1, || None);
        }
        self.near[place] = Some(value);
    }

    /// Takes the value at `number`. What waited below is dropped: its number has been passed.
    #[inline]
    pub(super) fn take(&mut self, number: u64) -> Option<T> {
        self.pass(number);
        let value = self.near.front_mut()?.take();
        self.len -= usize::from(value.is_some());
        value
    }

    /// The smallest number at which a value waits.
    pub(super) fn first(&self) -> Option<u64> {
        let near = (self.start..).zip(&self.near).find(|(_, value)| value.is_some());
        near.map(|(number, _)| number).or_else(|| self.far.keys().next().copied())
    }

    /// How many values wait at numbers from `from` to `last`.
    pub(super) fn count(&self, from: u64, last: u64) -> usize {
        let near = (self.start..).zip(&self.near).take_while(|(number, _)| *number <= last);
        let near = near.filter(|(number, value)| value.is_some() && *number >= from).count();
        let range = if from <= last { from..=last } else { return 0 };
        near + self.far.range(range).count()
    }

    /// Place of `number` in the queue, if it has one.
    #[inline]
    fn place(&self, number: u64) -> Option<usize> {
        let place = number.checked_sub(self.start).filter(|place| *place < NEAR)?;
        usize::try_from(place).ok()
    }

    /// Makes `number` the queue's first, as it is when nothing below it will be inserted.
    #[inline]
    pub(super) fn pass(&mut self, number: u64) {
        while self.start < number {
            let Some(passed) = self.near.pop_front() else {
                self.start = number;
                break;
            };
            self.len -= usize::from(passed.is_some());
            self.start += 1;
        }
        if !self.far.is_empty() {
            self.bring_near();
        }
    }

    /// Moves what has come near into the queue, and drops what was passed.
    fn bring_near(&mut self) {
        while let Some(entry) = self.far.first_entry() {
            let number = *entry.key();
            if number.checked_sub(self.start).is_some_and(|ahead| ahead >= NEAR) {
                break;
            }
            let value = entry.remove();
            self.len -= 1;
            if number >= self.start {
                self.insert(number, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(u64),
        Take,
        Skip(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let ahead = prop_oneof![6 => 0..8_u64, 2 => 0..3 * NEAR, 1 => NEAR - 2..NEAR + 2];
        prop_oneof![
            4 => ahead.clone().prop_map(Step::Insert),
            4 => Just(Step::Take),
            1 => ahead.prop_map(Step::Skip),
        ]
    }

    proptest! {
        #[test]
        fn it_is_a_map_whose_front_moves_on(steps in prop::collection::vec(step(), 0..80)) {
            let mut waiting = Waiting::new(1);
            let mut model: BTreeMap<u64, u64> = BTreeMap::new();
            let mut next = 1;
            for step in steps {
                match step {
                    Step::Insert(ahead) => {
                        let number = next + ahead;
                        prop_assert_eq!(waiting.contains(number), model.contains_key(&number));
                        if model.insert(number, number).is_none() {
                            waiting.insert(number, number);
                        }
                    }
                    Step::Take => {
                        prop_assert_eq!(waiting.take(next), model.remove(&next));
                        next += 1;
                        model = model.split_off(&next);
                    }
                    Step::Skip(ahead) => {
                        next += ahead;
                        model = model.split_off(&next);
                        prop_assert_eq!(waiting.take(next), model.remove(&next));
                        next += 1;
                    }
                }
                // What was passed may still lie there until the next number is asked for.
                let last = next + 3 * NEAR / 2;
                prop_assert_eq!(waiting.count(next, last), model.range(next..=last).count());
                prop_assert_eq!(waiting.first(), model.keys().next().copied());
                prop_assert_eq!(waiting.len(), model.len());
            }
        }
    }

    #[test]
    fn a_number_far_ahead_takes_no_room() {
        let mut waiting = Waiting::new(1);
        waiting.insert(u64::MAX / 2, 'a');
        waiting.insert(u64::MAX, 'b');
        assert_eq!((waiting.near.len(), waiting.len()), (0, 2));
        assert_eq!(waiting.take(u64::MAX / 2), Some('a'));
        assert_eq!(waiting.first(), Some(u64::MAX));
        assert_eq!((waiting.take(u64::MAX), waiting.len()), (Some('b'), 0));
    }
}
