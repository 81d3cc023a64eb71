"""The base in NF4, its adapter, and the way from tokens to loss."""
