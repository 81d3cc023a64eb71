"""Jobs' models and stores, read from outside the trainer."""
