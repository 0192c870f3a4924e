"""Which samples and tokens are worth training on."""
