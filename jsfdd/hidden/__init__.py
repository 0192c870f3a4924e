"""The target's hidden states on disk, kept while scoring or computed for training."""
