"""All jobs together: who is next, where, and instead of whom."""
