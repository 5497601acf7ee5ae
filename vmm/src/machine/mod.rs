//! The machine: guest memory, first tables, KVM, exits.

pub mod backtrace;
pub mod boot;
pub mod decode;
pub mod exit;
pub mod kvm;
pub mod memory;
pub mod probe;
pub mod state;
pub mod step;
pub mod sys;
