"""`jsfdd X` is x.py: its options, what it reads and checks, what it does, what it says."""
