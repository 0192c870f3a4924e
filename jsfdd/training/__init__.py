"""Draft training: loss.py is the maths, step.py compiles it, log.py keeps the figures, train.py is the loop."""
