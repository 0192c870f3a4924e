"""What would make a draft's acceptance in serving differ from its training."""
