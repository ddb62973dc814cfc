"""The papers' experiments at a size that two cores finish, one command each: `python -m bench reproduce NAME`.

`configs/NAME.yaml` has all the settings there are. Rows with seed, commit and versions go to
`bench/results/reproduction/NAME.csv`, a figure lies beside them, and `docs/reproduction.md` has the tables.
"""
