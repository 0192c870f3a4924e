"""How flat the next-token distributions of the target are.

Flatness.py has the equations, score.py runs them over the data.
"""
