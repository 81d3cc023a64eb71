"""`python -m orchestrator.cli` is `qlora`."""

from orchestrator.cli.main import app

if __name__ == "__main__":
    app(prog_name="qlora")
