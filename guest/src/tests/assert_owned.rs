// `tests/builds.rs` shows what this refuses.

/// Fails to compile when a type is `Clone`, `Copy`, or dereferences to something: then two
/// implementations of the trait fit, and which is meant is not clear.
macro_rules! assert_owned {
    ($($type:ty),*) => {$({
        trait Ambiguous<A> { fn check() {} }
        struct Cloned;
        struct Dereferenced;
        impl<T: ?Sized> Ambiguous<()> for T {}
        impl<T: Clone> Ambiguous<Cloned> for T {}
        impl<T: core::ops::Deref> Ambiguous<Dereferenced> for T {}
        <$type as Ambiguous<_>>::check();
    })*};
}
