"""What a draft is worth, measured."""
