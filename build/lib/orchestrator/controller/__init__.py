"""The shell around the core: observe, decide, act; the Ray program; leadership."""
