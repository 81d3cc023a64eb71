"""One outside system a file. Adapters never import each other; each translates its library's errors."""
