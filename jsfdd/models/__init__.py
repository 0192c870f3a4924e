"""The target and the draft as pure functions of their parameters."""
