"""One job's life: its state machine, its status, and what follows from what happened."""
