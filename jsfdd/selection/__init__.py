"""Which samples are worth training on: flatness.py scores tokens, score.py data, sfdd.py selects, features.py stores."""
