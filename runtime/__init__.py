"""Running bundles; needs numpy and one engine library, never torch."""
