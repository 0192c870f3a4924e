"""How flat the target's next-token distributions are: flatness.py has the equations, score.py applies them to the data."""
