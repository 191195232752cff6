"""LoopMDM itself: configuration and forward pass, its hooked form, its training bound and its sampler."""
