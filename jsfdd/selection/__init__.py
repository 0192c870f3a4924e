"""Which samples are worth training on.

flatness.py is the maths of a token's scores, score.py runs it over the data (run.py is the loop, table.py the result and
its file), sfdd.py selects, and best_k.py knows while scores still come in what can be selected. features.py says where hidden
states come from; store.py is their files' format, store_writer.py writes them, row_format.py is one token's.
"""
