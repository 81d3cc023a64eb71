"""What the README claims, each with the command that measures it.

A benchmark prints one JSON document and, with `--save`, writes it to `results/`. `targets.toml` says what each
figure must be; `targets.py` holds them against each other and writes the README's table.
"""
