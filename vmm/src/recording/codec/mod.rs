//! Items as bytes. Numbers are written as the difference to what one would expect after what came
//! before; writer and reader remember the same.

mod decode;
mod encode;

pub(super) use decode::Decoder;
pub(super) use encode::Encoder;

use crate::audit::{Denial, TableWords};
use crate::recording::ReadError;
use lacuna_abi::MAX_CPUS;
use lacuna_abi::event::RECORD_WORDS;
use lacuna_abi::gate::OpKind;
use std::collections::HashMap;

/// Longest text on a tape.
const MAX_TEXT: usize = 64 << 10;
/// Most touches of one quiesce point.
const MAX_TOUCHES: u64 = 1 << 20;
/// Kinds of records that are remembered apart.
const KINDS: usize = 16;
/// Words of a record that are written; its check is not.
const WORDS: usize = RECORD_WORDS - 1;

const START: u8 = 1;
const REGISTER_ROOT: u8 = 2;
const UNREGISTER_ROOT: u8 = 3;
const START_CPU: u8 = 4;
const REGISTER_CPU: u8 = 5;
const EVENT: u8 = 6;
const ARRIVAL: u8 = 7;
const DONE: u8 = 8;
const QUIESCE: u8 = 9;
const CHOOSE_PROBES: u8 = 10;
const JUDGE_PROBES: u8 = 11;
const LEAK: u8 = 12;
const LEAK_SEARCH: u8 = 13;
const INCONCLUSIVE: u8 = 14;
const MEDIATE: u8 = 15;
const CAME: u8 = 16;
const ADMIT: u8 = 17;
const SAMPLE: u8 = 18;
const TABLE: u8 = 32;
const ENTRY: u8 = 33;
const ZERO: u8 = 34;
const FIRST_NONZERO: u8 = 35;
const DENIAL: u8 = 36;
const DENIES_ALL: u8 = 37;
const CPU: u8 = 38;
const INTENT: u8 = 39;
const DRAW: u8 = 40;
const RESULT: u8 = 64;

const OPS: [OpKind; 3] = [OpKind::Seal, OpKind::Open, OpKind::Release];
const DENIALS: [Denial; 4] = [Denial::Denied, Denial::Open, Denial::HeldOpen, Denial::NotEnforced];
const ANSWERS: [Option<bool>; 3] = [None, Some(false), Some(true)];

/// Where bytes come from.
pub(super) trait Source {
    /// The next byte.
    fn byte(&mut self) -> Result<u8, ReadError>;

    /// The error that what was just read makes no sense.
    fn damaged(&self, what: &str) -> ReadError;

    /// The error that there is more of something than may be.
    fn huge(&self, what: &str) -> ReadError;
}

/// What writer and reader remember of what came before.
pub(super) struct Context {
    seq: u64,
    records: [[u64; WORDS]; KINDS],
    sites: [u32; KINDS],
    frame: u64,
    tables: HashMap<u64, Box<TableWords>>,
    max_tables: u64,
    cpus: [[u64; 8]; MAX_CPUS],
}

impl Context {
    /// Nothing came before. At most `max_tables` tables will be remembered.
    pub(super) fn new(max_tables: u64) -> Self {
        Self {
            seq: 0,
            records: [[0; WORDS]; KINDS],
            sites: [0; KINDS],
            frame: 0,
            tables: HashMap::new(),
            max_tables,
            cpus: [[0; 8]; MAX_CPUS],
        }
    }
}
