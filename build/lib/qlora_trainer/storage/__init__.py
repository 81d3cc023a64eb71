"""The job's store and what lies in it."""
