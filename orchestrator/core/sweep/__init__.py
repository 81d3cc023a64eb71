"""What happens next with a sweep: which trials there are, which of them end early, and which is the best."""
