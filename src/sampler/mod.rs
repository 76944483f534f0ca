//! sampler (under construction).
