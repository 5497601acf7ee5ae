//! The model against a slow and obviously right reference.
