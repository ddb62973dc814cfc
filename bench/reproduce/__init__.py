"""The papers' experiments at a size that two cores finish, one command each: `python -m bench reproduce NAME`.

In:   `configs/NAME.yaml`, whose keys are all the settings there are.
Out:  rows with seed, commit and versions in `bench/results/reproduction/NAME.csv`, a figure beside them, and the tables
      of `docs/reproduction.md`.
Who:  `bench.__main__`, `make reproduce`.

    config, rows        what is asked for, and one number of what came out
    encoder             an encoder that learns several tasks at once
    similarity, change, sharing, multitask, equal_parameters, clients, federated    one experiment each
    claims, figures, docs, command      what the papers say beside our numbers; pictures; the page; the command

Nothing here is needed to use the library.
"""
