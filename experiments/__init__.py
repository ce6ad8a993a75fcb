"""Studies that print a table and draw a figure: python -m experiments.NAME."""
