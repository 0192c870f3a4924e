"""Models: what a decoder is, its layers, the target and the draft as pure functions of their parameters."""
