"""Checks for faults that make a draft accept less when served than in training."""
