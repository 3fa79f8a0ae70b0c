"""What a name of a model or an alias may be (it is part of keys in the store), and a training run's longest text."""

NAME_PATTERN = r"[a-z0-9][a-z0-9-]{0,62}"
LONGEST_TRAINING_RUN = 2000
