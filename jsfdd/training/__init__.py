"""Draft training: loss.py has the equations, step.py compiles them, train.py is the loop."""
