"""Pure decisions: facts and `now` go in, commands come out. No I/O, clock, randomness or logging in here."""
