"""Which samples are worth training on.

flatness.py is the maths of a token's scores, score.py runs it over the data (run.py is the loop, table.py the result and
its file), sfdd.py selects, and features.py stores the hidden states of what stays.
"""
