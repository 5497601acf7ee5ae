// `tests/builds.rs` shows what these refuse.

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

/// Fails to compile when a type is `Send` or `Sync`, in the same way.
macro_rules! assert_stays {
    ($($type:ty),*) => {$({
        trait Ambiguous<A> { fn check() {} }
        struct Sent;
        struct Shared;
        impl<T: ?Sized> Ambiguous<()> for T {}
        impl<T: Send> Ambiguous<Sent> for T {}
        impl<T: Sync> Ambiguous<Shared> for T {}
        <$type as Ambiguous<_>>::check();
    })*};
}
