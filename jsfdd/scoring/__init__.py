"""How flat the target's next-token distributions are: flatness.py has the equations, score.py runs them over the data."""
