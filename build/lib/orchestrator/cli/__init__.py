"""The `qlora` command."""
