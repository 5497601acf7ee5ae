//! The model against a slow and obviously right reference: over every state of small worlds, and
//! over random histories of larger ones.

mod canon;
mod order;
mod properties;
mod reference;
mod small;
mod units;
mod world;
mod worlds;
